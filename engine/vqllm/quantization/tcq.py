"""Trellis-coded quantization of a linear layer, with error feedback along the input columns.

The trellis runs along the outputs inside one input column, so that a whole column is quantized
before its error is pushed on: feedback stays exact, as in GPTQ. Weight = (scale * level) *
column scale, in float32 and in this order.

Works on one weight matrix and one hessian; knows no model, no file and no progress bar.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vqkernels.trellis import sweep_trellis
from vqllm.errors import InvalidConfig, UnsupportedModel
from vqllm.quantization.base import Arrays, QuantizedLinear, checked_parameters
from vqllm.quantization.hessian import HessianFactor
from vqllm.quantization.sweep import Grid, refit_scales, sweep_columns
from vqllm.quantization.trellis import (
    DEVIATION,
    TrellisCodebook,
    check_size,
    codebook_key,
    codebook_of,
    decode,
)

_SCALE_FLOOR = 2.0**-24  # smallest positive float16, so that no scale rounds to zero
_LARGEST_HALF = 65504.0
_SCALE_FACTORS = {1: 1.1, 2: 1.05, 3: 1.1, 4: 1.15, 5: 1.2}  # of rotated SmolLM2 layers


@dataclass(frozen=True)
class TcqOptions:
    """How to run TCQ.

    Attributes:
        bits: per weight, 1..5.
        trellis_bits: of a state, 10..16; encoding time doubles with each, decoding does not change.
        group_size: input columns that share a scale per output; 0: all of them.
        column_scales: whether every input column has a factor of its own.
        scale_factor: scales before the sweep, relative to those of a Gaussian row; None: what
            served best at this width. Feedback widens the weights, hence more than 1.
        rounds: sweeps; each after the first starts from the scales refitted to the one before.
    """

    bits: int = 2
    trellis_bits: int = 12
    group_size: int = 0
    column_scales: bool = False
    scale_factor: float | None = None
    rounds: int = 1

    method: ClassVar[str] = "tcq"

    def __post_init__(self) -> None:
        check_size(self.bits, self.trellis_bits)
        if self.group_size < 0:
            raise InvalidConfig("group_size", self.group_size, "0 (one group) or more")
        if self.scale_factor is not None and not 0 < self.scale_factor < 4:
            raise InvalidConfig("scale_factor", self.scale_factor, "a number in (0, 4)")
        if self.rounds < 1:
            raise InvalidConfig("rounds", self.rounds, "at least 1")

    @property
    def first_scale(self) -> float:
        """Scale before the sweep of weights of root mean square 1."""
        factor = self.scale_factor or _SCALE_FACTORS[self.bits]
        return factor / DEVIATION

    def num_groups(self, in_features: int) -> int:
        return -(-in_features // self.group_size) if self.group_size else 1

    def bits_of(self, out_features: int, in_features: int) -> float:
        """Bits in the file for a linear of this shape, all overhead counted."""
        codes = in_features * 8 * -(-out_features * self.bits // 8)
        scales = 16 * out_features * self.num_groups(in_features)
        return codes + scales + (16 * in_features if self.column_scales else 0)


@dataclass(frozen=True, eq=False)
class TcqLinear(QuantizedLinear):
    """A linear layer as one trellis stream per input column.

    Attributes:
        codes: uint8 (in_features, ceil(out_features * bits / 8)).
        scales: float16 (groups, out_features).
        column_scales: float16 (in_features,) or None.
        group_size: input columns per group; 0: one group.
        codebook: levels of the states.
    """

    codes: NDArray[np.uint8]
    scales: NDArray[np.float16]
    column_scales: NDArray[np.float16] | None
    group_size: int
    codebook: TrellisCodebook = field(repr=False)

    method: ClassVar[str] = "tcq"

    def __post_init__(self) -> None:
        groups = -(-self.in_features // self.group_size) if self.group_size else 1
        width = self.codebook.stream_bytes(self.out_features)
        if self.codes.dtype != np.uint8 or self.codes.shape != (self.in_features, width):
            raise ValueError(f"codes are {self.codes.dtype} {self.codes.shape}, not {width} wide")
        if self.scales.shape != (groups, self.out_features):
            raise ValueError(f"scales have shape {self.scales.shape}, not {groups} groups")
        if self.column_scales is not None and self.column_scales.shape != (self.in_features,):
            raise ValueError(f"column_scales have shape {self.column_scales.shape}")

    @property
    def in_features(self) -> int:
        return int(self.codes.shape[0])

    @property
    def out_features(self) -> int:
        return int(self.scales.shape[1])

    @property
    def group_index(self) -> NDArray[np.int32]:
        """Group of every input column, int32 (in_features,)."""
        return group_index(self.in_features, self.group_size)

    def levels(self) -> NDArray[np.int8]:
        """Integer levels (in_features, out_features), before any scale."""
        return decode(self.codebook, self.codes, self.out_features)

    def dequantize(self) -> NDArray[np.float32]:
        scales = self.scales.astype(np.float32)
        weight = self.levels().astype(np.float32)
        size = self.group_size or self.in_features
        for group, start in enumerate(range(0, self.in_features, size)):
            weight[start : start + size] *= scales[group]
        if self.column_scales is not None:
            weight *= self.column_scales.astype(np.float32)[:, None]
        return np.ascontiguousarray(weight.T)

    def tensors(self) -> Arrays:
        parts: Arrays = {"codes": self.codes, "scales": self.scales}
        if self.column_scales is not None:
            parts["column_scales"] = self.column_scales
        return parts

    def entry(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "bits": self.codebook.bits,
            "trellis_bits": self.codebook.trellis_bits,
            "multiplier": self.codebook.multiplier,
            "group_size": self.group_size,
        }

    @classmethod
    def from_tensors(
        cls, tensors: Arrays, entry: Mapping[str, Any], codebook: TrellisCodebook | None = None
    ) -> Self:
        """Inverse of `tensors` and `entry`.

        `codebook` is the one stored with the model; without it the shipped one is taken.

        Raises:
            InvalidConfig: no such trellis.
            KeyError, ValueError: a tensor is missing or has another shape or dtype.
        """
        codebook = checked_codebook(entry, codebook)
        return cls(
            codes=tensors["codes"],
            scales=tensors["scales"],
            column_scales=tensors.get("column_scales"),
            group_size=int(entry["group_size"]),
            codebook=codebook,
        )

    def parameters(self) -> Arrays:
        return {name: array for name, array in self.tensors().items() if name != "codes"}

    def with_parameters(self, parameters: Arrays) -> Self:
        checked = checked_parameters(self.parameters(), parameters)
        columns = checked.get("column_scales")
        return replace(self, scales=checked["scales"], column_scales=columns)


def quantize_tcq(weight: Tensor, factor: HessianFactor, options: TcqOptions) -> TcqLinear:
    """Quantize `weight` (out, in) float32 for inputs with the hessian of `factor`.

    Raises:
        UnsupportedModel: the weights exceed what float16 scales can express.
        NativeUnavailableError: the native library is not installed.
    """
    codebook = codebook_of(options.bits, options.trellis_bits)
    weight = checked_weight(weight)
    grid = _first_grid(weight, options)
    hessian = factor.hessian.cpu()
    for _ in range(options.rounds):
        coder = partial(sweep_trellis, trellis=codebook.native())
        codes = sweep_columns(weight, factor, grid, coder)
        levels = decode(codebook, codes, weight.shape[0])
        grid = replace(grid, scales=_refit(weight, levels, grid, hessian))
    return _linear(codes, grid, codebook, options)


def checked_codebook(entry: Mapping[str, Any], stored: TrellisCodebook | None) -> TrellisCodebook:
    """The stored or else the shipped codebook, if the layer of `entry` was made with it.

    Raises:
        InvalidConfig: none of this size is shipped.
        KeyError: none is stored, and the entry does not name the multiplier.
        ValueError: the codebook has another size or another multiplier.
    """
    bits, trellis_bits = int(entry["bits"]), int(entry["trellis_bits"])
    key = codebook_key(bits, trellis_bits)
    codebook = stored or codebook_of(bits, trellis_bits)
    named = entry["multiplier"] if stored is None else entry.get("multiplier", stored.multiplier)
    if (codebook.key, codebook.multiplier) != (key, int(named)):
        raise ValueError(
            f"the codebook is {codebook.key} with multiplier {codebook.multiplier}, "
            f"the layer was made with {key} and {named}"
        )
    return codebook


def checked_weight(weight: Tensor) -> Tensor:
    """The weight in float32 on the CPU.

    Raises:
        UnsupportedModel: the weights exceed what float16 scales can express.
    """
    weight = weight.detach().float().cpu()
    if not weight.abs().max() < _LARGEST_HALF:
        raise UnsupportedModel("the weights are not finite or too large for float16 scales")
    return weight


def group_index(in_features: int, group_size: int) -> NDArray[np.int32]:
    """Group of every input column; a size of 0 makes one group."""
    return (np.arange(in_features) // (group_size or in_features)).astype(np.int32)


def _first_grid(weight: Tensor, options: TcqOptions) -> Grid:
    columns = _column_scales(weight) if options.column_scales else None
    scaled = weight if columns is None else weight / columns
    return Grid(
        scales=first_scales(scaled, options).numpy(),
        groups=group_index(weight.shape[1], options.group_size),
        column_scales=None if columns is None else columns.numpy(),
    )


def first_scales(weight: Tensor, options: TcqOptions) -> Tensor:
    """Scales (groups, out) before the sweep, float32 rounded to float16: rms times a factor."""
    parts = torch.split(weight, options.group_size or weight.shape[1], dim=1)
    rms = torch.stack([part.square().mean(1).sqrt() for part in parts])
    return _as_half(rms * options.first_scale)


def rounded_scales(scales: Tensor, current: Tensor) -> NDArray[np.float32]:
    """Scales rounded to float16; where one is not positive, the current one stays."""
    return torch.where(scales > _SCALE_FLOOR, _as_half(scales), current).numpy()


def _column_scales(weight: Tensor) -> Tensor:
    """Root mean square of each column relative to the matrix, rounded to float16."""
    rms = weight.square().mean(0).sqrt()
    mean = rms.square().mean().sqrt().clamp_min(_SCALE_FLOOR)
    return _as_half((rms / mean).clamp_min(1e-3))


def _as_half(scales: Tensor) -> Tensor:
    return scales.clamp(_SCALE_FLOOR, _LARGEST_HALF).half().float()


def _refit(
    weight: Tensor, levels: NDArray[np.int8], grid: Grid, hessian: Tensor
) -> NDArray[np.float32]:
    """The best scales for the given levels."""
    steps = torch.from_numpy(levels).float()
    if grid.column_scales is not None:
        steps *= torch.from_numpy(grid.column_scales)[:, None]
    best = refit_scales(weight, steps.T.contiguous(), grid.groups, hessian)
    return rounded_scales(best, torch.from_numpy(grid.scales))


def _linear(
    codes: NDArray[np.uint8], grid: Grid, codebook: TrellisCodebook, options: TcqOptions
) -> TcqLinear:
    columns = grid.column_scales
    return TcqLinear(
        codes=codes,
        scales=grid.scales.astype(np.float16),
        column_scales=None if columns is None else columns.astype(np.float16),
        group_size=options.group_size,
        codebook=codebook,
    )
