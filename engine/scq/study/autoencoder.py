"""The one small autoencoder that every run of every study shares: 32x32 pictures, stride 8.

Knows shapes and weights only: no data, no quantizer, no training.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from scq.errors import InvalidImage, ScqError

SIDE = 32
STRIDE = 8
GRID = SIDE // STRIDE
LATENTS_PER_IMAGE = GRID * GRID


@dataclass(frozen=True)
class AutoencoderConfig:
    """Channels at stride 4 (`fine_width`) and stride 8 (`coarse_width`); F = `code_dim`."""

    fine_width: int = 48
    coarse_width: int = 96
    code_dim: int = 16

    def __post_init__(self) -> None:
        for name in ("fine_width", "coarse_width", "code_dim"):
            if getattr(self, name) < 1:
                raise ScqError(f"{name} must be positive, got {getattr(self, name)}")


class StudyAutoencoder(nn.Module):
    """Pictures (B, 3, 32, 32) in [0, 1] to latents (B, 4, 4, F) and back.

    `latent_scale` is set once after pretraining (`normalise`), so that every quantizer starts
    from latents of unit standard deviation.
    """

    latent_scale: Tensor

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        fine, coarse = config.fine_width, config.coarse_width
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(4),
            nn.Conv2d(48, fine, 3, padding=1),
            _Residual(fine),
            nn.PixelUnshuffle(2),
            nn.Conv2d(4 * fine, coarse, 1),
            _Residual(coarse),
            nn.Conv2d(coarse, config.code_dim, 1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(config.code_dim, coarse, 1),
            _Residual(coarse),
            nn.Conv2d(coarse, 4 * fine, 1),
            nn.PixelShuffle(2),
            _Residual(fine),
            nn.Conv2d(fine, 48, 3, padding=1),
            nn.PixelShuffle(4),
        )
        self.register_buffer("latent_scale", torch.ones(()))

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, 32, 32) in [0, 1] -> (B, 4, 4, F). Raises InvalidImage on another shape."""
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, SIDE, SIDE):
            raise InvalidImage(
                f"study pictures must be (B, 3, {SIDE}, {SIDE}), got {tuple(images.shape)}"
            )
        latents: Tensor = self.encoder(images * 2 - 1)
        return latents.permute(0, 2, 3, 1) * self.latent_scale

    def decode(self, latents: Tensor) -> Tensor:
        """(B, 4, 4, F) -> (B, 3, 32, 32), not clamped, so that training sees every gradient."""
        image: Tensor = self.decoder((latents / self.latent_scale).permute(0, 3, 1, 2))
        return image * 0.5 + 0.5

    def normalise(self, images: Tensor) -> None:
        """Scale the latents of `images` (B, 3, 32, 32) to unit standard deviation."""
        with torch.no_grad():
            self.latent_scale /= self.encode(images).std()


def save_autoencoder(model: StudyAutoencoder, path: Path) -> None:
    """Write the weights as safetensors, complete or not at all."""
    partial = path.with_suffix(".partial")
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, partial)
    partial.replace(path)


def load_autoencoder(path: Path, config: AutoencoderConfig) -> StudyAutoencoder:
    """Read what `save_autoencoder` wrote. Raises ScqError for anything else."""
    model = StudyAutoencoder(config)
    try:
        model.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError) as error:
        raise ScqError(
            f"{path}: not the autoencoder of this study: {error}; delete it to pretrain again"
        ) from error
    return model


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)  # type: ignore[arg-type]

    def forward(self, features: Tensor) -> Tensor:
        change: Tensor = self.second(functional.silu(self.first(functional.silu(features))))
        return features + change
