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


class CrossMoment:
    """Running W (Xfp - Xq)' Xq / n of the linears that share an input, float64.

    Kept as (Xfp - Xq)' Xq where the outputs outnumber the inputs, else per linear: whichever is
    smaller, and cheaper to count.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        """`weights` (out, in) by part, in full precision."""
        self._weights = weights
        num_columns = next(iter(weights.values())).shape[1]
        self._is_shared = num_columns <= sum(weight.shape[0] for weight in weights.values())
        shapes = {part: tuple(weight.shape) for part, weight in weights.items()}
        if self._is_shared:
            shapes = {"": (num_columns, num_columns)}
        self._sums = {part: torch.zeros(s, dtype=torch.float64) for part, s in shapes.items()}
        self._num_rows = 0

    def add(self, reference: Tensor, inputs: Tensor) -> None:
        """Count rows (n, in) of the full-precision and of the quantized stream."""
        self._num_rows += inputs.shape[0]
        difference = reference - inputs
        for part, total in self._sums.items():
            left = difference if self._is_shared else difference @ self._weights[part].T
            total += left.T @ inputs

    def merged(self, other: CrossMoment) -> CrossMoment:
        """Over the rows of both."""
        result = CrossMoment(self._weights)
        result._sums = {part: total + other._sums[part] for part, total in self._sums.items()}
        result._num_rows = self._num_rows + other._num_rows
        return result

    def of(self, part: str) -> Tensor:
        """(out, in) float64 for one linear."""
        num_rows = max(self._num_rows, 1)
        if self._is_shared:
            return self._weights[part].double() @ self._sums[""] / num_rows
        return self._sums[part] / num_rows


def corrected(weight: Tensor, moment: Tensor, factor: HessianFactor, alpha: float) -> Tensor:
    """W + alpha * moment * H^-1, computed in float64, as float32.

    Args:
        weight: (out, in) float32.
        moment: (out, in) float64, what `CrossMoment.of` gives.
        factor: of the damped hessian H of the quantized stream.
    """
    if alpha == 0:
        return weight
    upper = factor.upper.double()
    step = moment[:, factor.order] @ upper.T @ upper
    result = weight.double()
    result[:, factor.order] += alpha * step
    return result.float()
