"""Encoder and decoder networks: levels of blocks between pixels and the grid of latents.

A network has one level per halving; what it does at a level is the backbone's choice:

- cnn: plain residual blocks at every level.
- mobile: inverted residuals with depthwise convolutions at every level (after MobileNetV2).
- vit: plain residual blocks as a convolution stem, transformer blocks on the coarsest grid, where
  positions come from a depthwise convolution, so that any grid size fits.

No layer normalises over the batch or the image. Knows tensors only: no codes, files or training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional

from scq.errors import ScqError

Backbone = Literal["cnn", "mobile", "vit"]

_EXPANSION = 4
_HEAD_WIDTH = 32


@dataclass(frozen=True)
class NetworkShape:
    """One side's layout: channels and block counts from the finest level to the coarsest.

    `patch` is the pixel-unshuffle in front of the finest level; `code_dim` channels leave the
    encoder and enter the decoder.

    Raises:
        ScqError: an unknown backbone, or transformer blocks on a width that heads cannot share.
    """

    backbone: Backbone
    code_dim: int
    patch: int
    widths: tuple[int, ...]
    blocks: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.backbone not in BACKBONES:
            raise ScqError(
                f"unknown backbone {self.backbone!r}; available: {', '.join(sorted(BACKBONES))}"
            )
        if self.backbone == "vit" and self.widths[-1] % attention_heads(self.widths[-1]):
            raise ScqError(
                f"a vit backbone needs a coarsest width of a multiple of {_HEAD_WIDTH}, "
                f"got {self.widths[-1]}"
            )

    def block(self, level: int) -> nn.Module:
        """A block of that level."""
        return BACKBONES[self.backbone](self.widths[level], level == len(self.widths) - 1)


class ResidualBlock(nn.Module):
    """x + conv(silu(conv(silu(x)))). Starts as the identity, so deep stacks train unnormalised."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        _start_at_zero(self.second)

    def forward(self, features: Tensor) -> Tensor:
        """(B, width, h, w) -> same shape."""
        hidden = self.first(functional.silu(features))
        residual: Tensor = self.second(functional.silu(hidden))
        return features + residual


class InvertedResidual(nn.Module):
    """Widen fourfold, 3x3 depthwise, narrow again, added to the input; starts as the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = _EXPANSION * width
        self.widen = nn.Conv2d(width, hidden, 1)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.narrow = nn.Conv2d(hidden, width, 1)
        _start_at_zero(self.narrow)

    def forward(self, features: Tensor) -> Tensor:
        """(B, width, h, w) -> same shape."""
        hidden = functional.silu(self.widen(features))
        residual: Tensor = self.narrow(functional.silu(self.depthwise(hidden)))
        return features + residual


class TransformerBlock(nn.Module):
    """Positions by a depthwise convolution, then self-attention and an MLP on normalised tokens.

    Every branch is added to its input and starts at zero.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = attention_heads(width)
        self.position = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.mix = nn.Linear(width, width)
        self.widen = nn.Linear(width, _EXPANSION * width)
        self.narrow = nn.Linear(_EXPANSION * width, width)
        for module in (self.position, self.mix, self.narrow):
            _start_at_zero(module)

    def forward(self, features: Tensor) -> Tensor:
        """(B, width, h, w) -> same shape; cost grows with the square of h * w."""
        features = features + self.position(features)
        tokens = features.flatten(2).transpose(1, 2)
        tokens = tokens + self._attend(self.before_attention(tokens))
        hidden = functional.silu(self.widen(self.before_mlp(tokens)))
        tokens = tokens + self.narrow(hidden)
        mixed: Tensor = tokens.transpose(1, 2).reshape(features.shape)
        return mixed

    def _attend(self, tokens: Tensor) -> Tensor:
        batch, count, width = tokens.shape
        parts = self.queries_keys_values(tokens).reshape(batch, count, 3, self.heads, -1)
        queries, keys, values = parts.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(queries, keys, values)
        attended: Tensor = self.mix(mixed.transpose(1, 2).reshape(batch, count, width))
        return attended


def attention_heads(width: int) -> int:
    """How many attention heads of about 32 channels a width has."""
    return max(1, width // _HEAD_WIDTH)


def _vit_block(width: int, coarsest: bool) -> nn.Module:
    return TransformerBlock(width) if coarsest else ResidualBlock(width)


BACKBONES: dict[str, Callable[[int, bool], nn.Module]] = {
    "cnn": lambda width, coarsest: ResidualBlock(width),
    "mobile": lambda width, coarsest: InvertedResidual(width),
    "vit": _vit_block,
}
"""A block of each backbone from its width and whether its level is the coarsest."""


def build_encoder(shape: NetworkShape) -> nn.Sequential:
    """Pictures (B, 3, H, W) in [-1, 1] -> latents (B, code_dim, H / stride, W / stride)."""
    widths = shape.widths
    layers: list[nn.Module] = [nn.PixelUnshuffle(shape.patch)]
    layers.append(_conv3(3 * shape.patch**2, widths[0]))
    for level, width in enumerate(widths):
        if level > 0:
            layers += [nn.PixelUnshuffle(2), nn.Conv2d(4 * widths[level - 1], width, 1)]
        layers += [shape.block(level) for _ in range(shape.blocks[level])]
    layers.append(nn.Conv2d(widths[-1], shape.code_dim, 1))
    return nn.Sequential(*layers)


def build_decoder(shape: NetworkShape) -> nn.Sequential:
    """Latents (B, code_dim, h, w) -> pictures (B, 3, h * stride, w * stride), about [-1, 1]."""
    widths = shape.widths
    layers: list[nn.Module] = [nn.Conv2d(shape.code_dim, widths[-1], 1)]
    for level in reversed(range(len(widths))):
        layers += [shape.block(level) for _ in range(shape.blocks[level])]
        if level > 0:
            layers += [nn.Conv2d(widths[level], 4 * widths[level - 1], 1), nn.PixelShuffle(2)]
    layers += [_conv3(widths[0], 3 * shape.patch**2), nn.PixelShuffle(shape.patch)]
    return nn.Sequential(*layers)


def _conv3(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def _start_at_zero(module: nn.Module) -> None:
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
