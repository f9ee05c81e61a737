"""Lattice symbols to a rANS stream under static tables, codes of equal weight as a set.

An order of equal weights says nothing, so none is paid for. The partition comes first and tells
which slots hold equal weights; their codes, ascending, are coded as draws from one table p without
order: with r codes of a set to come and a the last one, the next is b > a with a share in
proportion to p_b * e_(r-1)(p_(b+1), p_(b+2), ...), e being elementary symmetric polynomials. For
two codes that makes 2H - 1 bits and a little less, H the entropy of p, since codes of a set differ.

Tables and symbols are those of `lattice_symbols`; position 0 and 2.. hold p for the set that
begins there. Shares beyond a are the table's own frequencies over their sum, cut to whole 65536ths
by the floor of their cumulative sums: each keeps at least one, because the sum is 65536 at most.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
from numpy.typing import NDArray

from scq.bitstream import rans
from scq.errors import CorruptCodes
from scq.lattice import LatticeCode
from scq.quantizers.coding import Ints, SymbolTables, check_symbols, fit_row
from scq.quantizers.lattice_symbols import partitions

_PATTERN = 1


@dataclass(frozen=True)
class _Sets:
    """By partition and slot (P, s): the set's first slot, and its codes from this one on, 0 for
    slots that are not used."""

    first: Ints
    left: Ints


@functools.lru_cache(maxsize=32)
def _sets(code: LatticeCode) -> _Sets:
    parts = partitions(code).parts
    equal = (parts[:, :, None] == parts[:, None, :]) & (parts[:, :, None] > 0)
    later = np.triu(np.ones((code.max_support, code.max_support), np.bool_))
    return _Sets(equal.argmax(2), (equal & later).sum(2))


def fit_set_tables(symbols: Ints, alphabets: Sequence[int], code: LatticeCode) -> SymbolTables:
    """Frequencies of (N, s + 1) training symbols: partitions, and the codes of each set alike."""
    sets, rows = _sets(code), [np.empty(0, np.int64)] * len(alphabets)
    rows[_PATTERN] = fit_row(symbols[:, _PATTERN], alphabets[_PATTERN])
    pattern = symbols[:, _PATTERN]
    for first in range(code.max_support):
        members = [
            symbols[(sets.left[pattern, slot] > 0) & (sets.first[pattern, slot] == first)]
            [:, _column(slot)]
            for slot in range(first, code.max_support)
        ]  # fmt: skip
        rows[_column(first)] = fit_row(np.concatenate(members), code.num_codes)
    return SymbolTables(tuple(rows))


def pack_sets(symbols: Ints, tables: SymbolTables, code: LatticeCode) -> bytes:
    """(N, s + 1) symbols as one rANS stream.

    Raises CorruptCodes for symbols outside their alphabets or equal weights out of order.
    """
    check_symbols(symbols, [len(row) for row in tables.frequencies])
    intervals: list[rans.Interval] = []
    for draw in _draws(symbols, tables, code):
        starts, widths = draw.starts[draw.coded], draw.widths[draw.coded]
        intervals.extend(zip(starts.tolist(), widths.tolist(), strict=True))
    return rans.encode_intervals(intervals)


def set_bits(symbols: Ints, tables: SymbolTables, code: LatticeCode) -> NDArray[np.float64]:
    """(N,) bits of each latent's symbols under the tables."""
    total = np.zeros(len(symbols))
    for draw in _draws(symbols, tables, code):
        total[draw.rows] += 16 - np.log2(draw.widths)
    return total


def unpack_sets(data: bytes, count: int, tables: SymbolTables, code: LatticeCode) -> Ints:
    """Inverse of `pack_sets` for `count` latents. Raises CorruptCodes."""
    symbols = np.zeros((count, len(tables.frequencies)), np.int64)
    decoder, sets = rans.Decoder(data), _sets(code)
    cumulative = _cumulate(tables.frequencies[_PATTERN]).tolist()
    symbols[:, _PATTERN] = [decoder.read(cumulative) for _ in range(count)]
    pattern = symbols[:, _PATTERN]
    for slot in range(code.max_support):
        shares = _Shares(tables)
        for row in np.flatnonzero(sets.left[pattern, slot]).tolist():
            first, left = int(sets.first[pattern[row], slot]), int(sets.left[pattern[row], slot])
            begin = int(symbols[row, _column(slot - 1)]) + 1 if slot > first else 0
            if code.num_codes - begin < left:
                raise CorruptCodes(f"latent {row} has no code left for slot {slot}")
            rest = _Rest(shares.of(first, left), begin)
            symbols[row, _column(slot)] = begin + decoder.read(rest)
    decoder.close()
    return symbols


def _column(slot: int) -> int:
    """Where the code of a slot stands among the symbols."""
    return slot + 1 if slot else 0


def _cumulate(frequencies: Ints) -> Ints:
    cumulative: Ints = np.concatenate(([0], np.cumsum(frequencies)))
    return cumulative


class _Shares:
    """Cumulative frequencies of the next code of a set, by first slot and codes to come."""

    def __init__(self, tables: SymbolTables) -> None:
        self._tables = tables
        self._known: dict[tuple[int, int], Ints] = {}

    def of(self, first: int, left: int) -> Ints:
        if (first, left) not in self._known:
            row = self._tables.frequencies[_column(first)]
            if left > 1:
                row = rans.quantize_frequencies((row * _suffix_polynomial(row, left - 1))[None])[0]
            self._known[first, left] = _cumulate(row)
        return self._known[first, left]


def _suffix_polynomial(row: Ints, degree: int) -> NDArray[np.float64]:
    """e_degree of the shares behind each entry: sums over all sets of that many of them."""
    shares = row / rans.TOTAL
    values = np.ones(len(row) + 1)
    for _ in range(degree):
        terms = shares * values[1:]
        values = np.append(np.cumsum(terms[::-1])[::-1], 0.0)
    return values[1:]


@dataclass(frozen=True)
class _Draw:
    """One symbol of some latents: their rows, slots of the stream, and which are coded at all."""

    rows: Ints
    starts: Ints
    widths: Ints
    coded: NDArray[np.bool_]


def _draws(symbols: Ints, tables: SymbolTables, code: LatticeCode) -> Iterator[_Draw]:
    """Everything that is coded, in the order of the stream."""
    sets, pattern, shares = _sets(code), symbols[:, _PATTERN], _Shares(tables)
    yield _draw(np.arange(len(symbols)), pattern, _cumulate(tables.frequencies[_PATTERN]), None)
    for slot in range(code.max_support):
        used = np.flatnonzero(sets.left[pattern, slot])
        first, left = sets.first[pattern[used], slot], sets.left[pattern[used], slot]
        pieces = [
            _slot_draw(symbols, used[(first == f) & (left == g)], slot, (f, shares.of(f, g)))
            for f, g in sorted(set(zip(first.tolist(), left.tolist(), strict=True)))
        ]
        yield _merged(pieces, used)


def _slot_draw(symbols: Ints, rows: Ints, slot: int, source: tuple[int, Ints]) -> _Draw:
    first, cumulative = source
    begins = symbols[rows, _column(slot - 1)] + 1 if slot > first else None
    names = symbols[rows, _column(slot)]
    if begins is not None and (names < begins).any():
        raise CorruptCodes("codes of equal weight must be in ascending order, each once")
    return _draw(rows, names, cumulative, begins)


def _draw(rows: Ints, names: Ints, cumulative: Ints, begins: Ints | None) -> _Draw:
    begins = np.zeros_like(names) if begins is None else begins
    base, end = cumulative[begins], cumulative[-1]
    starts = (cumulative[names] - base) * rans.TOTAL // (end - base)
    ends = (cumulative[names + 1] - base) * rans.TOTAL // (end - base)
    return _Draw(rows, starts, ends - starts, len(cumulative) - 1 - begins > 1)


def _merged(pieces: Sequence[_Draw], rows: Ints) -> _Draw:
    """The draws of all kinds of sets at one slot, by latent."""
    if not pieces:
        empty = np.empty(0, np.int64)
        return _Draw(empty, empty, empty, np.empty(0, np.bool_))
    order = np.argsort(np.concatenate([piece.rows for piece in pieces]), kind="stable")
    starts, widths, coded = (
        np.concatenate([getattr(piece, name) for piece in pieces])[order]
        for name in ("starts", "widths", "coded")
    )
    return _Draw(rows, starts, widths, coded)


class _Rest(Sequence[int]):
    """Cumulative frequencies from code `begin` on, over their sum; what `rans.Decoder` reads by."""

    def __init__(self, cumulative: Ints, begin: int) -> None:
        self._cumulative, self._begin = cumulative, begin
        self._base = int(cumulative[begin])
        self._sum = int(cumulative[-1]) - self._base

    def __len__(self) -> int:
        return len(self._cumulative) - self._begin

    @overload
    def __getitem__(self, place: int) -> int: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[int]: ...
    def __getitem__(self, place: int | slice) -> int | Sequence[int]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        entry = int(self._cumulative[self._begin + place])
        return (entry - self._base) * rans.TOTAL // self._sum
