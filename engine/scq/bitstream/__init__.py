"""SCQ1: lattice assignments to bytes and back, with integers only.

Frame, version 1, little-endian:

    offset  size  field
    0       2     magic "SQ"
    2       1     version, 1
    3       1     flags: bit 0 letterboxed (the picture was scaled down), others 0
    4       2     width of the original picture in pixels, >= 1
    6       2     height, >= 1
    8       4     first 4 bytes of the model id
    12      4     CRC-32 (zlib) of bytes 0..11 followed by the payload
    16            payload, RAW mode

RAW payload: latents in raster order, each as its rank among the `num_states` assignments of the
model's lattice code, 64 latents to a chunk (fewer in the last). A chunk of m latents is the
integer sum rank_i * num_states^i in the fewest whole bytes that hold num_states^m - 1.

Rank: states with a smaller support come first. Among supports of t codes i_1 < .. < i_t with
numerators a_1 .. a_t, the rank is subset * C(n-1, t-1) + composition, both in colexicographic
order: subset = sum_m C(i_m, m), composition = sum_(m<t) C(a_1 + .. + a_m - 1, m).

Must not know about images, networks or where a model comes from. Every byte string that is not
a frame is CorruptCodes; work and memory are bounded by the length that is there.
"""

from __future__ import annotations

import functools
import math
import struct
import zlib
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from scq.errors import CorruptCodes, UnsupportedOperation
from scq.lattice import LatticeAssignment, LatticeCode

MAGIC = b"SQ"
VERSION = 1
HEADER_BYTES = 16
CHUNK_LATENTS = 64
MAX_SIDE = 0xFFFF
_FLAG_LETTERBOXED = 1
_HEADER = struct.Struct("<2sBBHH4sI")

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class FrameHeader:
    """What a frame says about itself. width, height: original pixels. model_hash: 4 bytes."""

    width: int
    height: int
    model_hash: bytes
    letterboxed: bool = False

    def __post_init__(self) -> None:
        if not (1 <= self.width <= MAX_SIDE and 1 <= self.height <= MAX_SIDE):
            raise CorruptCodes(
                f"frame size {self.width}x{self.height}, both sides must lie in 1..{MAX_SIDE}"
            )
        if len(self.model_hash) != 4:
            raise CorruptCodes(f"model hash has {len(self.model_hash)} bytes instead of 4")


def pack_frame(header: FrameHeader, assignment: LatticeAssignment, code: LatticeCode) -> bytes:
    """The frame's bytes. Raises CorruptCodes for an assignment that is not of `code`."""
    payload = _pack_ranks(rank(assignment, code), code)
    flags = _FLAG_LETTERBOXED if header.letterboxed else 0
    start = _HEADER.pack(MAGIC, VERSION, flags, header.width, header.height, header.model_hash, 0)[
        :12
    ]
    checksum = zlib.crc32(payload, zlib.crc32(start))
    return start + checksum.to_bytes(4, "little") + payload


def parse_header(codes: bytes) -> FrameHeader:
    """Read and verify the header, checksum included. Raises CorruptCodes."""
    if len(codes) < HEADER_BYTES:
        raise CorruptCodes(f"codes have {len(codes)} bytes, a frame has at least {HEADER_BYTES}")
    magic, version, flags, width, height, model_hash, checksum = _HEADER.unpack_from(codes)
    if magic != MAGIC:
        raise CorruptCodes(f"codes start with {magic!r} instead of {MAGIC!r}; not an SCQ1 frame")
    if version != VERSION:
        raise CorruptCodes(f"frame version {version} is not supported, only {VERSION}")
    if flags & ~_FLAG_LETTERBOXED:
        raise CorruptCodes(f"frame flags {flags:#04x} set reserved bits")
    computed = zlib.crc32(memoryview(codes)[HEADER_BYTES:], zlib.crc32(codes[:12]))
    if computed != checksum:
        raise CorruptCodes(f"checksum is {computed:08x}, the frame says {checksum:08x}")
    return FrameHeader(width, height, model_hash, bool(flags & _FLAG_LETTERBOXED))


def unpack_frame(codes: bytes, code: LatticeCode, grid: tuple[int, int]) -> LatticeAssignment:
    """Assignments of a (rows, columns) grid, raster order. Raises CorruptCodes."""
    parse_header(codes)
    num_latents = grid[0] * grid[1]
    expected = HEADER_BYTES + payload_bytes(code, num_latents)
    if len(codes) != expected:
        raise CorruptCodes(
            f"codes have {len(codes)} bytes, a {grid[0]}x{grid[1]} grid takes {expected}"
        )
    return unrank(_unpack_ranks(codes[HEADER_BYTES:], code, num_latents), code)


def payload_bytes(code: LatticeCode, num_latents: int) -> int:
    """Exact payload length of `num_latents` latents."""
    chunks, rest = divmod(num_latents, CHUNK_LATENTS)
    num_states = code.num_states
    return chunks * _chunk_bytes(num_states, CHUNK_LATENTS) + _chunk_bytes(num_states, rest)


def rank(assignment: LatticeAssignment, code: LatticeCode) -> Ints:
    """(N,) int64 ranks in [0, num_states). Raises CorruptCodes for what `code` cannot hold."""
    tables = _tables(code)
    indices = assignment.indices.cpu().numpy().astype(np.int64, copy=False)
    numerators = assignment.numerators.cpu().numpy().astype(np.int64, copy=False)
    _check_assignment(indices, numerators, code)
    # Ascending indices, unused slots last: they count as index K.
    ordered = np.where(numerators > 0, indices, code.num_codes)
    order = np.argsort(ordered, axis=1, kind="stable")
    ordered = np.take_along_axis(ordered, order, 1)
    numerators = np.take_along_axis(numerators, order, 1)
    if (np.diff(ordered, axis=1) == 0)[ordered[:, 1:] < code.num_codes].any():
        raise CorruptCodes("an assignment names the same code twice")
    sizes = (numerators > 0).sum(1)
    ranks = np.empty(len(sizes), np.int64)
    for size in range(1, code.max_support + 1):
        rows = np.flatnonzero(sizes == size)
        subset = _colex(ordered[rows, :size], tables.choose)
        cuts = numerators[rows, : size - 1].cumsum(1) - 1
        composition = _colex(cuts, tables.choose)
        ranks[rows] = tables.first[size] + subset * tables.compositions[size] + composition
    return ranks


def unrank(ranks: Ints, code: LatticeCode) -> LatticeAssignment:
    """Inverse of `rank`: heaviest code first, ties by lower index.

    Raises CorruptCodes for a rank outside [0, num_states).
    """
    tables = _tables(code)
    outside = np.flatnonzero((ranks < 0) | (ranks >= code.num_states))
    if outside.size:
        raise CorruptCodes(
            f"rank {ranks[outside[0]]} of latent {outside[0]} is not in [0, {code.num_states})"
        )
    sizes = np.searchsorted(tables.first[1:], ranks, side="right")
    indices = np.full((len(ranks), code.max_support), code.num_codes, np.int64)
    numerators = np.zeros_like(indices)
    for size in range(1, code.max_support + 1):
        rows = np.flatnonzero(sizes == size)
        within = ranks[rows] - tables.first[size]
        subset, composition = np.divmod(within, tables.compositions[size])
        indices[rows, :size] = _uncolex(subset, size, tables.choose)
        cuts = _uncolex(composition, size - 1, tables.choose)
        ends = np.full((len(rows), 1), code.denominator - 1)
        numerators[rows, :size] = np.diff(np.hstack((cuts, ends)), axis=1, prepend=-1)
    return _heaviest_first(indices, numerators)


def _heaviest_first(indices: Ints, numerators: Ints) -> LatticeAssignment:
    order = np.argsort(-numerators, axis=1, kind="stable")
    indices = np.take_along_axis(indices, order, 1)
    numerators = np.take_along_axis(numerators, order, 1)
    indices = np.where(numerators > 0, indices, indices[:, :1])
    return LatticeAssignment(torch.from_numpy(indices), torch.from_numpy(numerators))


def _check_assignment(indices: Ints, numerators: Ints, code: LatticeCode) -> None:
    shape = (len(indices), code.max_support)
    if indices.shape != shape or numerators.shape != shape:
        raise CorruptCodes(
            f"assignment has shapes {indices.shape} and {numerators.shape}, "
            f"the code needs (N, {code.max_support})"
        )
    if indices.size and not (indices.min() >= 0 and indices.max() < code.num_codes):
        raise CorruptCodes(
            f"index {int(indices.min())} or {int(indices.max())} is not in [0, {code.num_codes})"
        )
    if (numerators < 0).any() or (numerators.sum(1) != code.denominator).any():
        raise CorruptCodes(f"numerators must be >= 0 and sum to {code.denominator}")


@dataclass(frozen=True)
class _Tables:
    """choose[i, m] = C(i, m). first[t], compositions[t]: first rank, C(n-1, t-1) of support t."""

    choose: Ints
    first: Ints
    compositions: Ints


@functools.lru_cache(maxsize=16)
def _tables(code: LatticeCode) -> _Tables:
    if code.num_states >= 2**62:
        raise UnsupportedOperation(
            f"{code} has {code.num_states} states, RAW mode holds fewer than 2^62"
        )
    rows = max(code.num_codes, code.denominator) + 1
    choose = np.zeros((rows, code.max_support + 1), np.int64)
    choose[:, 0] = 1
    for size in range(1, code.max_support + 1):
        # Pascal: C(i, m) = C(i-1, m) + C(i-1, m-1), summed over i.
        choose[1:, size] = np.cumsum(choose[:-1, size - 1])
    compositions = [
        math.comb(code.denominator - 1, t - 1) for t in range(code.max_support + 1) if t
    ]
    counts = [math.comb(code.num_codes, t + 1) * c for t, c in enumerate(compositions)]
    first = np.concatenate(([0, 0], np.cumsum(counts[:-1], dtype=np.int64))).astype(np.int64)
    return _Tables(choose, first, np.array([0, *compositions], np.int64))


def _colex(ascending: Ints, choose: Ints) -> Ints:
    """Rank of (N, t) ascending rows among t-subsets: sum over m of C(i_m, m)."""
    size = ascending.shape[1]
    terms: Ints = choose[ascending, np.arange(1, size + 1)]
    total: Ints = terms.sum(1)
    return total


def _uncolex(ranks: Ints, size: int, choose: Ints) -> Ints:
    """(N, t) ascending rows of the given ranks, largest element first by greedy search."""
    chosen = np.empty((len(ranks), size), np.int64)
    for m in range(size, 0, -1):
        element = np.searchsorted(choose[:, m], ranks, side="right") - 1
        ranks = ranks - choose[element, m]
        chosen[:, m - 1] = element
    return chosen


def _chunk_bytes(num_states: int, num_latents: int) -> int:
    largest = int(num_states**num_latents) - 1
    return (largest.bit_length() + 7) // 8


def _pack_ranks(ranks: Ints, code: LatticeCode) -> bytes:
    num_states = code.num_states
    values = ranks.tolist()
    chunks = []
    for start in range(0, len(values), CHUNK_LATENTS):
        chunk = values[start : start + CHUNK_LATENTS]
        number = 0
        for value in reversed(chunk):
            number = number * num_states + value
        chunks.append(number.to_bytes(_chunk_bytes(num_states, len(chunk)), "little"))
    return b"".join(chunks)


def _unpack_ranks(payload: bytes, code: LatticeCode, num_latents: int) -> Ints:
    num_states = code.num_states
    size = _chunk_bytes(num_states, CHUNK_LATENTS)
    values: list[int] = []
    for chunk, done in enumerate(range(0, num_latents, CHUNK_LATENTS)):
        number = int.from_bytes(payload[chunk * size : (chunk + 1) * size], "little")
        for _ in range(min(CHUNK_LATENTS, num_latents - done)):
            number, value = divmod(number, num_states)
            values.append(value)
        if number:
            raise CorruptCodes(f"chunk {chunk} holds a rank beyond the last of {num_states}")
    return np.array(values, np.int64)
