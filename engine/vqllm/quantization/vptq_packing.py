"""VPTQ's bitstream of indices: elements of a few bits, least significant bit first, in int32 words.

An element is the main index with the residual index above it. The elements of one row follow each
other along the columns; each row is padded with zero bits to whole words.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Elements = NDArray[np.uint32]
Words = NDArray[np.int32]

WORD_BITS = 32
_CHUNK_BITS = 1 << 26


def words_per_row(num_elements: int, bits: int) -> int:
    """Words that `num_elements` of `bits` bits fill, the last one in part."""
    return -(-num_elements * bits // WORD_BITS)


def pack_elements(elements: Elements, bits: int) -> Words:
    """Pack (..., n) elements along the last axis: int32 (..., words_per_row(n, bits)).

    Raises:
        ValueError: an element needs more than `bits` bits, or `bits` is not 1 to 32.
    """
    _check_bits(bits)
    if elements.size and int(elements.max()) >> bits:
        raise ValueError(f"element {int(elements.max())} does not fit {bits} bits")
    num_elements = elements.shape[-1]
    rows = elements.reshape(-1, num_elements)
    words = np.empty((len(rows), words_per_row(num_elements, bits)), np.int32)
    for chunk in _chunks(len(rows), num_elements * bits):
        words[chunk] = _pack_rows(rows[chunk], bits)
    return words.reshape(*elements.shape[:-1], -1)


def unpack_elements(words: Words, bits: int, num_elements: int) -> Elements:
    """Inverse of `pack_elements`: uint32 (..., num_elements).

    Raises:
        ValueError: the words are too few or too many.
    """
    _check_bits(bits)
    if words.shape[-1] != words_per_row(num_elements, bits):
        raise ValueError(f"{words.shape[-1]} words cannot hold {num_elements} x {bits} bits")
    rows = words.reshape(-1, words.shape[-1])
    elements = np.empty((len(rows), num_elements), np.uint32)
    for chunk in _chunks(len(rows), num_elements * bits):
        elements[chunk] = _unpack_rows(rows[chunk], bits, num_elements)
    return elements.reshape(*words.shape[:-1], num_elements)


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= WORD_BITS:
        raise ValueError(f"elements have {bits} bits, allowed are 1 to {WORD_BITS}")


def _chunks(num_rows: int, bits_per_row: int) -> list[slice]:
    step = max(1, _CHUNK_BITS // max(bits_per_row, 1))
    return [slice(start, start + step) for start in range(0, num_rows, step)]


def _pack_rows(rows: Elements, bits: int) -> Words:
    octets = np.ascontiguousarray(rows, dtype="<u4")[..., None].view(np.uint8)
    planes = np.unpackbits(octets, axis=-1, bitorder="little")[..., :bits]
    stream = planes.reshape(len(rows), -1)
    padding = -stream.shape[1] % WORD_BITS
    packed = np.packbits(np.pad(stream, ((0, 0), (0, padding))), axis=1, bitorder="little")
    return packed.view("<i4").astype(np.int32, copy=False)


def _unpack_rows(rows: Words, bits: int, num_elements: int) -> Elements:
    octets = np.ascontiguousarray(rows, dtype="<i4").view(np.uint8)
    stream = np.unpackbits(octets, axis=1, bitorder="little")[:, : num_elements * bits]
    planes = stream.reshape(len(rows), num_elements, bits)
    padded = np.pad(planes, ((0, 0), (0, 0), (0, WORD_BITS - bits)))
    elements = np.packbits(padded, axis=-1, bitorder="little").view("<u4")
    return elements[..., 0].astype(np.uint32, copy=False)
