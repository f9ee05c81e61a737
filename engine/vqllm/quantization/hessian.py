"""Second moments of a linear layer's inputs, and the factor that error feedback needs of them.

Knows no model and no method.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vqllm.errors import CalibrationError


class Hessian:
    """Running Gram matrix X'X / n of one layer's inputs.

    Products are float32 over a few thousand rows, sums are float64: float32 sums over a whole
    calibration set lose the small eigenvalues that the Cholesky factor lives on.
    """

    def __init__(self, num_columns: int) -> None:
        self._sum = torch.zeros(num_columns, num_columns, dtype=torch.float64)
        self._num_rows = 0

    def add(self, inputs: Tensor) -> None:
        """Count inputs of shape (..., num_columns)."""
        rows = inputs.flatten(0, -2)
        self._sum += rows.T @ rows
        self._num_rows += rows.shape[0]

    def merged(self, other: Hessian) -> Hessian:
        """Over the rows of both."""
        result = Hessian(self._sum.shape[0])
        result._sum = self._sum + other._sum
        result._num_rows = self._num_rows + other._num_rows
        return result

    @property
    def value(self) -> Tensor:
        """(in, in) float64; zeros where nothing was counted."""
        return self._sum / max(self._num_rows, 1)


@dataclass(frozen=True)
class HessianFactor:
    """A damped hessian with the factor of its inverse, columns in the order of the sweep.

    Attributes:
        hessian: (in, in) float64, damped, in the order of the weight's columns.
        order: (in,) int64, the column visited at each step.
        upper: (in, in) float32 upper triangular U with inverse(H[order][:, order]) = U' U.
    """

    hessian: Tensor
    order: Tensor
    upper: Tensor


def factorize(hessian: Tensor, damping: float, act_order: bool = True) -> HessianFactor:
    """Damp, order and factor a hessian (in, in) float64.

    `damping` is the part of the mean diagonal that is added to the diagonal. With `act_order`
    columns are visited by falling diagonal. Inputs that never fired get a diagonal of one.

    Raises:
        CalibrationError: the hessian is not finite or cannot be factored.
    """
    damped = _damped(hessian, damping)
    diagonal = damped.diagonal()
    order = torch.arange(len(diagonal))
    if act_order:
        order = torch.argsort(diagonal, descending=True, stable=True)
    return HessianFactor(damped, order, _inverse_cholesky(damped[order][:, order]))


def _damped(hessian: Tensor, damping: float) -> Tensor:
    if not torch.isfinite(hessian).all():
        raise CalibrationError("the hessian holds NaN or infinite values")
    hessian = hessian.double().clone()
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1.0
    diagonal += damping * diagonal.mean()
    return hessian


def _inverse_cholesky(hessian: Tensor) -> Tensor:
    """Upper U with inverse(H) = U' U, float32: the Cholesky form of GPTQ (Frantar et al.).

    With J the reversal of rows and L L' = J H J, inverse(H) is U' U for U = J inverse(L) J: one
    factorization and one triangular inverse, and no inverse of H itself.
    """
    lower, info = torch.linalg.cholesky_ex(hessian.flip(0, 1))
    if int(info):
        raise CalibrationError(
            "the hessian is not positive definite; use more calibration text or more damping"
        )
    identity = torch.eye(len(lower), dtype=lower.dtype)
    inverse = torch.linalg.solve_triangular(lower, identity, upper=False)
    upper: Tensor = inverse.flip(0, 1).float()
    return upper
