"""The parts of tokenizerd by themselves: the model store, error translation, metrics, pictures."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scq import errors as engine
from scq.model import save_model
from support.tokenizerd import LABELLED, NAN, PLAIN, picture, tiny_model
from vqserve.common.errors import InvalidArgument, ServiceError
from vqserve.common.lifecycle import StartupError
from vqserve.tokenizer.app import build_app
from vqserve.tokenizer.codecs import ModelStore
from vqserve.tokenizer.config import TokenizerSettings
from vqserve.tokenizer.convert import translate
from vqserve.tokenizer.core import checked_top_k
from vqserve.tokenizer.errors import InvalidModel, LastModel, ModelNameTaken, UnknownModel
from vqserve.tokenizer.loading import load_served, serve, zoo_names
from vqserve.tokenizer.metrics import CodebookWindow
from vqserve.tokenizer.pictures import ImageFormat, write_image

MAX_PIXELS = 1_000_000


def store() -> ModelStore:
    return ModelStore(serve(tiny_model(config), MAX_PIXELS) for config in (LABELLED, PLAIN))


def test_models_are_found_by_name_hash_and_frame_hash() -> None:
    models = store()
    labelled = models.by_name("labelled")
    assert models.by_name_or_hash(labelled.card.model_hash[:8].upper()) is labelled
    assert models.by_hash(bytes.fromhex(labelled.card.model_hash)[:4]) is labelled
    assert models.names == ["labelled", "plain"]


@pytest.mark.parametrize("wanted", ["", "nope", "0" * 8, "../plain"])
def test_an_unknown_model_names_those_that_are_loaded(wanted: str) -> None:
    with pytest.raises(UnknownModel, match="labelled, plain"):
        store().by_name_or_hash(wanted)


def test_seven_digits_are_too_few_for_a_hash() -> None:
    models = store()
    prefix = models.by_name("plain").card.model_hash[:7]
    with pytest.raises(UnknownModel):
        models.by_name_or_hash(prefix)


def test_a_name_is_served_once() -> None:
    models = store()
    with pytest.raises(ModelNameTaken, match="plain"):
        models.add(serve(tiny_model(PLAIN), MAX_PIXELS))


def test_the_last_model_stays() -> None:
    models = store()
    models.remove("plain")
    with pytest.raises(LastModel, match="labelled"):
        models.remove("labelled")
    assert models.names == ["labelled"]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (engine.InvalidImage("x"), "INVALID_IMAGE"),
        (engine.ImageTooLarge(10, 10, 50), "IMAGE_TOO_LARGE"),
        (engine.CorruptCodes("x"), "CORRUPT_CODES"),
        (engine.InvalidLatents("x"), "INVALID_LATENTS"),
        (engine.UnknownModel("x", ["nav"]), "UNKNOWN_MODEL"),
        (engine.UnsupportedOperation("x"), "NO_RECOGNITION_HEAD"),
        (engine.InvalidCodebook("x"), "INVALID_MODEL"),
        (engine.ScqError("x"), "INVALID_MODEL"),
    ],
)
def test_engine_errors_keep_their_message(error: engine.ScqError, reason: str) -> None:
    translated = translate(error)
    assert translated.reason == reason
    assert translated.message == str(error)


def test_every_engine_error_has_a_translation() -> None:
    pending: list[type[engine.ScqError]] = [engine.ScqError]
    for error_type in pending:
        pending.extend(error_type.__subclasses__())
    assert len(pending) >= 8
    for error_type in pending:
        error = error_type.__new__(error_type)
        ValueError.__init__(error, "m")
        assert isinstance(translate(error), ServiceError)
        assert translate(error).http_status < 500


def test_codebook_use_is_that_of_the_window() -> None:
    window = CodebookWindow(num_codes=4, frames=2)
    assert window.add(np.array([0, 0])) == (0.25, 1.0)
    ratio, perplexity = window.add(np.array([1, 1]))
    assert ratio == 0.5
    assert perplexity == pytest.approx(2.0)
    ratio, perplexity = window.add(np.array([1, 2, 3]))
    assert ratio == 0.75
    shares = [3 / 5, 1 / 5, 1 / 5]
    assert perplexity == pytest.approx(math.exp(-sum(s * math.log(s) for s in shares)))


@pytest.mark.parametrize(("image_format", "tolerance"), [("png", 0), ("webp", 0), ("jpeg", 16)])
def test_written_pictures_read_back(image_format: ImageFormat, tolerance: int) -> None:
    pixels = picture(40, 24)
    read = np.asarray(Image.open(io.BytesIO(write_image(pixels, image_format))).convert("RGB"))
    difference = np.abs(read.astype(int) - pixels.astype(int))
    assert difference.mean() <= tolerance


def test_a_picture_that_a_format_cannot_hold_is_refused() -> None:
    wide = np.zeros((1, 16_384, 3), np.uint8)
    with pytest.raises(InvalidArgument, match="ask for png"):
        write_image(wide, "webp")


@pytest.mark.parametrize(("asked", "given"), [(0, 5), (1, 1), (100, 100)])
def test_top_k_defaults_to_five(asked: int, given: int) -> None:
    assert checked_top_k(asked) == given


def test_a_model_that_cannot_code_is_not_served(tmp_path: Path) -> None:
    path = tmp_path / "nan.safetensors"
    save_model(tiny_model(NAN), path)
    with pytest.raises(InvalidModel, match="plain picture"):
        load_served(str(path), MAX_PIXELS)


def test_every_zoo_model_can_be_served() -> None:
    served = [load_served(name, MAX_PIXELS) for name in zoo_names()]
    assert {model.name for model in served} == {"food", "nav", "sign32"}
    classes = {model.name: len(model.card.classes) for model in served}
    assert classes == {"food": 10, "nav": 0, "sign32": 43}


def test_model_specs_are_split_at_commas() -> None:
    assert TokenizerSettings(models=" nav, ./a.safetensors ,").model_names == (
        "nav",
        "./a.safetensors",
    )


def test_a_list_of_models_without_one_is_refused_and_an_empty_one_means_all() -> None:
    assert TokenizerSettings(models="").model_names == ()
    with pytest.raises(ValueError, match=r"', ,' names no model"):
        TokenizerSettings(models=", ,")


async def test_an_unknown_zoo_model_ends_the_start_with_its_name() -> None:
    app = build_app(TokenizerSettings(models="no-such-model"))
    with pytest.raises(StartupError, match="no-such-model"):
        await app.load()
    await app.close()
