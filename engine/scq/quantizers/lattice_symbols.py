"""Lattice assignments as symbols for static tables, and as one exact rank for RAW mode.

Symbols of an assignment, S = max_support + 1: the heaviest index; the weights as a partition of
the denominator (largest part first), which also tells how many codes there are; the other indices
in descending weight. Equal weights stand in ascending index order. Absent indices are 0.

Rank: supports of t codes come before those of t + 1; among them, colexicographic subset rank
times C(n-1, t-1) plus colexicographic composition rank. Every number below `num_states` is the
rank of exactly one assignment, so that RAW mode wastes no fraction of a bit on order.

Knows nothing of frames; the SCQ1 bitstream has symbols and ranks of its own.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from scq.errors import CorruptCodes
from scq.lattice import LatticeAssignment, LatticeCode
from scq.quantizers.coding import Bools, Ints
from scq.subsets import Ranks, binomials, subset_ranks, subsets_of


@dataclass(frozen=True)
class Partitions:
    """parts (P, s): each way to split the denominator, largest first, zeros behind; sizes (P,)."""

    parts: Ints
    sizes: Ints
    number: dict[tuple[int, ...], int]


@functools.lru_cache(maxsize=32)
def partitions(code: LatticeCode) -> Partitions:
    """All partitions of the denominator into at most max_support parts, fewer parts first."""
    rows = [
        (*split, *(0,) * (code.max_support - size))
        for size in range(1, code.max_support + 1)
        for split in _splits(code.denominator, size, code.denominator)
    ]
    parts = np.array(rows, np.int64)
    return Partitions(parts, (parts > 0).sum(1), {row: i for i, row in enumerate(rows)})


def to_symbols(assignment: LatticeAssignment, code: LatticeCode) -> Ints:
    """(N, s + 1) symbols of an assignment."""
    indices, numerators = _arrays(assignment)
    order = np.lexsort((indices, -numerators), axis=1)
    indices = np.take_along_axis(indices, order, 1)
    numerators = np.take_along_axis(numerators, order, 1)
    table = partitions(code)
    pattern = [table.number[tuple(row)] for row in numerators.tolist()]
    symbols = np.empty((len(indices), code.max_support + 1), np.int64)
    symbols[:, 0] = indices[:, 0]
    symbols[:, 1] = pattern
    symbols[:, 2:] = np.where(numerators[:, 1:] > 0, indices[:, 1:], 0)
    return symbols


def from_symbols(symbols: Ints, code: LatticeCode) -> LatticeAssignment:
    """Inverse of `to_symbols`. Raises CorruptCodes for a code named twice."""
    numerators = partitions(code).parts[symbols[:, 1]]
    indices = np.concatenate((symbols[:, :1], symbols[:, 2:]), axis=1)
    indices = np.where(numerators > 0, indices, indices[:, :1])
    for first in range(code.max_support):
        for second in range(first + 1, code.max_support):
            clash = (numerators[:, second] > 0) & (indices[:, first] == indices[:, second])
            if clash.any():
                raise CorruptCodes(f"latent {int(clash.argmax())} names the same code twice")
    return LatticeAssignment(torch.from_numpy(indices), torch.from_numpy(numerators))


def coded(position: int, symbols: Ints, code: LatticeCode) -> Bools:
    """Which latents transmit symbol `position`: other indices only where there are that many."""
    if position < 2:
        return np.ones(len(symbols), np.bool_)
    enough: Bools = partitions(code).sizes[symbols[:, 1]] >= position
    return enough


def to_ranks(assignment: LatticeAssignment, code: LatticeCode) -> list[int]:
    """Exact ranks in [0, num_states)."""
    indices, numerators = _arrays(assignment)
    ordered = np.where(numerators > 0, indices, code.num_codes)
    order = np.argsort(ordered, axis=1, kind="stable")
    ordered = np.take_along_axis(ordered, order, 1)
    numerators = np.take_along_axis(numerators, order, 1)
    tables = _rank_tables(code)
    ranks = np.empty(len(indices), tables.choose.dtype)
    sizes = (numerators > 0).sum(1)
    for size in range(1, code.max_support + 1):
        rows = np.flatnonzero(sizes == size)
        subset = subset_ranks(ordered[rows, :size], tables.choose)
        cuts = numerators[rows, : size - 1].cumsum(1) - 1
        within = subset * _compositions(code, size) + subset_ranks(cuts, tables.choose)
        ranks[rows] = tables.first[size - 1] + within
    listed: list[int] = ranks.tolist()
    return listed


def from_ranks(ranks: list[int], code: LatticeCode) -> LatticeAssignment:
    """Inverse of `to_ranks`, heaviest code first, ties by lower index."""
    tables = _rank_tables(code)
    values = np.array(ranks, tables.choose.dtype)
    sizes = np.searchsorted(np.array(tables.first, values.dtype), values, side="right")
    indices = np.full((len(values), code.max_support), code.num_codes, np.int64)
    numerators = np.zeros_like(indices)
    for size in range(1, code.max_support + 1):
        rows = np.flatnonzero(sizes == size)
        within = values[rows] - tables.first[size - 1]
        count = _compositions(code, size)
        indices[rows, :size] = subsets_of(within // count, size, tables.choose)
        cuts = subsets_of(within % count, size - 1, tables.choose)
        ends = np.full((len(rows), 1), code.denominator - 1)
        numerators[rows, :size] = np.diff(np.hstack((cuts, ends)), axis=1, prepend=-1)
    return _canonical(indices, numerators)


def _canonical(indices: Ints, numerators: Ints) -> LatticeAssignment:
    order = np.lexsort((indices, -numerators), axis=1)
    indices = np.take_along_axis(indices, order, 1)
    numerators = np.take_along_axis(numerators, order, 1)
    indices = np.where(numerators > 0, indices, indices[:, :1])
    return LatticeAssignment(torch.from_numpy(indices), torch.from_numpy(numerators))


def _arrays(assignment: LatticeAssignment) -> tuple[Ints, Ints]:
    indices = assignment.indices.cpu().numpy().astype(np.int64, copy=False)
    numerators = assignment.numerators.cpu().numpy().astype(np.int64, copy=False)
    return indices, numerators


def _splits(total: int, size: int, largest: int) -> Iterator[tuple[int, ...]]:
    """Partitions of `total` into `size` parts of at most `largest`, descending parts."""
    if size == 1:
        if total <= largest:
            yield (total,)
        return
    for head in range(min(largest, total - size + 1), 0, -1):
        for tail in _splits(total - head, size - 1, head):
            yield (head, *tail)


@dataclass(frozen=True)
class _RankTables:
    """choose[i, m] = C(i, m); first[t - 1]: lowest rank of supports of t codes."""

    choose: Ranks
    first: list[int]


@functools.lru_cache(maxsize=16)
def _rank_tables(code: LatticeCode) -> _RankTables:
    dtype = np.int64 if code.num_states < 2**62 else np.object_
    largest = max(code.num_codes, code.denominator)
    choose = binomials(largest, code.max_support, dtype)
    first = [0]
    for size in range(1, code.max_support):
        first.append(first[-1] + math.comb(code.num_codes, size) * _compositions(code, size))
    return _RankTables(choose, first)


def _compositions(code: LatticeCode, size: int) -> int:
    return math.comb(code.denominator - 1, size - 1)
