"""Range asymmetric numeral system: symbols under static integer frequencies to bytes and back.

State x of 32 bits, kept in [2^16, 2^32) between symbols; 16-bit words; frequencies in 1/65536.
A symbol that owns [start, start + f) of the 65536 slots is coded, last symbol first, by

    if x >= f * 2^16: push the word x mod 2^16, x = x div 2^16
    x = (x div f) * 2^16 + x mod f + start,                        from x = 2^16

A stream is the final state (4 bytes, little-endian), then the words (2 bytes each) last pushed
first: the order in which the decoder wants them. A stream of no symbols is empty. The decoder
must end at x = 2^16 with every byte read, which makes each stream's bytes the only ones for its
symbols. An alphabet of one symbol is not coded at all.

Knows nothing of frames, latents or tables: quantizers of any kind may use it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scq.errors import CorruptCodes, ScqError

TOTAL = 1 << 16
_LOWER = 1 << 16
_STATE_BYTES = 4

Ints = NDArray[np.int64]
# start, frequency: the slots of one symbol.
Interval = tuple[int, int]


def encode_intervals(intervals: Sequence[Interval]) -> bytes:
    """The stream of symbols given by their slots, in the order in which they will be read."""
    if not intervals:
        return b""
    state, words = _LOWER, []
    for start, frequency in reversed(intervals):
        if state >= frequency << 16:
            words.append(state & 0xFFFF)
            state >>= 16
        quotient, rest = divmod(state, frequency)
        state = (quotient << 16) + rest + start
    words_out = np.array(words[::-1], "<u2").tobytes()
    return state.to_bytes(_STATE_BYTES, "little") + words_out


class Decoder:
    """Reads one stream symbol by symbol. Every method raises CorruptCodes for a bad stream."""

    def __init__(self, stream: bytes) -> None:
        self._stream = stream
        self._position = 0
        self._state = 0

    def read(self, cumulative: Sequence[int]) -> int:
        """The next symbol under A + 1 cumulative frequencies, from 0 to 65536.

        With one symbol (A = 1) nothing is read.
        """
        if len(cumulative) == 2:
            return 0
        if not self._position:
            self._start()
        slot = self._state & 0xFFFF
        symbol = bisect_right(cumulative, slot) - 1
        start = cumulative[symbol]
        self._state = (cumulative[symbol + 1] - start) * (self._state >> 16) + slot - start
        if self._state < _LOWER:
            self._state = self._state << 16 | self._take(2)
        return symbol

    def close(self) -> None:
        """Check that the stream ends here, as its encoder began."""
        if self._position != len(self._stream):
            raise CorruptCodes(
                f"rANS stream has {len(self._stream)} bytes, its symbols take {self._position}"
            )
        if self._position and self._state != _LOWER:
            raise CorruptCodes(f"rANS stream ends in state {self._state:#x}, not {_LOWER:#x}")

    def _start(self) -> None:
        self._state = self._take(_STATE_BYTES)
        if self._state < _LOWER:
            raise CorruptCodes(f"rANS stream starts in state {self._state:#x}, below {_LOWER:#x}")

    def _take(self, count: int) -> int:
        end = self._position + count
        if end > len(self._stream):
            raise CorruptCodes(f"rANS stream of {len(self._stream)} bytes ends too early")
        value = int.from_bytes(self._stream[self._position : end], "little")
        self._position = end
        return value


def encode(symbols: ArrayLike, frequencies: ArrayLike, rows: ArrayLike | None = None) -> bytes:
    """The stream of N symbols. frequencies: (R, A) integers >= 1, each row summing to 65536.

    rows: (N,) the row that codes each symbol; left out, every symbol takes row 0.
    Raises ScqError for frequencies, rows or symbols out of range.
    """
    cumulative, names, chosen = _tables_and_rows(frequencies, symbols, rows)
    if names.size and not 0 <= names.min() <= names.max() < cumulative.shape[1] - 1:
        raise ScqError(
            f"symbols lie in {names.min()}..{names.max()}, the alphabet has "
            f"{cumulative.shape[1] - 1}"
        )
    if cumulative.shape[1] == 2:
        return b""
    starts = cumulative[chosen, names]
    widths = cumulative[chosen, names + 1] - starts
    return encode_intervals(list(zip(starts.tolist(), widths.tolist(), strict=True)))


def decode(
    stream: bytes, count: int, frequencies: ArrayLike, rows: ArrayLike | None = None
) -> Ints:
    """(count,) int64 symbols: the inverse of `encode`. Raises CorruptCodes, or ScqError as it."""
    cumulative, _, chosen = _tables_and_rows(frequencies, np.zeros(count, np.int64), rows)
    lists = cumulative.tolist()
    decoder = Decoder(stream)
    symbols = [decoder.read(lists[row]) for row in chosen.tolist()]
    decoder.close()
    return np.array(symbols, np.int64)


def cumulate(frequencies: ArrayLike) -> Ints:
    """(R, A) frequencies -> (R, A + 1) int64 cumulative sums from 0 to 65536.

    Raises ScqError unless every frequency is >= 1 and every row sums to 65536.
    """
    table = np.asarray(frequencies).astype(np.int64)
    if table.ndim != 2 or table.size == 0 or table.min() < 1 or (table.sum(1) != TOTAL).any():
        raise ScqError(
            f"frequencies {table.shape} must be (R, A), each >= 1 and each row summing to {TOTAL}"
        )
    cumulative: Ints = np.pad(table.cumsum(1), ((0, 0), (1, 0)))
    return cumulative


def quantize_frequencies(weights: ArrayLike) -> Ints:
    """(R, A) weights >= 0, A <= 65536 -> (R, A) int64 frequencies: each >= 1, rows sum to 65536.

    Every symbol gets one slot, the others go by weight, what rounding leaves to the heaviest. A
    row of zeros becomes uniform. Raises ScqError for weights that are no distribution.
    """
    table = np.asarray(weights, np.float64)
    if table.ndim != 2 or not 1 <= table.shape[1] <= TOTAL or table.shape[0] < 1:
        raise ScqError(f"weights {table.shape} must be (R, A) with 1 <= A <= {TOTAL}")
    if not np.isfinite(table).all() or (table < 0).any():
        raise ScqError("weights hold NaN, infinity or a negative number")
    sums = table.sum(1, keepdims=True)
    shares = np.where(sums > 0, table / np.where(sums > 0, sums, 1), 1 / table.shape[1])
    spare = TOTAL - table.shape[1]
    frequencies: Ints = 1 + np.floor(shares * spare).astype(np.int64)
    frequencies[np.arange(len(table)), shares.argmax(1)] += TOTAL - frequencies.sum(1)
    return frequencies


def ideal_bits(symbols: ArrayLike, frequencies: ArrayLike, rows: ArrayLike | None = None) -> float:
    """Information content of the symbols in bits; `encode` takes some 0.1 % and 4 bytes more."""
    cumulative, names, chosen = _tables_and_rows(frequencies, symbols, rows)
    widths = cumulative[chosen, names + 1] - cumulative[chosen, names]
    return float((16 - np.log2(widths)).sum())


def _tables_and_rows(
    frequencies: ArrayLike, symbols: ArrayLike, rows: ArrayLike | None
) -> tuple[Ints, Ints, Ints]:
    cumulative = cumulate(frequencies)
    names = np.asarray(symbols).astype(np.int64).reshape(-1)
    chosen = np.zeros_like(names) if rows is None else np.asarray(rows).astype(np.int64).reshape(-1)
    if chosen.shape != names.shape:
        raise ScqError(f"{len(chosen)} rows given for {len(names)} symbols")
    if chosen.size and not 0 <= chosen.min() <= chosen.max() < len(cumulative):
        raise ScqError(
            f"rows lie in {chosen.min()}..{chosen.max()}, there are {len(cumulative)} of them"
        )
    return cumulative, names, chosen
