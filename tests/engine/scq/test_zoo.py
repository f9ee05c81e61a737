"""The shipped models load, are small, carry a card, and code real bytes both ways."""

from __future__ import annotations

import numpy as np
import pytest

from scq import zoo
from scq.codec import FrameCodec
from scq.errors import UnknownModel, UnsupportedOperation

NAMES = ("food", "nav", "sign32")
CLASSES = {"food": 10, "nav": 0, "sign32": 43}
NUM_CODES = {"food": 512, "nav": 512, "sign32": 90}


def gradient_picture(height: int, width: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    rows = np.linspace(40, 200, height)[:, None, None]
    columns = np.linspace(0, 40, width)[None, :, None]
    return (rows + columns + np.zeros(3)).astype(np.uint8)


def test_every_model_is_listed_by_its_file_name() -> None:
    assert tuple(info.name for info in zoo.list_models()) == NAMES


def test_all_models_together_are_small() -> None:
    assert sum(info.path.stat().st_size for info in zoo.list_models()) <= 12_000_000


@pytest.mark.parametrize("name", NAMES)
def test_models_have_a_card_with_their_hash(name: str) -> None:
    info = zoo.info(name)
    card = info.path.with_suffix(".md").read_text()
    assert info.model_hash[:8] in card
    assert f"scq train --model {name}" in card


@pytest.mark.parametrize("name", NAMES)
def test_loaded_models_have_the_hash_that_the_list_shows(name: str) -> None:
    model = zoo.load(name)
    assert model.model_hash == zoo.info(name).model_hash
    assert len(model.config.classes) == CLASSES[name]
    assert not model.training
    assert model.quantizer.codebook.shape == (NUM_CODES[name], 16)
    assert FrameCodec(model).tables is not None


@pytest.mark.parametrize("name", NAMES)
def test_shipped_models_restore_a_smooth_picture(name: str) -> None:
    codec = FrameCodec(zoo.load(name))
    picture = gradient_picture(*((32, 32) if name == "sign32" else (80, 112)))
    encoded = codec.encode(picture)
    decoded = codec.decode(encoded.codes)
    assert decoded.shape == picture.shape
    error = decoded.astype(float) - picture
    # A gradient is no sign, and sign32 keeps what tells signs apart.
    assert float(np.sqrt((error**2).mean())) < (32 if name == "sign32" else 16)
    assert encoded.stats.coded_bytes < 100


@pytest.mark.parametrize("name", NAMES)
def test_labels_come_from_codes_where_there_is_a_head(name: str) -> None:
    codec = FrameCodec(zoo.load(name))
    codes = codec.encode(gradient_picture(32, 32)).codes
    if CLASSES[name] == 0:
        with pytest.raises(UnsupportedOperation, match="nav"):
            codec.recognize(codes)
    else:
        labels = codec.recognize(codes)
        assert len(labels) == CLASSES[name]
        assert sum(label.score for label in labels) == pytest.approx(1, abs=1e-4)


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(UnknownModel, match="available: food, nav, sign32"):
        zoo.load("navv")


def test_a_sign_takes_at_most_forty_bytes() -> None:
    codec = FrameCodec(zoo.load("sign32"))
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    assert len(codec.encode(noise).codes) <= 40
    assert len(codec.encode(noise, entropy="raw").codes) <= 40
