"""Every backbone keeps the shapes, starts as its skip path, and can be saved and trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from scq.backbones import BACKBONES, Backbone, NetworkShape, build_decoder, build_encoder
from scq.errors import ScqError
from scq.model import ModelConfig, ScqAutoencoder, load_model, save_model

NAMES: tuple[Backbone, ...] = ("cnn", "mobile", "vit")
SHAPE = NetworkShape("cnn", code_dim=6, patch=2, widths=(8, 16), blocks=(1, 2))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 5), (7, 3)])
def test_one_latent_stands_for_one_stride_square(name: Backbone, rows: int, columns: int) -> None:
    shape = replace(SHAPE, backbone=name)
    pictures = torch.rand(2, 3, 4 * rows, 4 * columns)
    latents = build_encoder(shape)(pictures)
    assert latents.shape == (2, 6, rows, columns)
    assert build_decoder(shape)(latents).shape == pictures.shape


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("coarsest", [False, True])
def test_blocks_start_as_the_identity_and_learn(name: Backbone, coarsest: bool) -> None:
    torch.manual_seed(0)
    block = BACKBONES[name](16, coarsest)
    features = torch.randn(2, 16, 3, 4)
    assert torch.equal(block(features), features)
    block(features).square().sum().backward()
    assert any(bool((p.grad != 0).any()) for p in block.parameters() if p.grad is not None)


def test_transformer_blocks_see_the_whole_grid() -> None:
    torch.manual_seed(0)
    block = BACKBONES["vit"](16, True)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    features = torch.randn(1, 16, 6, 6)
    changed = features.clone()
    changed[0, :, 0, 0] += 1
    difference = (block(changed) - block(features)).detach().abs().amax(dim=1)
    assert float(difference[0, 5, 5]) > 0


def test_mixed_sides_survive_a_file(tmp_path: Path) -> None:
    config = ModelConfig(
        "mixed",
        "frame",
        stride=4,
        max_width=16,
        max_height=16,
        num_codes=8,
        classes=("a", "b"),
        patch=2,
        encoder_widths=(8, 32),
        encoder_blocks=(1, 1),
        decoder_widths=(8, 8),
        decoder_blocks=(1, 1),
        head_width=8,
        head_levels=2,
        encoder_backbone="vit",
        decoder_backbone="mobile",
    )
    model = ScqAutoencoder(config).eval()
    save_model(model, tmp_path / "mixed.safetensors")
    loaded = load_model(tmp_path / "mixed.safetensors")
    assert loaded.config == config
    images = torch.rand(1, 3, 12, 20)
    assert torch.allclose(loaded.encode(images), model.encode(images), atol=1e-2)
    assert loaded.classify(loaded.encode(images)).shape == (1, 2)


def test_wrong_layouts_are_named() -> None:
    with pytest.raises(ScqError, match="unknown backbone 'resnet'; available: cnn, mobile, vit"):
        replace(SHAPE, backbone="resnet")  # type: ignore[arg-type]
    with pytest.raises(ScqError, match="multiple of 32"):
        replace(SHAPE, backbone="vit", widths=(8, 100))
    with pytest.raises(ScqError, match="head_levels"):
        ModelConfig("x", "frame", stride=16, max_width=16, max_height=16, head_levels=-1)


@pytest.mark.parametrize(("levels", "positions"), [(0, 16), (1, 4), (2, 1), (3, 1)])
def test_head_positions_shrink_with_levels(levels: int, positions: int) -> None:
    config = ModelConfig(
        "x", "crop", stride=8, max_width=32, max_height=32, patch=2,
        classes=("a", "b"), head_pooling="grid", head_levels=levels, head_width=4,
    )  # fmt: skip
    assert config.head_positions == positions
    assert ScqAutoencoder(config).classify(torch.rand(2, 4, 4, 16)).shape == (2, 2)


def test_channels_last_changes_no_result() -> None:
    torch.manual_seed(1)
    decoder = build_decoder(SHAPE)
    latents = torch.rand(1, 6, 4, 4)
    plain = decoder(latents)
    decoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    same = decoder(latents.contiguous(memory_format=torch.channels_last))
    assert torch.allclose(plain, same, atol=1e-5)
