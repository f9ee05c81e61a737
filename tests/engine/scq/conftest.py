"""Small models and pictures shared by the scq tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from scq.model import ModelConfig, ScqAutoencoder

MakeModel = Callable[..., ScqAutoencoder]


def _make_model(name: str = "tiny", *, seed: int = 0, **changes: Any) -> ScqAutoencoder:
    torch.manual_seed(seed)
    config = ModelConfig(
        "tiny",
        "frame",
        stride=8,
        max_width=64,
        max_height=48,
        code_dim=4,
        num_codes=32,
        encoder_widths=(8, 8),
        encoder_blocks=(1, 1),
        decoder_widths=(8, 8),
        decoder_blocks=(1, 1),
        head_width=8,
    )
    return ScqAutoencoder(replace(config, name=name, **changes))


@pytest.fixture
def make_model() -> MakeModel:
    """Builds random frame models, stride 8, up to 64x48: name, seed, config changes."""
    return _make_model


@pytest.fixture
def tiny_model() -> ScqAutoencoder:
    """A frame model with a three-class head."""
    return _make_model(classes=("stop", "yield", "no entry"))


@pytest.fixture
def photograph() -> NDArray[np.uint8]:
    """A 40x56 picture with gradients, an edge and texture."""
    rows, columns = np.mgrid[0:40, 0:56]
    red = 4 * columns
    green = 255 * (rows > 20)
    blue = 128 + 100 * np.sin(rows * 0.8) * np.cos(columns * 0.5)
    return np.stack((red, green, blue), 2).clip(0, 255).astype(np.uint8)
