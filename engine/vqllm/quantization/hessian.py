"""Second moments of a linear layer's inputs, and the factor that error feedback needs of them.

Knows no model and no method.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vqllm.errors import CalibrationError
from vqllm.quantization.products import multiply_rows
from vqllm.quantization.triangular import cholesky_, invert_lower_, permute_

BLOCKED_FROM = 6144
_BLOCK = 512


class Hessian:
    """Running Gram matrix X'X of one layer's inputs.

    Products are float32 over a few thousand rows, sums are float64: float32 sums over a whole
    calibration set lose the small eigenvalues that the Cholesky factor lives on.
    """

    def __init__(self, num_columns: int) -> None:
        self._sum = torch.zeros(num_columns, num_columns, dtype=torch.float64)
        self.num_rows = 0

    def add(self, inputs: Tensor) -> None:
        """Count inputs of shape (..., num_columns)."""
        rows = inputs.flatten(0, -2)
        self._sum += multiply_rows(rows, rows)
        self.num_rows += rows.shape[0]

    def merge(self, other: Hessian) -> None:
        """Count the rows of `other` as well."""
        self._sum += other._sum
        self.num_rows += other.num_rows

    @property
    def total(self) -> Tensor:
        """X'X itself, (in, in) float64, not a copy."""
        return self._sum

    @property
    def value(self) -> Tensor:
        """X'X / n, (in, in) float64; zeros where nothing was counted."""
        return self._sum / max(self.num_rows, 1)


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


def factorize(
    hessian: Tensor, damping: float, act_order: bool = True, overwrite: bool = False
) -> HessianFactor:
    """Damp, order and factor a hessian (in, in) float64; its scale does not matter.

    `damping` is the part of the mean diagonal that is added to the diagonal. With `act_order`
    columns are visited by falling diagonal. Inputs that never fired get a diagonal of one. With
    `overwrite` the hessian is damped where it lies, and no second matrix of its size is made.

    Raises:
        CalibrationError: the hessian is not finite or cannot be factored.
    """
    damped = _damped(hessian if overwrite else hessian.double().clone(), damping)
    diagonal = damped.diagonal()
    order = torch.arange(len(diagonal))
    if act_order:
        order = torch.argsort(diagonal, descending=True, stable=True)
    is_large = len(diagonal) >= BLOCKED_FROM
    inverse_cholesky = _inverse_cholesky_blocked if is_large else _inverse_cholesky
    return HessianFactor(damped, order, inverse_cholesky(damped, order))


def _damped(hessian: Tensor, damping: float) -> Tensor:
    diagonal = hessian.diagonal()
    if not torch.isfinite(hessian.sum(0)).all():
        raise CalibrationError("the hessian holds NaN or infinite values")
    diagonal[diagonal == 0] = 1.0
    diagonal += damping * diagonal.mean()
    return hessian


def _inverse_cholesky(hessian: Tensor, order: Tensor) -> Tensor:
    """Upper U with inverse(H) = U' U, float32: the Cholesky form of GPTQ (Frantar et al.).

    With J the reversal of rows and L L' = J H J, inverse(H) is U' U for U = J inverse(L) J: one
    factorization and one triangular inverse, and no inverse of H itself.
    """
    backwards = order.flip(0)
    lower, info = torch.linalg.cholesky_ex(hessian[backwards[:, None], backwards])
    _check_definite(not int(info))
    identity = torch.eye(len(lower), dtype=lower.dtype)
    inverse = torch.linalg.solve_triangular(lower, identity, upper=False)
    upper: Tensor = inverse.float().flip(0, 1)
    return upper


def _inverse_cholesky_blocked(hessian: Tensor, order: Tensor, block: int = _BLOCK) -> Tensor:
    """The same with one float32 matrix of extra memory: works inside `hessian`, then restores it.

    The lower triangle is factored and inverted in place while the strict upper triangle and a copy
    of the diagonal blocks keep the hessian.
    """
    backwards = order.flip(0)
    permute_(hessian, backwards)
    starts = range(0, len(hessian), block)
    diagonal_blocks = [hessian[i : i + block, i : i + block].clone() for i in starts]
    is_definite = cholesky_(hessian, block)
    if is_definite:
        invert_lower_(hessian, block)
        upper = _flipped_lower(hessian, block)
    for start, original in zip(starts, diagonal_blocks, strict=True):
        stop = start + len(original)
        hessian[start:stop, start:stop] = original
        hessian[stop:, start:stop] = hessian[start:stop, stop:].T
    permute_(hessian, torch.argsort(backwards))
    _check_definite(is_definite)
    return upper


def _flipped_lower(matrix: Tensor, block: int) -> Tensor:
    """J L J of the lower block triangle L, float32."""
    size = len(matrix)
    upper = torch.zeros(size, size)
    for start in range(0, size, block):
        stop = min(start + block, size)
        rows = matrix[start:stop, :stop].float().flip(0, 1)
        upper[size - stop : size - start, size - stop :] = rows
    return upper


def _check_definite(is_definite: bool) -> None:
    if not is_definite:
        raise CalibrationError(
            "the hessian is not positive definite; use more calibration text or more damping"
        )
