"""Error feedback along the input columns, for any quantizer of a block of columns.

Frantar et al., "GPTQ", algorithm 1: the error of a column, divided by the diagonal of U, is pushed
onto the columns that come later; inside a block natively, onto the rest by one matrix product.

Knows no method: a coder turns a block into codes and errors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vqkernels.trellis import Sweep
from vqllm.quantization.hessian import HessianFactor

Coder = Callable[[Sweep], tuple[NDArray[np.uint8], NDArray[np.float32]]]

COLUMN_BLOCK = 64


@dataclass(frozen=True, eq=False)
class Grid:
    """Scales of a layer while it is being quantized.

    Attributes:
        scales: float32 (groups, out).
        groups: int32 (in,), the row of `scales` of every column.
        column_scales: float32 (in,) or None.
    """

    scales: NDArray[np.float32]
    groups: NDArray[np.int32]
    column_scales: NDArray[np.float32] | None = None


def sweep_columns(
    weight: Tensor, factor: HessianFactor | None, grid: Grid, coder: Coder
) -> NDArray[np.uint8]:
    """Codes (in, width) of a weight (out, in) float32; without a factor there is no feedback."""
    num_columns = weight.shape[1]
    order = torch.arange(num_columns) if factor is None else factor.order.cpu()
    remaining = weight.detach().cpu().T[order].contiguous()
    upper = None if factor is None else factor.upper.cpu()
    positions = order.numpy()
    codes: list[NDArray[np.uint8]] = []
    for start in range(0, num_columns, COLUMN_BLOCK):
        block = slice(start, min(start + COLUMN_BLOCK, num_columns))
        block_codes, errors = coder(_block(remaining, upper, grid, positions, block))
        codes.append(block_codes)
        if upper is not None and block.stop < num_columns:
            later = upper[block, block.stop :].T
            remaining[block.stop :].addmm_(later, torch.from_numpy(errors), alpha=-1)
    restored = np.empty((num_columns, codes[0].shape[1]), np.uint8)
    restored[positions] = np.concatenate(codes)
    return restored


def _block(
    remaining: Tensor,
    upper: Tensor | None,
    grid: Grid,
    positions: NDArray[np.int64],
    block: slice,
) -> Sweep:
    column_scales = grid.column_scales
    return Sweep(
        columns=remaining[block].numpy(),
        scales=grid.scales,
        groups=np.ascontiguousarray(grid.groups[positions[block]]),
        factor=None if upper is None else upper[block, block].contiguous().numpy(),
        column_scales=None if column_scales is None else column_scales[positions[block]],
    )


def refit_scales(
    weight: Tensor, steps: Tensor, groups: NDArray[np.int32], hessian: Tensor
) -> Tensor:
    """Scales (groups, out) that minimize tr(D H D') for D = weight - scales * steps.

    Rows are independent least-squares problems with one unknown per group of columns: the normal
    matrix of row r is A[g, h] = steps[r, g] H[g, h] steps[r, h]', the right side
    steps[r, g] H[g, :] weight[r, :]'. A tiny ridge keeps groups of zeros solvable (their scale
    stays 0).

    Args:
        weight, steps: float32 (out, in): what is to be met, and the levels times column scales.
        groups: int32 (in,), each a run of neighbouring columns.
        hessian: (in, in).
    """
    gram = hessian.to(weight.dtype)
    bounds = _bounds(groups)
    right = _sum_groups(steps * (weight @ gram), bounds)
    normal = torch.empty(weight.shape[0], len(bounds), len(bounds), dtype=torch.float64)
    for group, (start, stop) in enumerate(bounds):
        later = [(begin - start, end - start) for begin, end in bounds[group:]]
        products = (steps[:, start:stop] @ gram[start:stop, start:]).mul_(steps[:, start:])
        normal[:, group, group:] = _sum_groups(products, later)
        normal[:, group:, group] = normal[:, group, group:]
    diagonal = normal.diagonal(dim1=1, dim2=2)
    diagonal += diagonal * 1e-9 + torch.finfo(torch.float32).tiny
    solution: Tensor = torch.linalg.solve(normal, right)
    return solution.T.float()


def _bounds(groups: NDArray[np.int32]) -> list[tuple[int, int]]:
    """First column of every group and of what follows it."""
    starts = np.flatnonzero(np.diff(groups, prepend=-1)).tolist()
    return list(zip(starts, [*starts[1:], len(groups)], strict=True))


def _sum_groups(values: Tensor, bounds: list[tuple[int, int]]) -> Tensor:
    """Sums over runs of columns, (rows, runs) float64."""
    return torch.stack([values[:, begin:end].sum(1) for begin, end in bounds], 1).double()
