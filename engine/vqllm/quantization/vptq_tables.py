"""The codebooks of one linear while it is being quantized, and the search for the best entry.

Columns of the weight belong to tables: one for the outliers, one per group. A table turns a column
into indices of its codebooks and back. Knows tensors only, no hessian and no file.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vqllm.quantization.vptq_kmeans import lowest

Codes = tuple[Tensor, Tensor | None]


@dataclass
class Table:
    """Main and residual codebook of some columns, float32 holding float16 values.

    Attributes:
        columns: int64, the columns of the weight that use it, in the order they are stored.
        main: (k, v).
        residual: (kr, v) or None.
    """

    columns: Tensor
    main: Tensor
    residual: Tensor | None = None

    @property
    def vector_length(self) -> int:
        return int(self.main.shape[1])


class Searcher:
    """Nearest entry of a table for the vectors of one column; prepares what does not change.

    With a residual codebook the `beam` nearest main entries are tried, each with its best residual
    entry; a beam of 1 is the greedy search.
    """

    def __init__(self, table: Table, num_rows: int, beam: int) -> None:
        self._table, self._num_rows = table, num_rows
        self._beam = min(beam, len(table.main))
        self._main_norms = table.main.square().sum(1)
        self._main_t = table.main.T.contiguous()
        self._padding = -num_rows % table.vector_length
        if table.residual is not None:
            self._residual_norms = table.residual.square().sum(1)
            self._residual_t = table.residual.T.contiguous()

    def search(self, column: Tensor) -> tuple[Codes, Tensor]:
        """Indices of the best entries for a column (num_rows,), and the column they stand for."""
        vectors = self._vectors(column)
        table = self._table
        scores = torch.addmm(self._main_norms, vectors, self._main_t, alpha=-2)
        self._forget_padding(scores, table.main)
        if table.residual is None:
            main = lowest(scores)
            return (main, None), table.main[main].reshape(-1)[: self._num_rows]
        main, residual = self._search_pairs(vectors, scores, table.residual)
        found = table.main[main] + table.residual[residual]
        return (main, residual), found.reshape(-1)[: self._num_rows]

    def _vectors(self, column: Tensor) -> Tensor:
        if self._padding:
            column = torch.nn.functional.pad(column, (0, self._padding))
        return column.view(-1, self._table.vector_length)

    def _forget_padding(self, scores: Tensor, entries: Tensor) -> None:
        """Rows beyond the end of the weight do not count."""
        if self._padding:
            scores[-1] -= entries[:, -self._padding :].square().sum(1)

    def _search_pairs(
        self, vectors: Tensor, scores: Tensor, residuals: Tensor
    ) -> tuple[Tensor, Tensor]:
        best = torch.topk(scores, self._beam, largest=False, sorted=False)
        rest = vectors[:, None] - self._table.main[best.indices]
        if self._padding:
            rest[-1, :, -self._padding :] = 0
        flat = rest.flatten(0, 1)
        pair_scores = torch.addmm(self._residual_norms, flat, self._residual_t, alpha=-2)
        if self._padding:
            pair_scores[-self._beam :] -= residuals[:, -self._padding :].square().sum(1)
        entries = lowest(pair_scores)
        nearest = pair_scores.gather(1, entries[:, None]).view(-1, self._beam)
        winner = lowest(nearest + rest.square().sum(2))[:, None]
        main = best.indices.gather(1, winner)[:, 0]
        return main, entries.view(-1, self._beam).gather(1, winner)[:, 0]


def padded_rows(num_rows: int, vector_length: int) -> int:
    """Vectors per column."""
    return -(-num_rows // vector_length)


def looked_up(table: Table, codes: Codes, num_rows: int) -> Tensor:
    """Columns (columns of the table, num_rows) that codes (columns, vectors) stand for."""
    main, residual = codes
    values = table.main[main]
    if table.residual is not None and residual is not None:
        values = values + table.residual[residual]
    return values.flatten(1)[:, :num_rows]
