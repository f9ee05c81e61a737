"""Whole frames: header, length table, the base layers of all tiles, then their enhancements.

    header | length table (rANS only) | base of tile 0, 1, .. | enhancement of tile 0, 1, ..

Tiles are squares of `tile` latents in raster order, smaller at the right and lower edges; an
untiled frame is one tile. The length table holds a varint for every segment but the last; RAW
lengths follow from the code and from what was read. Every byte string that is no frame of the
given model is CorruptCodes, with work and memory bounded by the grid and the bytes that are there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from scq.bitstream import delta, keyframe, raw
from scq.bitstream.canonical import Grid, Latents, canonical, fingerprint, single_codes
from scq.bitstream.changes import MODE_NAMES
from scq.bitstream.header import (
    MAX_SIDE,
    Entropy,
    FrameHeader,
    KeyHeader,
    checksum,
    delta_fields,
    key_fields,
    parse_header,
    read_varint,
    sealed,
    write_varint,
)
from scq.bitstream.tables import EntropyTables
from scq.bitstream.weights import check_profile
from scq.errors import CorruptCodes, ReferenceMismatch, UnsupportedOperation
from scq.lattice import LatticeAssignment, LatticeCode

Ints = NDArray[np.int64]
EntropyChoice = Literal["auto", "raw", "rans"]
Segments = tuple[list[bytes], list[bytes]]


@dataclass(frozen=True)
class PackedFrame:
    """A frame's bytes. base_bytes: the shortest prefix that still shows the base layer.

    modes: latents per mode of a delta frame, by name; empty for a key frame.
    """

    codes: bytes
    entropy: Entropy
    base_bytes: int
    modes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class UnpackedFrame:
    """Codes in raster order; complete is False where only the base layer could be had."""

    assignment: LatticeAssignment
    complete: bool
    header: FrameHeader


def pack_key(
    header: KeyHeader,
    assignment: LatticeAssignment,
    code: LatticeCode,
    grid: Grid,
    *,
    tables: EntropyTables | None = None,
    tile: int | None = None,
    entropy: EntropyChoice = "auto",
) -> bytes:
    """A key frame. entropy "auto" takes the shorter of RAW and, given tables, rANS.

    Raises CorruptCodes for an assignment that is not of `code` or does not fill `grid`,
    UnsupportedOperation for "rans" without tables or a code without a profile.
    """
    return pack_key_frame(
        header, assignment, code, grid, tables=tables, tile=tile, entropy=entropy
    ).codes


def pack_key_frame(
    header: KeyHeader,
    assignment: LatticeAssignment,
    code: LatticeCode,
    grid: Grid,
    *,
    tables: EntropyTables | None = None,
    tile: int | None = None,
    entropy: EntropyChoice = "auto",
) -> PackedFrame:
    """`pack_key` with what it took."""
    latents = _canonical_grid(assignment, code, grid)
    tiles = split_tiles(grid, tile)
    frames = []
    if entropy != "raw" and tables is not None:
        parts = [keyframe.encode_tile(latents.take(t.rows), t.grid, tables) for t in tiles]
        frames.append(_join(key_fields(header, "rans", tile), _layers(parts), "rans"))
    elif entropy == "rans":
        raise UnsupportedOperation("rANS needs entropy tables and this model has none; use 'raw'")
    if entropy != "rans":
        pieces = [latents.take(t.rows) for t in tiles]
        parts = [(raw.pack_base(p, code), raw.pack_enhancement(p, code)) for p in pieces]
        frames.append(_join(key_fields(header, "raw", tile), _layers(parts), "raw"))
    return min(frames, key=lambda frame: len(frame.codes))


def pack_delta(
    model_hash: bytes,
    assignment: LatticeAssignment,
    code: LatticeCode,
    grid: Grid,
    *,
    reference: LatticeAssignment,
    tables: EntropyTables | None,
    tile: int | None = None,
) -> bytes:
    """A delta frame: what turns `reference` into `assignment`, both on `grid`.

    Raises as `pack_key`; UnsupportedOperation without tables.
    """
    return pack_delta_frame(
        model_hash, assignment, code, grid, reference=reference, tables=tables, tile=tile
    ).codes


def pack_delta_frame(
    model_hash: bytes,
    assignment: LatticeAssignment,
    code: LatticeCode,
    grid: Grid,
    *,
    reference: LatticeAssignment,
    tables: EntropyTables | None,
    tile: int | None = None,
) -> PackedFrame:
    """`pack_delta` with what it took."""
    if tables is None:
        raise UnsupportedOperation(
            "delta frames need entropy tables and this model has none; send key frames"
        )
    latents, before = (_canonical_grid(a, code, grid) for a in (assignment, reference))
    parts = [
        delta.encode_tile(latents.take(t.rows), before.take(t.rows), t.grid, tables)
        for t in split_tiles(grid, tile)
    ]
    fields = delta_fields(model_hash, fingerprint(before, grid), tile)
    frame = _join(fields, _layers([(p.base, p.enhancement) for p in parts]), "rans")
    modes: Counter[str] = Counter(dict.fromkeys(MODE_NAMES, 0))
    for part in parts:
        modes.update(part.modes)
    return PackedFrame(frame.codes, "rans", frame.base_bytes, dict(modes))


def unpack(
    codes: bytes,
    code: LatticeCode,
    grid: Grid,
    *,
    tables: EntropyTables | None = None,
    reference: LatticeAssignment | None = None,
    allow_partial: bool = False,
) -> UnpackedFrame:
    """The codes of a frame on a (rows, columns) grid.

    With allow_partial a frame that is cut or damaged behind its base layer gives that layer's
    picture (one code per latent; in a delta frame the reference where it is not NEW) and
    complete=False. Raises CorruptCodes; ReferenceMismatch for a delta frame whose reference is
    not `reference`; UnsupportedOperation for a code without a profile.
    """
    _check_grid(grid, code)
    header = parse_header(codes, allow_partial=allow_partial)
    if header.entropy == "raw":
        return _RawReader(codes, header, code, grid).read(allow_partial)
    if tables is None:
        raise CorruptCodes("the frame is rANS-coded, but its model has no entropy tables")
    if not header.is_delta:
        return _KeyReader(codes, header, grid, tables).read(allow_partial)
    before = check_reference(header, reference, code, grid)
    return _DeltaReader(codes, header, grid, tables, before).read(allow_partial)


def base_layer_end(codes: bytes, code: LatticeCode, grid: Grid) -> int:
    """Length of the frame's shortest prefix that decodes partially, as its header and length table
    have it. Raises CorruptCodes where these are out of form."""
    header = parse_header(codes, allow_partial=True)
    tiles = split_tiles(grid, header.tile)
    if header.entropy == "raw":
        return header.num_bytes + sum(raw.base_bytes(len(t.rows), code) for t in tiles)
    lengths, position = _read_length_table(codes, header.num_bytes, len(tiles))
    return position + sum(lengths[: len(tiles)])


def _read_length_table(codes: bytes, position: int, num_tiles: int) -> tuple[list[int], int]:
    """Lengths of all segments but the last, and where the table ends."""
    lengths = []
    for _ in range(2 * num_tiles - 1):
        length, position = read_varint(codes, position)
        lengths.append(length)
    return lengths, position


def check_reference(
    header: FrameHeader, reference: LatticeAssignment | None, code: LatticeCode, grid: Grid
) -> Latents:
    """The reference, canonical. Raises ReferenceMismatch unless it is the one that is meant."""
    if reference is None:
        raise ReferenceMismatch(header.reference or 0, None)
    latents = _canonical_grid(reference, code, grid)
    own = fingerprint(latents, grid)
    if own != header.reference:
        raise ReferenceMismatch(header.reference or 0, own)
    return latents


@dataclass(frozen=True)
class Tile:
    """rows: raster positions of its latents in the frame, in the tile's raster order."""

    rows: Ints
    grid: Grid


def split_tiles(grid: Grid, side: int | None) -> list[Tile]:
    """The tiles of a grid in raster order; all of it as one for side None.

    Raises:
        CorruptCodes: the side is below 1.
    """
    if side is not None and side < 1:
        raise CorruptCodes(f"tiles of {side} latents a side, at least 1 is needed")
    positions = np.arange(grid[0] * grid[1]).reshape(grid)
    step = max(grid) if side is None else side
    blocks = [
        positions[y : y + step, x : x + step]
        for y in range(0, grid[0], step)
        for x in range(0, grid[1], step)
    ]
    return [Tile(b.reshape(-1), (b.shape[0], b.shape[1])) for b in blocks]


def _check_grid(grid: Grid, code: LatticeCode) -> None:
    check_profile(code)
    if not (1 <= grid[0] <= MAX_SIDE and 1 <= grid[1] <= MAX_SIDE):
        raise CorruptCodes(f"grid {grid[0]}x{grid[1]}, both sides must lie in 1..{MAX_SIDE}")


def _canonical_grid(assignment: LatticeAssignment, code: LatticeCode, grid: Grid) -> Latents:
    _check_grid(grid, code)
    if len(assignment) != grid[0] * grid[1]:
        raise CorruptCodes(f"{len(assignment)} latents do not fill a {grid[0]}x{grid[1]} grid")
    return canonical(assignment, code)


def _layers(parts: Sequence[tuple[bytes, bytes]]) -> Segments:
    return [base for base, _ in parts], [rest for _, rest in parts]


def _join(fields: bytes, segments: Segments, entropy: Entropy) -> PackedFrame:
    base, enhancement = segments
    table = b""
    if entropy == "rans":
        table = b"".join(write_varint(len(s)) for s in (base + enhancement)[:-1])
    start = fields + table + b"".join(base)
    return PackedFrame(sealed(start + b"".join(enhancement), len(start)), entropy, len(start))


class _RawReader:
    """Reads a RAW key frame. One object per frame."""

    def __init__(self, codes: bytes, header: FrameHeader, code: LatticeCode, grid: Grid) -> None:
        self.codes = codes
        self.header = header
        self.code = code
        self.grid = grid
        self.tiles = split_tiles(grid, header.tile)

    def read(self, allow_partial: bool) -> UnpackedFrame:
        self._find_segments()
        base_end = self.base_start + sum(self.base_lengths)
        if base_end > len(self.codes):
            raise CorruptCodes(
                f"codes have {len(self.codes)} bytes, the base layer ends at byte {base_end}; "
                "ask for the frame again"
            )
        computed = checksum(self.codes, base_end)
        if computed != self.header.base_check:
            raise CorruptCodes(
                f"base check is {computed:04x}, the frame says {self.header.base_check:04x}"
            )
        base = self._cut(self.base_start, self.base_lengths)
        self._read_base(base)
        if not allow_partial:
            return self._result(self._read_enhancement(base_end), complete=True)
        try:
            if checksum(self.codes, len(self.codes)) == self.header.full_check:
                return self._result(self._read_enhancement(base_end), complete=True)
        except CorruptCodes:
            # A cut frame can match its full check by chance; the base layer is still good.
            pass
        return self._result(self._partial(), complete=False)

    def _find_segments(self) -> None:
        self.base_start = self.header.num_bytes
        self.base_lengths = [raw.base_bytes(len(t.rows), self.code) for t in self.tiles]

    def _read_base(self, segments: list[bytes]) -> None:
        self.leads = [
            raw.unpack_base(segment, len(t.rows), self.code)
            for segment, t in zip(segments, self.tiles, strict=True)
        ]

    def _read_enhancement(self, start: int) -> list[Latents]:
        lengths = [raw.enhancement_bytes(leads, self.code) for leads in self.leads]
        segments = self._exact_cut(start, lengths)
        return [
            raw.unpack_enhancement(segment, leads, self.code)
            for segment, leads in zip(segments, self.leads, strict=True)
        ]

    def _partial(self) -> list[Latents]:
        return [single_codes(leads, self.code) for leads in self.leads]

    def _exact_cut(self, start: int, lengths: list[int]) -> list[bytes]:
        if start + sum(lengths) != len(self.codes):
            raise CorruptCodes(
                f"codes have {len(self.codes)} bytes, a {self.grid[0]}x{self.grid[1]} grid takes "
                f"{start + sum(lengths)}"
            )
        return self._cut(start, lengths)

    def _cut(self, start: int, lengths: list[int]) -> list[bytes]:
        ends = (start + np.cumsum(lengths, dtype=np.int64)).tolist()
        return [self.codes[end - length : end] for end, length in zip(ends, lengths, strict=True)]

    def _result(self, parts: list[Latents], *, complete: bool) -> UnpackedFrame:
        size = self.grid[0] * self.grid[1], self.code.max_support
        indices, numerators = np.zeros(size, np.int64), np.zeros(size, np.int64)
        for tile, part in zip(self.tiles, parts, strict=True):
            indices[tile.rows] = part.indices
            numerators[tile.rows] = part.numerators
        return UnpackedFrame(Latents(indices, numerators).to_assignment(), complete, self.header)


class _KeyReader(_RawReader):
    """Reads a rANS key frame."""

    def __init__(
        self, codes: bytes, header: FrameHeader, grid: Grid, tables: EntropyTables
    ) -> None:
        super().__init__(codes, header, tables.code, grid)
        self.tables = tables

    def _find_segments(self) -> None:
        lengths, self.base_start = _read_length_table(
            self.codes, self.header.num_bytes, len(self.tiles)
        )
        self.base_lengths = lengths[: len(self.tiles)]
        self.enhancement_lengths = lengths[len(self.tiles) :]

    def _read_base(self, segments: list[bytes]) -> None:
        self.leads = [
            keyframe.decode_base(segment, t.grid, self.tables)
            for segment, t in zip(segments, self.tiles, strict=True)
        ]

    def _read_enhancement(self, start: int) -> list[Latents]:
        return [
            keyframe.decode_enhancement(segment, leads, self.tables)
            for segment, leads in zip(self._enhancements(start), self.leads, strict=True)
        ]

    def _enhancements(self, start: int) -> list[bytes]:
        last = len(self.codes) - start - sum(self.enhancement_lengths)
        if last < 0:
            raise CorruptCodes(
                f"codes have {len(self.codes)} bytes, the length table asks for {-last} more"
            )
        return self._cut(start, [*self.enhancement_lengths, last])


class _DeltaReader(_KeyReader):
    """Reads a delta frame."""

    def __init__(
        self,
        codes: bytes,
        header: FrameHeader,
        grid: Grid,
        tables: EntropyTables,
        reference: Latents,
    ) -> None:
        super().__init__(codes, header, grid, tables)
        self.references = [reference.take(t.rows) for t in self.tiles]

    def _read_base(self, segments: list[bytes]) -> None:
        self.bases = [
            delta.decode_base(segment, before, t.grid, self.tables)
            for segment, before, t in zip(segments, self.references, self.tiles, strict=True)
        ]

    def _read_enhancement(self, start: int) -> list[Latents]:
        return [
            delta.decode_enhancement(segment, base, before, self.tables)
            for segment, base, before in zip(
                self._enhancements(start), self.bases, self.references, strict=True
            )
        ]

    def _partial(self) -> list[Latents]:
        return [
            base.partial(before, self.tables)
            for base, before in zip(self.bases, self.references, strict=True)
        ]
