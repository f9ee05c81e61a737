"""The autoencoder's shapes, its refusals and its file format."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from scq.errors import (
    InvalidCodebook,
    InvalidImage,
    InvalidLatents,
    ScqError,
    UnsupportedOperation,
)
from scq.model import ModelConfig, ScqAutoencoder, load_model, model_id, read_model_file, save_model

TINY = ModelConfig(
    "tiny",
    "frame",
    stride=8,
    max_width=64,
    max_height=48,
    code_dim=4,
    num_codes=16,
    classes=("apple pie", "초밥"),
    patch=4,
    encoder_widths=(8, 8),
    encoder_blocks=(1, 1),
    decoder_widths=(8, 8),
    decoder_blocks=(1, 1),
    head_width=6,
)


def tiny_model(seed: int = 0) -> ScqAutoencoder:
    torch.manual_seed(seed)
    return ScqAutoencoder(TINY).eval().requires_grad_(False)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (16, 40), (48, 64)])
def test_one_latent_stands_for_one_stride_square(height: int, width: int) -> None:
    model = tiny_model()
    images = torch.rand(2, 3, height, width)
    latents = model.encode(images)
    assert latents.shape == (2, height // 8, width // 8, 4)
    assert model.decode(latents).shape == images.shape
    assert model.classify(latents).shape == (2, 2)


def test_coded_latents_keep_raster_order() -> None:
    model = tiny_model()
    latents = torch.randn(2, 3, 5, 4)
    coded = model.dequantize(model.quantize(latents), (3, 5))
    assert coded.shape == latents.shape
    alone = model.dequantize(model.quantize(latents[1:, 2:, 4:]), (1, 1))
    torch.testing.assert_close(coded[1, 2, 4], alone[0, 0, 0])


def test_decoded_pictures_stay_in_range() -> None:
    decoded = tiny_model().decode(torch.randn(1, 2, 2, 4) * 1e4)
    assert float(decoded.min()) >= 0
    assert float(decoded.max()) <= 1


@pytest.mark.parametrize("shape", [(1, 3, 8, 12), (1, 1, 8, 8), (3, 8, 8), (1, 3, 0, 8)])
def test_encode_refuses_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidImage):
        tiny_model().encode(torch.zeros(shape))


def test_decode_refuses_other_latents() -> None:
    with pytest.raises(InvalidLatents, match=r"\(B, h, w, 4\)"):
        tiny_model().decode(torch.zeros(1, 2, 2, 5))


def test_a_model_without_classes_cannot_classify() -> None:
    model = ScqAutoencoder(replace(TINY, classes=()))
    with pytest.raises(UnsupportedOperation, match="'tiny' has no classifier head"):
        model.classify(torch.zeros(1, 2, 2, 4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stride": 16}, "stride 8, not 16"),
        ({"kind": "video"}, "'video'"),
        ({"name": ""}, "needs a name"),
        ({"max_width": 63}, "63x48"),
        ({"decoder_widths": (8,)}, "decoder_widths"),
        ({"lam": float("nan")}, "lam"),
        ({"head_pooling": "grid"}, "head_pooling 'grid' does not fit kind 'frame'"),
        ({"head_pooling": "max"}, "head_pooling 'max'"),
        ({"code_dim": 0}, "code_dim"),
        ({"max_support": 9}, "max_support 9"),
    ],
)
def test_configs_name_the_bad_field(change: dict[str, object], message: str) -> None:
    values = json.loads(TINY.to_json()) | change
    with pytest.raises(ScqError, match=message):
        ModelConfig.from_json(json.dumps(values))


def test_configs_survive_json() -> None:
    assert ModelConfig.from_json(TINY.to_json()) == TINY


@pytest.mark.parametrize("text", ["", "[]", '{"name": "x"}', '{"colour": 1}'])
def test_other_json_is_no_config(text: str) -> None:
    with pytest.raises(ScqError, match="config"):
        ModelConfig.from_json(text)


def test_a_saved_model_decodes_the_same_after_loading(tmp_path: Path) -> None:
    path = tmp_path / "tiny.safetensors"
    stored_id = save_model(tiny_model(), path)
    first, second = load_model(path), load_model(path)
    assert first.config == TINY
    assert first.model_hash == stored_id
    latents = torch.randn(1, 2, 3, 4)
    assert torch.equal(first.decode(latents), second.decode(latents))
    assert save_model(first, tmp_path / "again.safetensors") == stored_id


def test_model_id_covers_decoder_codebook_tables_and_config_only(tmp_path: Path) -> None:
    model = tiny_model()
    model.entropy_tensors = {"sizes": torch.tensor([3, 1])}
    save_model(model, tmp_path / "tiny.safetensors")
    stored = read_model_file(tmp_path / "tiny.safetensors")
    tensors, original = stored.tensors, stored.model_hash

    def changed(name: str) -> str:
        return model_id(tensors | {name: tensors[name] + 1}, TINY, stored.codebook_exponent)

    assert len(original) == 64
    assert changed("encoder.1.weight") == original
    assert changed("head.linear.bias") == original
    assert changed("quantizer.codebook") != original
    assert changed("decoder.0.bias") != original
    assert changed("entropy.sizes") != original
    exponent = stored.codebook_exponent
    assert model_id(tensors, TINY, exponent + 1) != original
    assert model_id(tensors, replace(TINY, denominator=8), exponent) != original
    assert model_id(tensors, replace(TINY, lam=0.5, classes=()), exponent) == original


def test_stored_codes_are_integers_on_a_power_of_two_grid(tmp_path: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.quantizer.codebook[3, 1] = 1.99999
    save_model(model, tmp_path / "tiny.safetensors")
    loaded = load_model(tmp_path / "tiny.safetensors")
    integers, exponent = loaded.codebook_int16()
    assert integers.dtype == np.int16
    exact = integers.astype(np.float64) * 2.0**-exponent
    assert np.array_equal(loaded.quantizer.codebook.double().numpy(), exact)
    assert np.abs(exact - model.quantizer.codebook.numpy()).max() <= 2.0 ** -(exponent + 1)
    assert np.abs(integers.astype(int)).max() > 2**13


@pytest.mark.parametrize("largest", [0.0, 1e-9, 0.99999, 1.0, 1.99998, 1.999985, 3e8])
def test_the_codebook_scale_always_fits_int16(largest: float) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.quantizer.codebook.zero_()
        model.quantizer.codebook[0, 0] = largest
        model.quantizer.codebook[1, 0] = -largest
    integers, exponent = model.codebook_int16()
    assert integers[0, 0] == -integers[1, 0] >= 0
    assert float(integers[0, 0]) * 2.0**-exponent == pytest.approx(largest, rel=1e-4)


def test_a_diverged_codebook_is_not_saved(tmp_path: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.quantizer.codebook[0, 0] = float("nan")
    with pytest.raises(InvalidCodebook, match="NaN"):
        save_model(model, tmp_path / "tiny.safetensors")


def test_entropy_tables_travel_with_the_model(tmp_path: Path) -> None:
    model = tiny_model()
    model.entropy_tensors = {"sizes": torch.tensor([[3, 65533]], dtype=torch.int32)}
    save_model(model, tmp_path / "tiny.safetensors")
    loaded = load_model(tmp_path / "tiny.safetensors")
    assert list(loaded.entropy_tensors) == ["sizes"]
    assert torch.equal(loaded.entropy_tensors["sizes"], model.entropy_tensors["sizes"])


def test_a_grid_head_sees_every_position_apart() -> None:
    config = replace(TINY, kind="crop", max_width=24, max_height=16, head_pooling="grid")
    model = ScqAutoencoder(config).eval()
    assert model.head is not None
    assert model.head.linear.in_features == 3 * 2 * TINY.head_width
    assert model.classify(torch.randn(5, 2, 3, 4)).shape == (5, 2)


def test_files_that_are_no_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ScqError, match=r"absent\.safetensors"):
        load_model(tmp_path / "absent.safetensors")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"not safetensors at all")
    with pytest.raises(ScqError, match=r"broken\.safetensors"):
        load_model(broken)
    foreign = tmp_path / "foreign.safetensors"
    save_file({"weight": torch.zeros(2)}, str(foreign))
    with pytest.raises(ScqError, match="holds something else, not scq-model-2"):
        load_model(foreign)


@pytest.mark.parametrize(
    ("name", "message"), [("quantizer.codebook", r"quantizer\.codebook"), ("decoder.0.bias", "fit")]
)
def test_tensors_must_fit_the_config(tmp_path: Path, name: str, message: str) -> None:
    path = tmp_path / "short.safetensors"
    save_model(tiny_model(), path)
    stored = read_model_file(path)
    tensors = {key: tensor for key, tensor in stored.tensors.items() if key != name}
    metadata = {"format": "scq-model-2", "config": TINY.to_json(), "codebook_exponent": "13"}
    save_file(tensors, str(path), metadata=metadata)
    with pytest.raises(ScqError, match=message):
        load_model(path)


@pytest.mark.parametrize("exponent", [{}, {"codebook_exponent": "many"}])
def test_a_model_file_needs_its_codebook_scale(tmp_path: Path, exponent: dict[str, str]) -> None:
    path = tmp_path / "scale.safetensors"
    save_model(tiny_model(), path)
    metadata = {"format": "scq-model-2", "config": TINY.to_json(), **exponent}
    save_file(read_model_file(path).tensors, str(path), metadata=metadata)
    with pytest.raises(ScqError, match="codebook_exponent"):
        load_model(path)
