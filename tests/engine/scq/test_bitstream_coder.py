"""The native coder against the reference: same bytes, same frames, same errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scq.bitstream import EntropyTables, KeyHeader, PackedFrame
from scq.bitstream.coder import Coder, KeyOptions, NativeCoder, PythonCoder, make_coder
from scq.bitstream.header import sealed
from scq.errors import CorruptCodes, ReferenceMismatch, ScqError, UnsupportedOperation
from scq.lattice import LatticeAssignment, LatticeCode
from support.lattices import (
    PROFILES,
    assignment_of,
    changed_assignment,
    random_assignment,
    random_tables,
    same,
)
from vqkernels.status import native_status

pytestmark = pytest.mark.skipif(
    not native_status().available, reason="the native library is not built"
)

GOLDEN: dict[str, Any] = json.loads(
    (Path(__file__).parents[2] / "golden" / "scq" / "vectors_v2.json").read_text()
)
HEADER = KeyHeader(96, 64, b"abcd", letterboxed=True)
GRID = (4, 6)


def coders(code: LatticeCode, tables: EntropyTables | None) -> tuple[Coder, Coder]:
    return make_coder(code, tables, "native"), make_coder(code, tables, "python")


def frames_of(coder: Coder, code: LatticeCode) -> list[PackedFrame]:
    before = random_assignment(code, 24, 1)
    now = changed_assignment(before, code, 2)
    keys = [KeyOptions("raw"), KeyOptions("rans"), KeyOptions("auto", 3), KeyOptions("rans", 1)]
    found = [coder.pack_key(HEADER, now, GRID, options) for options in keys]
    return found + [coder.pack_delta(b"abcd", now, GRID, before, tile) for tile in (None, 4)]


def outcome(coder: Coder, codes: bytes, before: LatticeAssignment, partial: bool) -> Any:
    try:
        frame = coder.unpack(codes, GRID, reference=before, allow_partial=partial)
    except CorruptCodes as error:
        return type(error), str(error)
    assignment = frame.assignment
    return assignment.indices.tolist(), assignment.numerators.tolist(), frame.complete, frame.header


@pytest.mark.parametrize("code", PROFILES, ids=str)
def test_both_coders_pack_the_same_frames(code: LatticeCode) -> None:
    native, python = coders(code, random_tables(code))
    assert isinstance(native, NativeCoder)
    assert isinstance(python, PythonCoder)
    assert frames_of(native, code) == frames_of(python, code)


@pytest.mark.parametrize("code", PROFILES, ids=str)
def test_both_coders_read_good_cut_and_damaged_frames_alike(code: LatticeCode) -> None:
    native, python = coders(code, random_tables(code))
    before = random_assignment(code, 24, 1)
    generator = np.random.default_rng(code.num_codes)
    for packed in frames_of(python, code):
        tried = [packed.codes, packed.codes[: packed.base_bytes], packed.codes[:-1], b""]
        for _ in range(40):
            damaged = bytearray(packed.codes)
            damaged[generator.integers(10, len(damaged))] = generator.integers(256)
            tried.append(sealed(bytes(damaged), packed.base_bytes))
        for codes in tried:
            for partial in (False, True):
                ours, theirs = (outcome(c, codes, before, partial) for c in (native, python))
                assert ours == theirs


@pytest.mark.parametrize("vector", GOLDEN["vectors"], ids=lambda v: v["name"])
def test_both_coders_give_the_golden_results(vector: dict[str, Any]) -> None:
    profile = GOLDEN["profiles"][vector["profile"]]
    code = LatticeCode(profile["num_codes"], profile["max_support"], profile["denominator"])
    tables = profile["tables"] and EntropyTables(
        code,
        np.array(profile["tables"]["base_cluster"], np.uint16),
        np.array(profile["tables"]["other_cluster"], np.uint16),
        {n: np.array(t, np.uint16) for n, t in profile["tables"]["frequencies"].items()},
    )
    record = vector["reference"]
    before = record and assignment_of(record["indices"], record["numerators"])
    codes, grid = bytes.fromhex(vector["codes"]), tuple(vector["grid"])
    for coder in coders(code, tables):
        if "refused" in vector:
            with pytest.raises(CorruptCodes):
                coder.unpack(codes, grid, reference=before)
            continue
        frame = coder.unpack(codes, grid, reference=before)
        assert same(frame.assignment, assignment_of(vector["indices"], vector["numerators"]))
        cut = codes[: vector["base_bytes"]]
        base = coder.unpack(cut, grid, reference=before, allow_partial=True)
        expected = vector["base"]
        assert same(base.assignment, assignment_of(expected["indices"], expected["numerators"]))


def test_both_coders_refuse_alike_what_they_cannot_pack() -> None:
    code = LatticeCode(90, 2, 4)
    good = random_assignment(code, 24)
    for coder in coders(code, None):
        with pytest.raises(UnsupportedOperation, match="rANS needs entropy tables"):
            coder.pack_key(HEADER, good, GRID, KeyOptions("rans"))
        with pytest.raises(UnsupportedOperation, match="delta frames need entropy tables"):
            coder.pack_delta(b"abcd", good, GRID, good, None)
        with pytest.raises(CorruptCodes, match="tile side 256"):
            coder.pack_key(HEADER, good, GRID, KeyOptions(tile=256))
        with pytest.raises(CorruptCodes, match="do not fill"):
            coder.pack_key(HEADER, good, (4, 5), KeyOptions())
        with pytest.raises(CorruptCodes, match="sum to 4"):
            coder.pack_key(HEADER, assignment_of([[1, 2]], [[3, 3]]), (1, 1), KeyOptions())
    for coder in coders(code, random_tables(code)):
        delta = coder.pack_delta(b"abcd", good, GRID, good, None).codes
        with pytest.raises(ReferenceMismatch):
            coder.unpack(delta, GRID)
        with pytest.raises(CorruptCodes):
            coder.unpack(delta, GRID, reference=random_assignment(code, 5))


def test_the_library_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    code = LatticeCode(90, 2, 4)
    assert isinstance(make_coder(code, None), NativeCoder)

    class Absent:
        available = False
        reason = "not built"

    monkeypatch.setattr("scq.bitstream.coder.native_status", Absent)
    assert isinstance(make_coder(code, None), PythonCoder)
    with pytest.raises(ScqError, match="no native codec: not built; use backend 'python'"):
        make_coder(code, None, "native")
