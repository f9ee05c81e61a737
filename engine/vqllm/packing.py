"""Small integers to 32-bit words and back, in the layout of GPTQ checkpoints.

Codes are concatenated least significant bit first into a stream of 32-bit words, so widths that
do not divide 32 (3 bits) straddle word borders as other tools write them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Codes = NDArray[np.uint8]
Words = NDArray[np.int32]

WORD_BITS = 32


def pack_rows(codes: Codes, bits: int) -> Words:
    """Pack (rows, columns) codes along rows: int32 (rows * bits / 32, columns).

    Raises:
        ValueError: rows do not fill whole words, or a code needs more than `bits` bits.
    """
    num_rows, num_columns = codes.shape
    if num_rows * bits % WORD_BITS:
        raise ValueError(f"{num_rows} codes of {bits} bits do not fill whole 32-bit words")
    if codes.size and int(codes.max()) >> bits:
        raise ValueError(f"code {int(codes.max())} does not fit {bits} bits")
    planes = (codes[:, None, :] >> np.arange(bits, dtype=np.uint8)[None, :, None]) & 1
    stream = np.packbits(planes.reshape(num_rows * bits, num_columns), axis=0, bitorder="little")
    # Four consecutive bytes of one column form a word; bring them next to each other.
    quads = stream.reshape(-1, 4, num_columns).transpose(0, 2, 1)
    return np.ascontiguousarray(quads).view("<i4").reshape(-1, num_columns)


def unpack_rows(words: Words, bits: int) -> Codes:
    """Inverse of `pack_rows`: uint8 (num_words * 32 / bits, columns)."""
    num_words, num_columns = words.shape
    quads = np.ascontiguousarray(words, dtype="<i4")[..., None].view(np.uint8)
    stream = quads.transpose(0, 2, 1).reshape(num_words * 4, num_columns)
    planes = np.unpackbits(stream, axis=0, bitorder="little").reshape(-1, bits, num_columns)
    weights = (1 << np.arange(bits)).astype(np.uint8)
    codes = (planes * weights[None, :, None]).sum(axis=1, dtype=np.uint8)
    return np.asarray(codes, dtype=np.uint8)


def pack_columns(codes: Codes, bits: int) -> Words:
    """Pack (rows, columns) codes along columns: int32 (rows, columns * bits / 32)."""
    return np.ascontiguousarray(pack_rows(np.ascontiguousarray(codes.T), bits).T)


def unpack_columns(words: Words, bits: int) -> Codes:
    """Inverse of `pack_columns`."""
    return np.ascontiguousarray(unpack_rows(np.ascontiguousarray(words.T), bits).T)
