"""The native SCQ1 codec against the reference: same bytes, same codes, same errors."""

from __future__ import annotations

import random

import pytest
import torch

from scq import bitstream, bitstream_native
from scq.bitstream import CodedGrid, EntropyTables, KeyHeader, fit_tables
from scq.errors import CorruptCodes, ReferenceMismatch, ScqError, UnsupportedOperation
from scq.lattice import LatticeAssignment, LatticeCode, search

GRID = (5, 7)
HEADER = KeyHeader(100, 80, b"1234", letterboxed=True)
CODES = [LatticeCode(2, 1, 1), LatticeCode(20, 2, 4), LatticeCode(30, 3, 8), LatticeCode(9, 4, 4)]


def frames_of(code: LatticeCode) -> list[LatticeAssignment]:
    generator = torch.Generator().manual_seed(code.num_codes)
    codebook = torch.randn(code.num_codes, 4, generator=generator)
    drift = torch.randn(3, 35, 4, generator=generator).mul(0.2).cumsum(0)
    start = torch.randn(35, 4, generator=generator)
    return [search(start + step, codebook, code) for step in drift]


def tables_of(code: LatticeCode, frames: list[LatticeAssignment]) -> EntropyTables:
    grids = [CodedGrid(frame, GRID) for frame in frames]
    return fit_tables(grids, code, videos=[grids])


WORLDS = [(code, frames_of(code), tables_of(code, frames_of(code))) for code in CODES]


def same(first: LatticeAssignment, second: LatticeAssignment) -> bool:
    return torch.equal(first.indices, second.indices) and torch.equal(
        first.numerators, second.numerators
    )


@pytest.mark.parametrize("world", WORLDS, ids=[str(code) for code in CODES])
@pytest.mark.parametrize("tile", [None, 3])
@pytest.mark.parametrize("entropy", ["auto", "raw", "rans"])
def test_key_frames_are_the_reference_s(
    world: tuple[LatticeCode, list[LatticeAssignment], EntropyTables],
    tile: int | None,
    entropy: bitstream.frame.EntropyChoice,
) -> None:
    code, frames, tables = world
    packed = bitstream_native.pack_key_frame(
        HEADER, frames[0], code, GRID, tables=tables, tile=tile, entropy=entropy
    )
    assert packed == bitstream.pack_key_frame(
        HEADER, frames[0], code, GRID, tables=tables, tile=tile, entropy=entropy
    )
    found = bitstream_native.unpack(packed.codes, code, GRID, tables=tables)
    assert found.complete
    assert found.header == bitstream.parse_header(packed.codes)
    assert same(found.assignment, frames[0])


@pytest.mark.parametrize("world", WORLDS, ids=[str(code) for code in CODES])
@pytest.mark.parametrize("tile", [None, 3])
def test_delta_frames_are_the_reference_s(
    world: tuple[LatticeCode, list[LatticeAssignment], EntropyTables], tile: int | None
) -> None:
    code, frames, tables = world
    packed = bitstream_native.pack_delta_frame(
        b"1234", frames[1], code, GRID, reference=frames[0], tables=tables, tile=tile
    )
    assert packed == bitstream.pack_delta_frame(
        b"1234", frames[1], code, GRID, reference=frames[0], tables=tables, tile=tile
    )
    found = bitstream_native.unpack(packed.codes, code, GRID, tables=tables, reference=frames[0])
    assert same(found.assignment, frames[1])
    with pytest.raises(ReferenceMismatch):
        bitstream_native.unpack(packed.codes, code, GRID, tables=tables, reference=frames[2])


def test_damaged_frames_fare_alike() -> None:
    code, frames, tables = WORLDS[1]
    randomness = random.Random(3)
    packed = bitstream.pack_key_frame(HEADER, frames[0], code, GRID, tables=tables, entropy="rans")
    for length in range(len(packed.codes)):
        codes = bytearray(packed.codes[: length + 1])
        if length % 3 == 0:
            codes[randomness.randrange(len(codes))] ^= 1 << randomness.randrange(8)
        results = []
        for unpack in (bitstream.unpack, bitstream_native.unpack):
            try:
                found = unpack(bytes(codes), code, GRID, tables=tables, allow_partial=True)
                results.append((found.complete, found.assignment.indices.tolist()))
            except CorruptCodes as error:
                results.append((str(error), []))
        assert results[0] == results[1]


def test_refusals_are_the_reference_s() -> None:
    code, frames, tables = WORLDS[1]
    with pytest.raises(UnsupportedOperation, match="rANS needs entropy tables"):
        bitstream_native.pack_key_frame(HEADER, frames[0], code, GRID, entropy="rans")
    with pytest.raises(UnsupportedOperation, match="delta frames need"):
        bitstream_native.pack_delta_frame(
            b"1234", frames[1], code, GRID, reference=frames[0], tables=None
        )
    with pytest.raises(CorruptCodes, match="do not fill"):
        bitstream_native.pack_key_frame(HEADER, frames[0], code, (2, 2))
    with pytest.raises(CorruptCodes, match="tile side 256"):
        bitstream_native.pack_key_frame(HEADER, frames[0], code, GRID, tile=256)
    with pytest.raises(ScqError, match="no profile"):
        bitstream_native.unpack(b"S", LatticeCode(5, 2, 3), GRID)
    wrong = LatticeAssignment(frames[0].indices + 20, frames[0].numerators)
    with pytest.raises(CorruptCodes, match="not in"):
        bitstream_native.pack_key_frame(HEADER, wrong, code, GRID, tables=tables)


def test_without_the_library_the_reference_works(monkeypatch: pytest.MonkeyPatch) -> None:
    code, frames, tables = WORLDS[1]
    expected = bitstream_native.pack_key_frame(HEADER, frames[0], code, GRID, tables=tables)
    monkeypatch.setattr(bitstream_native, "_has_native", lambda: False)
    assert bitstream_native.pack_key_frame(HEADER, frames[0], code, GRID, tables=tables) == expected
    found = bitstream_native.unpack(expected.codes, code, GRID, tables=tables)
    assert same(found.assignment, frames[0])
