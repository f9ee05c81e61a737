"""Networks of the codec: packed ones give what the model's own give, and know where they fit."""

from __future__ import annotations

import platform

import numpy as np
import pytest
import torch

from scq.images import Pixels
from scq.model import ModelConfig, ScqAutoencoder
from scq.networks import (
    ModelNetworks,
    NetworksBySize,
    PackedNetworks,
    can_pack,
    make_networks,
)

SHAPES = [
    {"stride": 16, "patch": 4, "encoder_widths": (12, 20, 24), "encoder_blocks": (1, 2, 1)},
    {"stride": 8, "patch": 2, "encoder_widths": (8, 16, 24), "encoder_blocks": (0, 1, 1)},
    {"stride": 4, "patch": 4, "encoder_widths": (16,), "encoder_blocks": (2,)},
]


def model_of(shape: dict[str, object]) -> ScqAutoencoder:
    torch.manual_seed(3)
    values = shape | {
        "decoder_widths": shape["encoder_widths"],
        "decoder_blocks": shape["encoder_blocks"],
    }
    config = ModelConfig("m", "frame", max_width=128, max_height=128, **values)  # type: ignore[arg-type]
    model = ScqAutoencoder(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if not bool(parameter.any()):  # blocks start as the identity, which would prove little
            parameter.normal_(0, 0.05)
    return model


def picture(height: int, width: int) -> Pixels:
    return np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8)


@pytest.fixture(params=range(len(SHAPES)))
def model(request: pytest.FixtureRequest) -> ScqAutoencoder:
    made = model_of(SHAPES[request.param])
    if not can_pack(made):
        pytest.skip("packed networks need torch with oneDNN on an x86 CPU")
    return made


@pytest.mark.parametrize("size", [(16, 16), (32, 80), (112, 48)])
def test_packed_networks_give_what_the_model_gives(
    model: ScqAutoencoder, size: tuple[int, int]
) -> None:
    plain, packed = ModelNetworks(model), PackedNetworks(model)
    expected, found = plain.latents(picture(*size)), packed.latents(picture(*size))
    assert found.shape == expected.shape
    assert found.is_contiguous()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    restored, exact = packed.pixels(expected), plain.pixels(expected)
    assert restored.shape == (*size, 3)
    assert restored.flags.c_contiguous
    difference = np.abs(restored.astype(int) - exact)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-2


def test_packed_networks_in_bfloat16_stay_near(model: ScqAutoencoder) -> None:
    plain, packed = ModelNetworks(model), PackedNetworks(model, torch.bfloat16, torch.bfloat16)
    latents = plain.latents(picture(32, 48))
    assert packed.latents(picture(32, 48)).dtype == torch.float32
    torch.testing.assert_close(packed.latents(picture(32, 48)), latents, rtol=0.1, atol=0.1)
    difference = np.abs(packed.pixels(latents).astype(int) - plain.pixels(latents))
    assert difference.max() <= 4


def test_models_that_cannot_be_packed_run_as_they_are(
    model: ScqAutoencoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(make_networks(model), NetworksBySize)
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    float_only = make_networks(model)
    latents = float_only.latents(picture(32, 48))
    expected = PackedNetworks(model).pixels(latents)
    np.testing.assert_array_equal(float_only.pixels(latents), expected)
    assert not can_pack(model_of(SHAPES[0] | {"encoder_backbone": "mobile"}))
    assert not can_pack(model_of(SHAPES[0]).double())
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert isinstance(make_networks(model), ModelNetworks)


def test_small_frames_are_encoded_by_the_model_itself(model: ScqAutoencoder) -> None:
    chosen, plain, packed = make_networks(model), ModelNetworks(model), PackedNetworks(model)
    small, large = picture(144, 160), picture(160, 160)
    assert torch.equal(chosen.latents(small), plain.latents(small))
    assert torch.equal(chosen.latents(large), packed.latents(large))


def test_crops_are_encoded_packed_at_their_own_size() -> None:
    config = ModelConfig(
        "m", "crop", stride=8, patch=2, max_width=32, max_height=32,
        encoder_widths=(8, 16, 24), encoder_blocks=(0, 1, 1),
        decoder_widths=(8, 16, 24), decoder_blocks=(0, 1, 1),
    )  # fmt: skip
    model = ScqAutoencoder(config).eval().requires_grad_(False)
    if not can_pack(model):
        pytest.skip("packed networks need torch with oneDNN on an x86 CPU")
    chosen = make_networks(model)
    assert isinstance(chosen, PackedNetworks)
    expected = ModelNetworks(model).latents(picture(32, 32))
    torch.testing.assert_close(chosen.latents(picture(32, 32)), expected, rtol=1e-4, atol=1e-5)
