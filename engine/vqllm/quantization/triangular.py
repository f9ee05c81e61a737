"""Cholesky factor and triangular inverse inside the memory of a large matrix.

LAPACK through torch copies its argument; at 28,672 columns a float64 matrix is 6.6 GB. These work
block by block in place, at the speed of matrix products. Knows matrices only.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def cholesky_(matrix: Tensor, block: int) -> bool:
    """Replace the lower block triangle of a symmetric (n, n) float64 matrix by its factor L.

    Diagonal blocks become lower triangular with zeros above; blocks above the diagonal are not
    touched. Returns whether the matrix is positive definite; if not, the content is undefined.
    """
    size = len(matrix)
    for start in range(0, size, block):
        stop = min(start + block, size)
        factor, info = torch.linalg.cholesky_ex(matrix[start:stop, start:stop])
        if int(info):
            return False
        matrix[start:stop, start:stop] = factor
        panel = matrix[stop:, start:stop]
        panel.copy_(torch.linalg.solve_triangular(factor.T, panel, upper=True, left=False))
        for column in range(stop, size, block):
            end = min(column + block, size)
            left = panel[column - stop :]
            matrix[column:, column:end].addmm_(left, left[: end - column].T, alpha=-1)
    return True


def invert_lower_(matrix: Tensor, block: int) -> None:
    """Replace the lower block triangle L that `cholesky_` leaves by its inverse.

    Blocks above the diagonal are not touched.
    """
    size = len(matrix)
    for start in range(0, size, block):
        stop = min(start + block, size)
        diagonal = matrix[start:stop, start:stop]
        identity = torch.eye(stop - start, dtype=matrix.dtype)
        inverse = torch.linalg.solve_triangular(diagonal, identity, upper=False)
        row = matrix[start:stop, :start].clone()
        for column in range(0, start, block):
            end = column + block
            product = row[:, column:start] @ matrix[column:start, column:end]
            matrix[start:stop, column:end] = inverse @ product.neg_()
        diagonal.copy_(inverse)


def permute_(matrix: Tensor, order: Tensor, chunk: int = 512) -> None:
    """Replace a square matrix A by A[order][:, order], a few rows at a time."""
    for start in range(0, len(matrix), chunk):
        rows = matrix[start : start + chunk]
        rows.copy_(rows[:, order])
    for cycle in _cycles(order.tolist()):
        first = matrix[cycle[0]].clone()
        for target, source in pairwise(cycle):
            matrix[target] = matrix[source]
        matrix[cycle[-1]] = first


def _cycles(order: list[int]) -> list[list[int]]:
    """Cycles [i, order[i], order[order[i]], ...] longer than one."""
    seen, cycles = [False] * len(order), []
    for start in range(len(order)):
        cycle, index = [], start
        while not seen[index]:
            seen[index] = True
            cycle.append(index)
            index = order[index]
        if len(cycle) > 1:
            cycles.append(cycle)
    return cycles
