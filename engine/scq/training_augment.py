"""Random variations of training batches, on whatever device the batch is on.

One affine warp, one change of tone and colour, then defects (blur, noise, a covered patch) that
only the encoder sees: the decoder's target stays clean. A pure function of torch's generator
given. Knows nothing of models, files or losses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional

from scq.errors import ScqError

_GREY = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class AugmentConfig:
    """How far each variation goes; every value 0 leaves the batch alone.

    rotation: degrees. shear: tangent of the angle. scale, aspect, gamma, saturation: natural
    logarithm of the largest factor. translation, cutout: shares of the side. contrast, brightness,
    colour (gain per channel), noise (standard deviation): in units of the [0, 1] range. blur: the
    largest share of a 5x5 binomial blur. Cutout and blur reach half of the images each.

    Raises:
        ScqError: a negative value, or a rotation beyond 180 degrees.
    """

    rotation: float = 0.0
    shear: float = 0.0
    scale: float = 0.0
    aspect: float = 0.0
    translation: float = 0.0
    contrast: float = 0.0
    brightness: float = 0.0
    gamma: float = 0.0
    saturation: float = 0.0
    colour: float = 0.0
    blur: float = 0.0
    noise: float = 0.0
    cutout: float = 0.0

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if not 0 <= value <= (180 if item.name == "rotation" else 2):
                raise ScqError(f"augment.{item.name} is out of range: {value!r}")

    @property
    def warps(self) -> bool:
        """Whether any geometric variation is on."""
        return any((self.rotation, self.shear, self.scale, self.aspect, self.translation))


@dataclass(frozen=True)
class Varied:
    """`target` is what the decoder should give, `seen` what the encoder is shown."""

    seen: Tensor
    target: Tensor


def augment(images: Tensor, config: AugmentConfig, generator: torch.Generator) -> Varied:
    """Vary a batch (B, 3, S, S) in [0, 1]; results have the same shape, range and device.

    `generator` must be on the CPU, so that every device draws the same numbers.
    """
    target = images
    if config.warps:
        target = _warp(target, config, generator)
    target = _tone(target, config, generator).clamp(0, 1)
    return Varied(_defects(target, config, generator).clamp(0, 1), target)


def _uniform(batch: Tensor, limit: float, generator: torch.Generator, *shape: int) -> Tensor:
    """(B, *shape) numbers in [-limit, limit] on the batch's device."""
    drawn = torch.rand((batch.shape[0], *shape), generator=generator) * 2 - 1
    return drawn.to(batch.device) * limit


def _warp(images: Tensor, config: AugmentConfig, generator: torch.Generator) -> Tensor:
    angle = _uniform(images, math.radians(config.rotation), generator)
    shear = _uniform(images, config.shear, generator)
    scale = _uniform(images, config.scale, generator).exp()
    aspect = (_uniform(images, config.aspect, generator) / 2).exp()
    shift = _uniform(images, 2 * config.translation, generator, 2)
    cos, sin = angle.cos(), angle.sin()
    rows = (
        torch.stack((scale * aspect * cos, scale * (shear * cos - sin), shift[:, 0]), dim=1),
        torch.stack((scale * aspect * sin, scale * (shear * sin + cos), shift[:, 1]), dim=1),
    )
    matrix = torch.stack(rows, dim=1)
    grid = functional.affine_grid(matrix, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, padding_mode="border", align_corners=False)


def _tone(images: Tensor, config: AugmentConfig, generator: torch.Generator) -> Tensor:
    if config.gamma:
        exponent = _uniform(images, config.gamma, generator, 1, 1, 1).exp()
        images = images.clamp(min=1e-4) ** exponent
    if config.saturation:
        grey = (images * images.new_tensor(_GREY).view(1, 3, 1, 1)).sum(dim=1, keepdim=True)
        images = (
            grey + (images - grey) * _uniform(images, config.saturation, generator, 1, 1, 1).exp()
        )
    if config.colour:
        images = images * (1 + _uniform(images, config.colour, generator, 3, 1, 1))
    if config.contrast or config.brightness:
        mean = images.mean(dim=(1, 2, 3), keepdim=True)
        gain = 1 + _uniform(images, config.contrast, generator, 1, 1, 1)
        images = (images - mean) * gain + mean
        images = images + _uniform(images, config.brightness, generator, 1, 1, 1)
    return images


def _defects(images: Tensor, config: AugmentConfig, generator: torch.Generator) -> Tensor:
    if config.blur:
        share = _uniform(images, config.blur, generator, 1, 1, 1).clamp(min=0)
        images = images + share * (_binomial_blur(images) - images)
    if config.noise:
        strength = _uniform(images, config.noise, generator, 1, 1, 1).abs()
        noise = torch.randn(images.shape, generator=generator).to(images.device)
        images = images + strength * noise
    if config.cutout:
        images = _cover(images, config.cutout, generator)
    return images


def _binomial_blur(images: Tensor) -> Tensor:
    taps = images.new_tensor((1, 4, 6, 4, 1)) / 16
    kernel = (taps[:, None] * taps[None, :]).expand(3, 1, 5, 5)
    padded = functional.pad(images, (2, 2, 2, 2), mode="replicate")
    return functional.conv2d(padded, kernel, groups=3)


def _cover(images: Tensor, largest: float, generator: torch.Generator) -> Tensor:
    """Cover a rectangle of half of the images with one random colour."""
    count, _, height, width = images.shape
    drawn = torch.rand((count, 8), generator=generator).to(images.device)
    rows = torch.arange(height, device=images.device).view(1, -1, 1) / height
    columns = torch.arange(width, device=images.device).view(1, 1, -1) / width
    centre_y, centre_x = drawn[:, 0].view(-1, 1, 1), drawn[:, 1].view(-1, 1, 1)
    half = drawn[:, 2:4] * largest / 2
    inside = (rows - centre_y).abs() < half[:, 0].view(-1, 1, 1)
    inside = inside & ((columns - centre_x).abs() < half[:, 1].view(-1, 1, 1))
    covered = (inside & (drawn[:, 4] < 0.5).view(-1, 1, 1)).unsqueeze(1)
    return torch.where(covered, drawn[:, 5:8].view(-1, 3, 1, 1), images)
