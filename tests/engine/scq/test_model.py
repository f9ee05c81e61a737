"""The autoencoder's shapes, its refusals and its file format."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from scq.errors import InvalidImage, InvalidLatents, ScqError, UnsupportedOperation
from scq.model import ModelConfig, ScqAutoencoder, load_model, model_id, save_model

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


def test_model_id_covers_decoder_codebook_and_config_only() -> None:
    tensors = {name: tensor.half() for name, tensor in tiny_model().state_dict().items()}
    original = model_id(tensors, TINY)

    def changed(name: str) -> str:
        return model_id(tensors | {name: tensors[name] + 1}, TINY)

    assert len(original) == 64
    assert changed("encoder.1.weight") == original
    assert changed("head.linear.bias") == original
    assert changed("quantizer.codebook") != original
    assert changed("decoder.0.bias") != original
    assert model_id(tensors, replace(TINY, denominator=8)) != original
    assert model_id(tensors, replace(TINY, lam=0.5, classes=())) == original


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
    with pytest.raises(ScqError, match="not a scq-model-1 file"):
        load_model(foreign)


def test_tensors_must_fit_the_config(tmp_path: Path) -> None:
    path = tmp_path / "short.safetensors"
    tensors = {name: tensor.half() for name, tensor in tiny_model().state_dict().items()}
    del tensors["quantizer.codebook"]
    save_file(tensors, str(path), metadata={"format": "scq-model-1", "config": TINY.to_json()})
    with pytest.raises(ScqError, match=r"quantizer\.codebook"):
        load_model(path)
