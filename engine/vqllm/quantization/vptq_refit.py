"""The best codebooks, scales and biases for fixed indices, in closed form.

With indices fixed the weight is linear in the codebooks, so tr((W - Q) H (W - Q)') has normal
equations; they are solved by conjugate gradients, whose one costly product is a matrix product with
H. Scales and biases of a block of columns have small normal equations, solved directly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vqllm.quantization.vptq_sweep import Assignment
from vqllm.quantization.vptq_tables import Table, padded_rows

NORM_BLOCK = 768  # columns whose scales and biases are solved for together
_RIDGE = 1e-4
_TINY = 1e-6  # of the mean diagonal, for entries that nothing uses


def refit_codebooks(weight: Tensor, hessian: Tensor, state: Assignment, num_steps: int = 4) -> None:
    """Move the codebooks of `state` towards their optimum for `weight` transposed (in, out)."""
    layout = _Layout(state)
    target = weight - state.weights()
    residue = layout.collect(hessian @ target)
    step = solve_cg(
        lambda change: layout.collect(hessian @ layout.spread(change)),
        residue,
        layout.diagonal(hessian),
        num_steps,
    )
    layout.move(step)


@dataclass(frozen=True)
class _Part:
    """One codebook of a table with the indices that use it."""

    table: Table
    codes: Tensor
    is_residual: bool

    @property
    def entries(self) -> Tensor:
        residual = self.table.residual
        return self.table.main if residual is None or not self.is_residual else residual

    def move(self, change: Tensor) -> None:
        """Change the entries, rounded to float16 as they are stored."""
        if self.is_residual:
            self.table.residual = rounded(self.entries + change)
        else:
            self.table.main = rounded(self.entries + change)


class _Layout:
    """All entries of all codebooks, and the linear map from them to the weight."""

    def __init__(self, state: Assignment) -> None:
        self._state = state
        self._parts: list[_Part] = []
        for table, main, residual in zip(state.tables, state.main, state.residual, strict=True):
            self._parts.append(_Part(table, main, False))
            if residual is not None:
                self._parts.append(_Part(table, residual, True))

    def spread(self, entries: list[Tensor]) -> Tensor:
        """The change of the weight (in, out) that a change of the entries makes."""
        state = self._state
        values = state.scales.new_zeros(len(state.scales), state.num_rows)
        for part, change in zip(self._parts, entries, strict=True):
            values[part.table.columns] += change[part.codes].flatten(1)[:, : state.num_rows]
        return values * state.scales[:, None]

    def collect(self, gradient: Tensor) -> list[Tensor]:
        """The transpose of `spread`: sums over every place where an entry is used."""
        scaled = gradient * self._state.scales[:, None]
        return [self._sum(scaled, part) for part in self._parts]

    def diagonal(self, hessian: Tensor) -> list[Tensor]:
        """Diagonal of the normal equations without the terms between columns, (k, 1) each."""
        weights = hessian.diagonal() * self._state.scales.square()
        found = []
        for part in self._parts:
            per_use = weights[part.table.columns][:, None].expand(part.codes.shape)
            total = weights.new_zeros(len(part.entries))
            total.index_add_(0, part.codes.flatten(), per_use.flatten())
            found.append(total[:, None] + _TINY * total.mean())
        return found

    def move(self, changes: list[Tensor]) -> None:
        for part, change in zip(self._parts, changes, strict=True):
            part.move(change)

    def _sum(self, gradient: Tensor, part: _Part) -> Tensor:
        rows, length = self._state.num_rows, part.table.vector_length
        values = gradient[part.table.columns]
        padding = padded_rows(rows, length) * length - rows
        if padding:
            values = torch.nn.functional.pad(values, (0, padding))
        total = torch.zeros_like(part.entries)
        return total.index_add_(0, part.codes.flatten(), values.reshape(-1, length))


def solve_cg(
    apply: Callable[[list[Tensor]], list[Tensor]],
    right: list[Tensor],
    diagonal: list[Tensor],
    num_steps: int,
) -> list[Tensor]:
    """Conjugate gradients from zero, preconditioned by a diagonal."""
    solution = [torch.zeros_like(part) for part in right]
    residue = [part.clone() for part in right]
    scaled = [r / d for r, d in zip(residue, diagonal, strict=True)]
    direction = scaled
    power = _dot(residue, scaled)
    for _ in range(num_steps):
        if power <= 0:
            break
        image = apply(direction)
        curvature = _dot(direction, image)
        if curvature <= 0:
            break
        alpha = power / curvature
        for part, step, rest, change in zip(solution, direction, residue, image, strict=True):
            part.add_(step, alpha=alpha)
            rest.sub_(change, alpha=alpha)
        scaled = [r / d for r, d in zip(residue, diagonal, strict=True)]
        power, before = _dot(residue, scaled), power
        ratio = power / before
        direction = [s + ratio * d for s, d in zip(scaled, direction, strict=True)]
    return solution


def _dot(left: list[Tensor], right: list[Tensor]) -> float:
    return sum(float((a.double() * b.double()).sum()) for a, b in zip(left, right, strict=True))


def refit_norms(weight: Tensor, hessian: Tensor, state: Assignment) -> None:
    """Move scales and biases to their optimum for `weight` transposed (in, out), block by block.

    A column's scale may change by a factor of two at most, so that no column collapses.
    """
    values = state.table_values()
    pull = hessian @ (weight - values * state.scales[:, None] - state.biases[:, None])
    scales, biases = state.scales.clone(), state.biases.clone()
    for start in range(0, len(scales), NORM_BLOCK):
        block = slice(start, start + NORM_BLOCK)
        step = _norm_step(values[block], hessian[block, block], pull[block])
        if step is None:
            continue
        old_scales, old_biases = scales[block].clone(), biases[block].clone()
        allowed = torch.maximum(old_scales / 2, torch.minimum(old_scales + step[0], 2 * old_scales))
        scales[block], biases[block] = rounded(allowed), rounded(old_biases + step[1])
        change = values[block] * (scales[block] - old_scales)[:, None]
        change += (biases[block] - old_biases)[:, None]
        pull.addmm_(hessian[:, block], change, alpha=-1)
    state.scales, state.biases = scales, biases


def _norm_step(values: Tensor, hessian: Tensor, pull: Tensor) -> tuple[Tensor, Tensor] | None:
    """Best changes of scales and biases (n,) of some columns, or None where there is no best."""
    num_columns, count = values.shape
    sums = values.sum(1)
    matrix = torch.cat(
        [
            torch.cat([hessian * (values @ values.T), hessian * sums[:, None]], 1),
            torch.cat([hessian * sums[None], hessian * count], 1),
        ]
    )
    diagonal = matrix.diagonal()
    diagonal += _RIDGE * diagonal + _TINY * diagonal.mean()
    lower, failed = torch.linalg.cholesky_ex(matrix)
    if int(failed):
        return None
    right = torch.cat([(values * pull).sum(1), pull.sum(1)])
    change = torch.cholesky_solve(right[:, None], lower)[:, 0]
    return change[:num_columns], change[num_columns:]


def rounded(values: Tensor) -> Tensor:
    """float32 values as float16 stores them."""
    return values.half().float()
