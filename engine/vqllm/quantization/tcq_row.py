"""Trellis-coded quantization along the inputs: one stream per output row.

Rows are independent, as the format of other trellis quantizers has it, but feedback gets in the
way: the best path looks ahead over columns whose targets depend on the errors made before them. So
a row is encoded in steps of a few columns, each with a look-ahead that is thrown away again, and
after each step the block's error is pushed on exactly (block LDL feedback: Chee et al., "QuIP",
2023). The direction of `tcq.py` needs none of this and is better; this one is here to measure that,
and for readers that want the bits of an output side by side.

Works on one weight matrix and one hessian; knows no model, no file and no progress bar.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vqkernels.trellis import search_trellis
from vqllm.errors import InvalidConfig
from vqllm.quantization.base import Arrays, QuantizedLinear, checked_parameters
from vqllm.quantization.hessian import HessianFactor, factorize
from vqllm.quantization.sweep import refit_scales
from vqllm.quantization.tcq import (
    TcqOptions,
    checked_codebook,
    checked_weight,
    first_scales,
    rounded_scales,
)
from vqllm.quantization.trellis import TrellisCodebook, check_size, codebook_of, codes_of, decode


@dataclass(frozen=True)
class TcqRowOptions:
    """How to run TCQ along the inputs.

    Attributes:
        bits: per weight, 1..5.
        trellis_bits: of a state, 10..16.
        step: columns that are fixed at a time, without feedback among them.
        look_ahead: columns after them that the path is chosen for as well.
        scale_factor: see `TcqOptions`.
    """

    bits: int = 2
    trellis_bits: int = 12
    step: int = 4
    look_ahead: int = 32
    scale_factor: float | None = None

    method: ClassVar[str] = "tcq_row"

    def __post_init__(self) -> None:
        check_size(self.bits, self.trellis_bits)
        if self.step < 1 or self.look_ahead < 0:
            raise InvalidConfig("step", self.step, "at least 1, and look_ahead 0 or more")
        if self.scale_factor is not None and not 0 < self.scale_factor < 4:
            raise InvalidConfig("scale_factor", self.scale_factor, "a number in (0, 4)")

    def bits_of(self, out_features: int, in_features: int) -> float:
        """Bits in the file for a linear of this shape, all overhead counted."""
        return out_features * (8 * -(-in_features * self.bits // 8) + 16)


@dataclass(frozen=True, eq=False)
class TcqRowLinear(QuantizedLinear):
    """A linear layer as one trellis stream per output row: weight = scale * level.

    Attributes:
        codes: uint8 (out_features, ceil(in_features * bits / 8)).
        scales: float16 (1, out_features).
        width: input columns, which the padded streams do not tell.
        codebook: levels of the states.
    """

    codes: NDArray[np.uint8]
    scales: NDArray[np.float16]
    width: int
    codebook: TrellisCodebook = field(repr=False)

    method: ClassVar[str] = "tcq_row"

    def __post_init__(self) -> None:
        expected = (self.out_features, self.codebook.stream_bytes(self.width))
        if self.codes.dtype != np.uint8 or self.codes.shape != expected:
            raise ValueError(f"codes are {self.codes.dtype} {self.codes.shape}, not {expected}")
        if self.scales.shape != (1, self.out_features):
            raise ValueError(f"scales have shape {self.scales.shape}, not one row")

    @property
    def in_features(self) -> int:
        return self.width

    @property
    def out_features(self) -> int:
        return int(self.scales.shape[-1])

    def levels(self) -> NDArray[np.int8]:
        """Integer levels (out_features, in_features), before the scale."""
        return decode(self.codebook, self.codes, self.width)

    def dequantize(self) -> NDArray[np.float32]:
        scales: NDArray[np.float32] = self.scales[0].astype(np.float32)
        return scales[:, None] * self.levels().astype(np.float32)

    def tensors(self) -> Arrays:
        return {"codes": self.codes, "scales": self.scales}

    def entry(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "bits": self.codebook.bits,
            "trellis_bits": self.codebook.trellis_bits,
            "multiplier": self.codebook.multiplier,
            "in_features": self.width,
        }

    @classmethod
    def from_tensors(
        cls, tensors: Arrays, entry: Mapping[str, Any], codebook: TrellisCodebook | None = None
    ) -> Self:
        """Inverse of `tensors` and `entry`; see `TcqLinear.from_tensors`."""
        codebook = checked_codebook(entry, codebook)
        return cls(tensors["codes"], tensors["scales"], int(entry["in_features"]), codebook)

    def parameters(self) -> Arrays:
        return {"scales": self.scales}

    def with_parameters(self, parameters: Arrays) -> Self:
        return replace(self, scales=checked_parameters(self.parameters(), parameters)["scales"])


def quantize_tcq_row(weight: Tensor, factor: HessianFactor, options: TcqRowOptions) -> TcqRowLinear:
    """Quantize `weight` (out, in) float32 for inputs with the hessian of `factor`.

    Columns are taken as they lie: the order of the factor cannot be followed by a stream.

    Raises:
        UnsupportedModel: the weights exceed what float16 scales can express.
        NativeUnavailableError: the native library is not installed.
    """
    weight = checked_weight(weight)
    codebook = codebook_of(options.bits, options.trellis_bits)
    hessian = factor.hessian.cpu()
    same = TcqOptions(options.bits, options.trellis_bits, scale_factor=options.scale_factor)
    scales = first_scales(weight, same)
    upper = factorize(hessian, 0.0, act_order=False).upper
    states = _sweep(weight, upper, scales[0], codebook, options)
    levels = torch.from_numpy(codebook.level_of(states)).float()
    best = refit_scales(weight, levels, np.zeros(weight.shape[1], np.int32), hessian)
    return TcqRowLinear(
        codes=codes_of(codebook, states),
        scales=rounded_scales(best, scales).astype(np.float16),
        width=weight.shape[1],
        codebook=codebook,
    )


def _sweep(
    weight: Tensor,
    upper: Tensor,
    scales: Tensor,
    codebook: TrellisCodebook,
    options: TcqRowOptions,
) -> NDArray[np.int64]:
    """States (out, in) after every weight."""
    num_rows, num_columns = weight.shape
    remaining = weight.clone()
    states = np.empty((num_rows, num_columns), np.int64)
    starts = np.zeros(num_rows, np.uint16)
    importance = 1 / upper.diagonal()  # a column's error counts once divided by the diagonal
    for start in range(0, num_columns, options.step):
        stop = min(start + options.step, num_columns)
        window = slice(start, min(stop + options.look_ahead, num_columns))
        path = search_trellis(
            codebook.native(),
            (remaining[:, window] * importance[window]).numpy(),
            (scales[:, None] * importance[window]).numpy(),
            starts,
        )[:, : stop - start]
        states[:, start:stop] = path
        starts = np.ascontiguousarray(path[:, -1])
        values = scales[:, None] * torch.from_numpy(codebook.level_of(states[:, start:stop]))
        _push_on(remaining, values, upper, slice(start, stop))
    return states


def _push_on(remaining: Tensor, values: Tensor, upper: Tensor, step: slice) -> None:
    """Take the step's error, as the inverse of U's diagonal block weighs it, off what follows."""
    errors = torch.linalg.solve_triangular(
        upper[step, step], remaining[:, step] - values, upper=True, left=False
    )
    remaining[:, step.stop :].addmm_(errors, upper[step, step.stop :], alpha=-1)
