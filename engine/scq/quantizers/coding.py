"""Symbols to bytes, the same way for every quantizer: RAW mixed radix, or rANS with static tables.

Symbols (N, S) travel position by position, each for all latents that have it. RAW takes 64
symbols of one position as the integer sum symbol_i * alphabet^i in the fewest whole bytes that
hold alphabet^64 - 1. rANS is one stream under one 16-bit frequency table per position, fitted on
training symbols; no contexts, so that no quantizer has an advantage but its own statistics. What
a method's symbols cannot mean costs it nothing either: codes of equal weight have no order (see
`set_coding`); the stages of RVQ and the channels of FSQ do.

Knows nothing of latents; which latents have a position is told by a function of the positions
before it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scq.bitstream import rans
from scq.errors import CorruptCodes, InvalidCodebook

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
# (position, symbols so far) -> which latents transmit this position.
Coded = Callable[[int, Ints], Bools]

CHUNK_SYMBOLS = 64
# An alphabet needs at least one of 65536 slots a symbol, and slots to spare for the likely ones.
MAX_ALPHABET = 32768
# Added to each count, so that symbols unseen in training can be coded; the one under which either
# half of the training symbols codes the other best is taken.
_PRIOR_COUNTS = (0.02, 0.1, 0.5, 2.0)
_PREFIX = "symbols."


@dataclass(frozen=True)
class SymbolTables:
    """One row of integer frequencies (>= 1, sum 65536) per symbol position.

    Raises:
        InvalidCodebook: a row that is no such distribution.
    """

    frequencies: tuple[Ints, ...]

    def __post_init__(self) -> None:
        for position, row in enumerate(self.frequencies):
            if row.ndim != 1 or row.size == 0 or row.min() < 1 or row.sum() != rans.TOTAL:
                raise InvalidCodebook(
                    f"frequencies of position {position} must be >= 1 and sum to {rans.TOTAL}"
                )

    def to_tensors(self) -> dict[str, Tensor]:
        """int32 tensors `symbols.0`, `symbols.1`, ... for a safetensors file."""
        return {
            f"{_PREFIX}{position}": torch.from_numpy(row.astype(np.int32))
            for position, row in enumerate(self.frequencies)
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> SymbolTables:
        """Inverse of `to_tensors`; other names are ignored. Raises InvalidCodebook."""
        count = sum(name.startswith(_PREFIX) for name in tensors)
        if not count or any(f"{_PREFIX}{position}" not in tensors for position in range(count)):
            raise InvalidCodebook(f"no complete set of {_PREFIX}0 .. tables; fit them again")
        rows = (tensors[f"{_PREFIX}{position}"] for position in range(count))
        return cls(tuple(row.cpu().numpy().astype(np.int64) for row in rows))


def fit_tables(symbols: Ints, alphabets: Sequence[int], coded: Coded) -> SymbolTables:
    """Frequencies of (N, S) training symbols at each position.

    Raises InvalidCodebook for an alphabet beyond what 16-bit frequencies can tell apart.
    """
    rows = [
        fit_row(symbols[coded(position, symbols[:, :position]), position], size)
        for position, size in enumerate(alphabets)
    ]
    return SymbolTables(tuple(rows))


def fit_row(present: Ints, size: int) -> Ints:
    """Frequencies of one alphabet from (N,) training symbols. Raises as `fit_tables`."""
    if size > MAX_ALPHABET:
        raise InvalidCodebook(
            f"an alphabet of {size} symbols has no 16-bit table, the limit is {MAX_ALPHABET}; "
            "pack RAW"
        )
    counts = np.bincount(present, minlength=size)
    row: Ints = rans.quantize_frequencies(counts[None] + _best_prior(present, size))[0]
    return row


def _best_prior(present: Ints, size: int) -> float:
    halves = [np.bincount(present[start::2], minlength=size) for start in (0, 1)]

    def bits(prior: float) -> float:
        return sum(
            -float(other @ np.log2((half + prior) / (half + prior).sum()))
            for half, other in (halves, halves[::-1])
        )

    return min(_PRIOR_COUNTS, key=bits)


def pack_rans(symbols: Ints, tables: SymbolTables, coded: Coded) -> bytes:
    """(N, S) symbols as one rANS stream."""
    _check_shape(symbols, len(tables.frequencies))
    intervals: list[rans.Interval] = []
    for position, row in enumerate(tables.frequencies):
        present = symbols[coded(position, symbols[:, :position]), position]
        _check_range(present, len(row), position)
        if len(row) > 1:
            starts = np.cumsum(row) - row
            pairs = zip(starts[present].tolist(), row[present].tolist(), strict=True)
            intervals.extend(pairs)
    return rans.encode_intervals(intervals)


def unpack_rans(data: bytes, count: int, tables: SymbolTables, coded: Coded) -> Ints:
    """Inverse of `pack_rans` for `count` latents. Raises CorruptCodes."""
    symbols = np.zeros((count, len(tables.frequencies)), np.int64)
    decoder = rans.Decoder(data)
    for position, row in enumerate(tables.frequencies):
        cumulative = [0, *np.cumsum(row).tolist()]
        present = np.flatnonzero(coded(position, symbols[:, :position]))
        symbols[present, position] = [decoder.read(cumulative) for _ in range(len(present))]
    decoder.close()
    return symbols


def symbol_bits(symbols: Ints, tables: SymbolTables, coded: Coded) -> NDArray[np.float64]:
    """(N,) bits of each latent's (N, S) symbols under `tables`."""
    total = np.zeros(len(symbols))
    for position, row in enumerate(tables.frequencies):
        present = coded(position, symbols[:, :position])
        total += np.where(present, np.log2(rans.TOTAL / row)[symbols[:, position]], 0)
    return total


def pack_raw(symbols: Ints, alphabets: Sequence[int], coded: Coded) -> bytes:
    """(N, S) symbols in RAW mode."""
    _check_shape(symbols, len(alphabets))
    parts = []
    for position, size in enumerate(alphabets):
        present = symbols[coded(position, symbols[:, :position]), position]
        _check_range(present, size, position)
        parts.append(pack_digits(present.tolist(), size))
    return b"".join(parts)


def unpack_raw(data: bytes, count: int, alphabets: Sequence[int], coded: Coded) -> Ints:
    """Inverse of `pack_raw` for `count` latents. Raises CorruptCodes."""
    symbols = np.zeros((count, len(alphabets)), np.int64)
    offset = 0
    for position, size in enumerate(alphabets):
        present = np.flatnonzero(coded(position, symbols[:, :position]))
        end = offset + digits_length(len(present), size)
        symbols[present, position] = unpack_digits(data[offset:end], len(present), size)
        offset = end
    if offset != len(data):
        raise CorruptCodes(f"symbols take {offset} bytes, got {len(data)}")
    return symbols


def digits_length(count: int, radix: int) -> int:
    """Bytes that `pack_digits` writes for `count` digits."""
    chunks, rest = divmod(count, CHUNK_SYMBOLS)
    return chunks * _chunk_bytes(CHUNK_SYMBOLS, radix) + _chunk_bytes(rest, radix)


def pack_digits(digits: Sequence[int], radix: int) -> bytes:
    """Digits in [0, radix), 64 to a big integer, least significant first."""
    parts = []
    for start in range(0, len(digits), CHUNK_SYMBOLS):
        chunk = digits[start : start + CHUNK_SYMBOLS]
        number = 0
        for digit in reversed(chunk):
            number = number * radix + digit
        parts.append(number.to_bytes(_chunk_bytes(len(chunk), radix), "little"))
    return b"".join(parts)


def unpack_digits(data: bytes, count: int, radix: int) -> list[int]:
    """Inverse of `pack_digits`. Raises CorruptCodes for a wrong length or a chunk out of range."""
    if len(data) != digits_length(count, radix):
        raise CorruptCodes(
            f"{count} symbols of {radix} take {digits_length(count, radix)} bytes, got {len(data)}"
        )
    size = _chunk_bytes(CHUNK_SYMBOLS, radix)
    digits: list[int] = []
    for chunk, done in enumerate(range(0, count, CHUNK_SYMBOLS)):
        number = int.from_bytes(data[chunk * size : (chunk + 1) * size], "little")
        for _ in range(min(CHUNK_SYMBOLS, count - done)):
            number, digit = divmod(number, radix)
            digits.append(digit)
        if number:
            raise CorruptCodes(f"chunk {chunk} lies beyond the last value of its symbols")
    return digits


def _chunk_bytes(count: int, radix: int) -> int:
    largest = int(radix**count) - 1
    return (largest.bit_length() + 7) // 8


def check_symbols(symbols: Ints, alphabets: Sequence[int]) -> None:
    """Raise CorruptCodes unless (N, S) symbols lie in their alphabets."""
    _check_shape(symbols, len(alphabets))
    for position, size in enumerate(alphabets):
        _check_range(symbols[:, position], size, position)


def _check_shape(symbols: Ints, positions: int) -> None:
    if symbols.ndim != 2 or symbols.shape[1] != positions:
        raise CorruptCodes(f"symbols must be (N, {positions}), got {symbols.shape}")


def _check_range(present: Ints, size: int, position: int) -> None:
    if present.size and not 0 <= present.min() <= present.max() < size:
        raise CorruptCodes(
            f"position {position} holds symbols {present.min()}..{present.max()}, its alphabet "
            f"has {size}"
        )
