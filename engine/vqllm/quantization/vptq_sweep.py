"""Choosing indices: the sweep with error feedback, and coordinate descent after it.

The problem: make tr((W - Q) H (W - Q)') small over the indices of Q, Q[:, j] = scale_j * table
values + bias_j. Feedback along the columns is that of GPTQ (Frantar et al., 2023): the error of a
column, divided by its diagonal entry of U, is taken back in the columns still to come. Because
scales stay outside of the tables, the hessian that counts inside of them is S H S, and its factor
is U S^-1: the sweep here divides the column by its scale and leaves H and U as they are, which is
the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vqllm.quantization.hessian import HessianFactor
from vqllm.quantization.vptq_tables import Searcher, Table, looked_up, padded_rows

COLUMN_BLOCK = 64


@dataclass
class Assignment:
    """Tables with the scales, biases and indices of one linear; weights are kept transposed.

    Attributes:
        tables: every column is in exactly one.
        scales, biases: (in,) float32 holding float16 values.
        num_rows: outputs.
        main, residual: per table int64 (columns, vectors); residual None without a codebook.
    """

    tables: list[Table]
    scales: Tensor
    biases: Tensor
    num_rows: int
    main: list[Tensor]
    residual: list[Tensor | None]

    @classmethod
    def empty(cls, tables: list[Table], scales: Tensor, biases: Tensor, rows: int) -> Assignment:
        """No indices yet, all zero."""
        shapes = [(len(t.columns), padded_rows(rows, t.vector_length)) for t in tables]
        device = scales.device
        main = [torch.zeros(shape, dtype=torch.int64, device=device) for shape in shapes]
        residual = [
            None if table.residual is None else torch.zeros_like(codes)
            for table, codes in zip(tables, main, strict=True)
        ]
        return cls(tables, scales, biases, rows, main, residual)

    def table_values(self) -> Tensor:
        """(in, out): what the tables give, before scales and biases."""
        values = self.scales.new_empty(len(self.scales), self.num_rows)
        for table, main, residual in zip(self.tables, self.main, self.residual, strict=True):
            values[table.columns] = looked_up(table, (main, residual), self.num_rows)
        return values

    def weights(self) -> Tensor:
        """(in, out): the quantized weight, transposed."""
        return self.table_values() * self.scales[:, None] + self.biases[:, None]

    def places(self) -> list[tuple[int, int]]:
        """Of every column: its table, and its row in that table's indices."""
        found = [(0, 0)] * len(self.scales)
        for number, table in enumerate(self.tables):
            for row, column in enumerate(table.columns.tolist()):
                found[column] = (number, row)
        return found


class _Columns:
    """Quantizes single columns into an assignment."""

    def __init__(self, state: Assignment, beam: int) -> None:
        self._state = state
        self._searchers = [Searcher(table, state.num_rows, beam) for table in state.tables]
        self._places = state.places()
        self._scales, self._biases = state.scales.tolist(), state.biases.tolist()

    def quantize(self, column: int, target: Tensor) -> Tensor:
        """Store the indices that come nearest to `target` (out,); return what they stand for."""
        state = self._state
        number, row = self._places[column]
        scale, bias = self._scales[column], self._biases[column]
        (main, residual), values = self._searchers[number].search((target - bias) / scale)
        state.main[number][row] = main
        stored = state.residual[number]
        if residual is not None and stored is not None:
            stored[row] = residual
        found: Tensor = values * scale + bias
        return found


def sweep(weight: Tensor, factor: HessianFactor, state: Assignment, beam: int = 8) -> None:
    """Choose all indices of `state` for `weight` transposed (in, out), with error feedback."""
    columns = _Columns(state, beam)
    order, upper = factor.order.tolist(), factor.upper
    remaining = weight[factor.order].contiguous()
    for start in range(0, len(order), COLUMN_BLOCK):
        stop = min(start + COLUMN_BLOCK, len(order))
        errors = torch.empty_like(remaining[start:stop])
        for i in range(start, stop):
            found = columns.quantize(order[i], remaining[i])
            errors[i - start] = (remaining[i] - found) / upper[i, i]
            remaining[i + 1 : stop].addr_(upper[i, i + 1 : stop], errors[i - start], alpha=-1)
        remaining[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)


def descend(weight: Tensor, hessian: Tensor, state: Assignment, beam: int = 8) -> None:
    """One pass of coordinate descent: every column again, given all the others.

    Never raises the error beyond rounding (the old entry is among the candidates of the search
    for a single codebook).
    """
    columns = _Columns(state, beam)
    current = state.weights()
    pull = hessian @ (weight - current)
    diagonal = hessian.diagonal().tolist()
    for start in range(0, len(diagonal), COLUMN_BLOCK):
        stop = min(start + COLUMN_BLOCK, len(diagonal))
        changes = torch.zeros_like(current[start:stop])
        near, block = pull[start:stop].clone(), hessian[start:stop, start:stop]
        for i in range(stop - start):
            old = current[start + i]
            target = old + near[i] / diagonal[start + i]
            changes[i] = columns.quantize(start + i, target) - old
            near[i + 1 :].addr_(block[i + 1 :, i], changes[i], alpha=-1)
        pull.addmm_(hessian[:, start:stop], changes, alpha=-1)
        current[start:stop] += changes
