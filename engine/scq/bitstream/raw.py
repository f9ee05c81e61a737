"""RAW segments of a key frame: ranks packed into whole bytes, 64 latents at a time.

A chunk of numbers r_0, r_1, .. with radices R_0, R_1, .. is the integer r_0 + R_0 (r_1 + R_1
(r_2 + ..)), little-endian, in the fewest whole bytes that hold R_0 R_1 .. - 1. The base layer's
radix is K throughout; those of the enhancement follow from the base layer. So does every length.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from scq.bitstream.canonical import Latents
from scq.bitstream.ranking import radices, rank_rest, unrank_rest
from scq.errors import CorruptCodes
from scq.lattice import LatticeCode

CHUNK_LATENTS = 64

Ints = NDArray[np.int64]


def pack_base(latents: Latents, code: LatticeCode) -> bytes:
    """The heaviest indices of one tile."""
    return _pack(latents.heaviest.tolist(), [code.num_codes] * len(latents))


def pack_enhancement(latents: Latents, code: LatticeCode) -> bytes:
    """All the rest of one tile."""
    ranks, limits = rank_rest(latents, code), radices(latents.heaviest, code)
    return _pack(ranks.tolist(), limits.tolist())


def base_bytes(num_latents: int, code: LatticeCode) -> int:
    """Length of the base layer of a tile of `num_latents`."""
    chunks, rest = divmod(num_latents, CHUNK_LATENTS)
    whole, last = (_chunk_bytes(code.num_codes**m) for m in (CHUNK_LATENTS, rest))
    return chunks * whole + last


def enhancement_bytes(heaviest: Ints, code: LatticeCode) -> int:
    """Length of the enhancement of a tile with these heaviest indices."""
    limits = radices(heaviest, code).tolist()
    return sum(_chunk_bytes(math.prod(chunk)) for chunk in _chunks(limits))


def unpack_base(segment: bytes, num_latents: int, code: LatticeCode) -> Ints:
    """(N,) heaviest indices. Raises CorruptCodes for a chunk out of range."""
    return _unpack(segment, [code.num_codes] * num_latents)


def unpack_enhancement(segment: bytes, heaviest: Ints, code: LatticeCode) -> Latents:
    """The tile's latents. Raises CorruptCodes for a chunk out of range."""
    ranks = _unpack(segment, radices(heaviest, code).tolist())
    return unrank_rest(heaviest, ranks, code)


def _chunks(values: Sequence[int]) -> Iterator[Sequence[int]]:
    return (values[i : i + CHUNK_LATENTS] for i in range(0, len(values), CHUNK_LATENTS))


def _chunk_bytes(num_states: int) -> int:
    return ((num_states - 1).bit_length() + 7) // 8


def _pack(values: Sequence[int], limits: Sequence[int]) -> bytes:
    chunks = []
    for chunk, bounds in zip(_chunks(values), _chunks(limits), strict=True):
        number = 0
        for value, bound in zip(reversed(chunk), reversed(bounds), strict=True):
            number = number * bound + value
        chunks.append(number.to_bytes(_chunk_bytes(math.prod(bounds)), "little"))
    return b"".join(chunks)


def _unpack(segment: bytes, limits: Sequence[int]) -> Ints:
    values: list[int] = []
    position = 0
    for chunk, bounds in enumerate(_chunks(limits)):
        size = _chunk_bytes(math.prod(bounds))
        number = int.from_bytes(segment[position : position + size], "little")
        position += size
        for bound in bounds:
            number, value = divmod(number, bound)
            values.append(value)
        if number:
            raise CorruptCodes(f"chunk {chunk} of a RAW segment is beyond its last rank")
    return np.array(values, np.int64)
