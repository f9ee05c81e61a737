"""Uniform grids: which scale and zero point a group of weights gets before anything is rounded.

Shared by GPTQ and rounding to nearest; knows no feedback and no model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vqllm.errors import InvalidConfig, UnsupportedModel
from vqllm.quantization.base import GroupedLinear, GroupedSpec, contiguous_groups
from vqllm.quantization.sweep import Grid

_SCALE_FLOOR = 2.0**-24  # smallest positive float16, so that no scale rounds to zero
_LARGEST_HALF = 65504.0
_GROUP_ID_BITS = 32  # `g_idx` of the file, per input column


@dataclass(frozen=True)
class GridOptions:
    """A uniform grid and the search for it.

    Attributes:
        spec: width and group size.
        symmetric: zero point in the middle of the codes; else chosen per group, which pays below
            4 bits, and needs the format gptq_v2 in the file.
        clip_steps: candidate ranges per group, from all weights down to `min_clip` of them;
            asymmetric grids then move each end on its own as often again.
        min_clip: the smallest part of the range that is tried.
    """

    spec: GroupedSpec
    symmetric: bool = True
    clip_steps: int = 16
    min_clip: float = 0.4

    method: ClassVar[str]

    def __post_init__(self) -> None:
        if self.clip_steps < 1:
            raise InvalidConfig("clip_steps", self.clip_steps, "at least 1")
        if not 0 < self.min_clip <= 1:
            raise InvalidConfig("min_clip", self.min_clip, "a number in (0, 1]")

    def bits_of(self, out_features: int, in_features: int) -> float:
        """Bits in the file for a linear of this shape, all overhead counted."""
        bits, groups = self.spec.bits, self.spec.num_groups(in_features)
        codes = bits * out_features * in_features
        return codes + (16 + bits) * out_features * groups + _GROUP_ID_BITS * in_features


@dataclass(frozen=True, eq=False)
class UniformGrid:
    """Scales of every group, float32 (groups, out) rounded to float16, and zeros, uint8."""

    scales: Tensor
    zeros: Tensor

    def for_sweep(self, in_features: int, spec: GroupedSpec) -> Grid:
        """As the sweep takes it."""
        return Grid(self.scales.numpy(), contiguous_groups(in_features, spec))


def search_grid(weight: Tensor, importance: Tensor, options: GridOptions) -> UniformGrid:
    """The grid of least squared rounding error, weighted by column, among those tried.

    Args:
        weight: (out, in) float32.
        importance: (in,), weight of each column's error.

    Raises:
        UnsupportedModel: the weights are not finite or exceed what float16 scales can express.
    """
    spec = options.spec
    largest = weight.abs().max() / (spec.max_code / 2)
    if not largest < _LARGEST_HALF:
        raise UnsupportedModel("the weights are not finite or too large for float16 scales")
    size = spec.columns_per_group(weight.shape[1])
    found = [
        _Search(weight[:, start : start + size].T.contiguous(), importance, start, options).run()
        for start in range(0, weight.shape[1], size)
    ]
    return UniformGrid(
        torch.stack([scale for scale, _ in found]),
        torch.stack([zero for _, zero in found]).to(torch.uint8),
    )


def grouped_linear(codes: Tensor, grid: UniformGrid, spec: GroupedSpec) -> GroupedLinear:
    """The stored form of codes (in, out) uint8 on a grid."""
    return GroupedLinear(
        codes=codes.numpy(),
        scales=grid.scales.half().numpy(),
        zeros=grid.zeros.numpy(),
        group_index=contiguous_groups(codes.shape[0], spec),
        spec=spec,
    )


def positive_half(scales: Tensor) -> Tensor:
    """Scales rounded to what float16 can store, none of them zero."""
    return scales.clamp(_SCALE_FLOOR, _LARGEST_HALF).half().float()


class _Search:
    """The search for one group: columns (size, out); keeps the best scale and zero per output."""

    def __init__(
        self, columns: Tensor, importance: Tensor, start: int, options: GridOptions
    ) -> None:
        self._columns = columns
        self._importance = importance[start : start + len(columns), None]
        self._options = options
        self._low = columns.amin(0).clamp_max(0)
        self._high = columns.amax(0).clamp_min(0)
        if options.symmetric:
            self._high = torch.maximum(self._high, -self._low)
            self._low = -self._high
        self._best_error = torch.full_like(self._high, torch.inf)
        self._best_clips = torch.ones(2, len(self._high))
        self._scale = torch.full_like(self._high, _SCALE_FLOOR)
        self._zero = torch.full_like(self._high, options.spec.symmetric_zero)

    def run(self) -> tuple[Tensor, Tensor]:
        clips = torch.linspace(1.0, self._options.min_clip, self._options.clip_steps)
        for clip in clips:
            self._try(clip.expand_as(self._high), clip.expand_as(self._high))
        if not self._options.symmetric:
            for factor in clips[1:]:
                low, high = self._best_clips
                self._try(low * factor, high)
            for factor in clips[1:]:
                low, high = self._best_clips
                self._try(low, high * factor)
        return self._scale, self._zero

    def _try(self, low_clip: Tensor, high_clip: Tensor) -> None:
        spec = self._options.spec
        low, high = self._low * low_clip, self._high * high_clip
        scale = positive_half((high - low) / spec.max_code)
        if self._options.symmetric:
            zero = torch.full_like(scale, spec.symmetric_zero)
        else:
            zero = torch.round(-low / scale).clamp_(0, spec.max_code)
        steps = torch.round(self._columns / scale)
        rounded = torch.clamp(steps, -zero, spec.max_code - zero).mul_(scale)
        error = ((self._columns - rounded).square_() * self._importance).sum(0)
        is_better = error < self._best_error
        self._best_error = torch.where(is_better, error, self._best_error)
        self._scale = torch.where(is_better, scale, self._scale)
        self._zero = torch.where(is_better, zero, self._zero)
        clips = torch.stack([low_clip, high_clip])
        self._best_clips = torch.where(is_better, clips, self._best_clips)
