"""Moves a weight towards the full-precision outputs before it is quantized.

The inputs Xq of a linear come from quantized layers before it; what its outputs should be is W Xfp.
The least-squares answer is W + W (Xfp - Xq)' Xq (Xq' Xq)^-1 for rows as samples, the asymmetric
calibration of GPTAQ (Li et al., 2025) and Qronos; a part `alpha` of the step is taken, because the
whole step overfits the calibration text. Knows no model and no method.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vqllm.quantization.hessian import HessianFactor
from vqllm.quantization.products import multiply, multiply_rows

_ROWS, _COLUMNS = 1024, 2048


class CrossMoment:
    """Running W (Xfp - Xq)' Xq of the linears that share an input, float64.

    Kept as (Xfp - Xq)' Xq where the outputs outnumber the inputs, else per linear: whichever is
    smaller, and cheaper to count.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        """`weights` (out, in) by part, in full precision."""
        self._weights = weights
        shapes = {part: weight.shape for part, weight in weights.items()}
        num_columns = next(iter(shapes.values()))[1]
        self._is_shared = num_columns <= sum(shape[0] for shape in shapes.values())
        if self._is_shared:
            shapes = {"": torch.Size((num_columns, num_columns))}
        self._sums = {part: torch.zeros(s, dtype=torch.float64) for part, s in shapes.items()}

    def add(self, reference: Tensor, inputs: Tensor) -> None:
        """Count rows (n, in) of the full-precision and of the quantized stream."""
        difference = reference - inputs
        for part, total in self._sums.items():
            left = difference if self._is_shared else multiply(difference, self._weights[part])
            total += multiply_rows(left, inputs)

    def merge(self, other: CrossMoment) -> None:
        """Count the rows of `other` as well."""
        for part, total in self._sums.items():
            total += other._sums[part]

    def of(self, part: str, rows: slice | Tensor = slice(None)) -> Tensor:
        """(out, in) float64 for one linear, or some of its rows."""
        if self._is_shared:
            return self._weights[part][rows].double() @ self._sums[""]
        return self._sums[part][rows]


def corrected(weight: Tensor, moment: Tensor, factor: HessianFactor, alpha: float) -> Tensor:
    """W + alpha * moment * H^-1, computed in float64, as float32.

    Args:
        weight: (out, in) float32.
        moment: (out, in) float64, what `CrossMoment.of` gives.
        factor: of the damped hessian H, on the same scale as the moment.
    """
    result = torch.empty_like(weight)
    for start in range(0, weight.shape[0], _ROWS):
        rows = slice(start, start + _ROWS)
        step = _solved(moment[rows][:, factor.order], factor.upper)
        fresh = weight[rows].double()
        fresh[:, factor.order] += alpha * step
        result[rows] = fresh
    return result


def _solved(moment: Tensor, upper: Tensor) -> Tensor:
    """moment * U' * U, without a float64 copy of the whole of U."""
    step = torch.zeros_like(moment)
    for start in range(0, len(upper), _COLUMNS):
        block = upper[start : start + _COLUMNS, start:].double()
        step[:, start:] += (moment[:, start:] @ block.T) @ block
    return step
