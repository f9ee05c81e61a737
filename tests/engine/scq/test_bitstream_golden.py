"""The golden vectors, the second decoder that was written from docs/scq1.md, and its examples."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from scq.bitstream import (
    EntropyTables,
    KeyHeader,
    pack_delta,
    pack_delta_frame,
    pack_key,
    pack_key_frame,
    parse_header,
    unpack,
)
from scq.bitstream.canonical import canonical, fingerprint
from scq.bitstream.header import sealed
from scq.bitstream.tables import table_shapes
from scq.errors import CorruptCodes
from scq.lattice import LatticeAssignment, LatticeCode
from support.lattices import (
    PROFILES,
    assignment_of,
    changed_assignment,
    random_assignment,
    random_tables,
    same,
)

ROOT = Path(__file__).parents[3]
GOLDEN = ROOT / "tests" / "golden" / "scq"
CONFORMANCE = ROOT / "clients" / "conformance"
DOCUMENT: dict[str, Any] = json.loads((GOLDEN / "vectors_v2.json").read_text())
GOOD = [vector for vector in DOCUMENT["vectors"] if "refused" not in vector]
REFUSED = [vector for vector in DOCUMENT["vectors"] if "refused" in vector]


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


REFERENCE = load(CONFORMANCE / "scq1_reference.py")


def code_of(profile: dict[str, Any]) -> LatticeCode:
    return LatticeCode(profile["num_codes"], profile["max_support"], profile["denominator"])


def tables_of(profile: dict[str, Any]) -> EntropyTables | None:
    tables = profile["tables"]
    if tables is None:
        return None
    return EntropyTables(
        code_of(profile),
        np.array(tables["base_cluster"], np.uint16),
        np.array(tables["other_cluster"], np.uint16),
        {name: np.array(rows, np.uint16) for name, rows in tables["frequencies"].items()},
    )


MODELS = {n: (code_of(p), tables_of(p)) for n, p in DOCUMENT["profiles"].items()}


def assignment_in(record: dict[str, Any] | None) -> LatticeAssignment | None:
    return None if record is None else assignment_of(record["indices"], record["numerators"])


@pytest.mark.parametrize("vector", GOOD, ids=lambda v: v["name"])
def test_golden_frames_decode_whole_and_cut(vector: dict[str, Any]) -> None:
    code, tables = MODELS[vector["profile"]]
    codes, grid = bytes.fromhex(vector["codes"]), tuple(vector["grid"])
    reference, expected = assignment_in(vector["reference"]), assignment_in(vector)
    base = assignment_in(vector["base"])
    assert expected is not None
    assert base is not None
    frame = unpack(codes, code, grid, tables=tables, reference=reference)
    assert frame.complete
    assert same(frame.assignment, expected)
    for length in {vector["base_bytes"], len(codes) - 1}:
        if vector["base_bytes"] <= length < len(codes):
            cut = unpack(
                codes[:length], code, grid, tables=tables, reference=reference, allow_partial=True
            )
            assert not cut.complete
            assert same(cut.assignment, base)
    with pytest.raises(CorruptCodes):
        unpack(
            codes[: vector["base_bytes"] - 1], code, grid, tables=tables, reference=reference,
            allow_partial=True,
        )  # fmt: skip


@pytest.mark.parametrize("vector", GOOD, ids=lambda v: v["name"])
def test_golden_assignments_pack_to_the_golden_bytes(vector: dict[str, Any]) -> None:
    code, tables = MODELS[vector["profile"]]
    codes, grid = bytes.fromhex(vector["codes"]), tuple(vector["grid"])
    assignment, reference = assignment_in(vector), assignment_in(vector["reference"])
    header = parse_header(codes)
    assert assignment is not None
    if reference is not None:
        packed = pack_delta(
            header.model_hash, assignment, code, grid, reference=reference, tables=tables,
            tile=header.tile,
        )  # fmt: skip
    else:
        key = KeyHeader(header.width, header.height, header.model_hash, header.letterboxed)
        packed = pack_key(
            key, assignment, code, grid, tables=tables, tile=header.tile, entropy=header.entropy
        )
    assert packed == codes


@pytest.mark.parametrize("vector", REFUSED, ids=lambda v: v["name"])
def test_golden_refusals_are_refused(vector: dict[str, Any]) -> None:
    code, tables = MODELS[vector["profile"]]
    with pytest.raises(CorruptCodes):
        unpack(
            bytes.fromhex(vector["codes"]), code, tuple(vector["grid"]), tables=tables,
            reference=assignment_in(vector["reference"]),
        )  # fmt: skip


def test_the_vectors_are_what_their_generator_writes_in_both_places() -> None:
    text = (GOLDEN / "vectors_v2.json").read_text()
    assert (CONFORMANCE / "vectors.json").read_text() == text
    assert load(GOLDEN / "generate.py").serialized() == text


def test_the_second_decoder_holds_every_vector_without_our_packages() -> None:
    ran = subprocess.run(
        [sys.executable, "-I", "-S", "scq1_reference.py", "vectors.json"],
        cwd=CONFORMANCE,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout == f"{len(DOCUMENT['vectors'])} of {len(DOCUMENT['vectors'])} vectors hold\n"


def reference_model(code: LatticeCode) -> Any:
    tables = random_tables(code)
    frequencies = {name: table.tolist() for name, table in tables.frequencies.items()}
    maps = {
        "base_cluster": tables.base_cluster.tolist(),
        "other_cluster": tables.other_cluster.tolist(),
        "frequencies": frequencies,
    }
    return REFERENCE.Model(code.num_codes, code.max_support, code.denominator, maps)


def both_decode(codes: bytes, code: LatticeCode, before: LatticeAssignment) -> list[Any]:
    """What each decoder makes of bytes on a 4x6 grid: used slots and completeness, or None."""
    found: list[Any] = []
    try:
        frame = unpack(
            codes, code, (4, 6), tables=random_tables(code), reference=before, allow_partial=True
        )
    except CorruptCodes:
        found.append(None)
    else:
        found.append((REFERENCE.latents_of(lists(frame.assignment)), frame.complete))
    try:
        reference = REFERENCE.latents_of(lists(before))
        found.append(REFERENCE.decode(codes, reference_model(code), (4, 6), reference, True))
    except REFERENCE.Refused:
        found.append(None)
    return found


def lists(assignment: LatticeAssignment) -> dict[str, Any]:
    return {
        "indices": assignment.indices.tolist(),
        "numerators": assignment.numerators.tolist(),
    }


@pytest.mark.parametrize("code", PROFILES, ids=str)
def test_both_decoders_agree_on_good_and_damaged_frames(code: LatticeCode) -> None:
    generator = np.random.default_rng(code.num_codes)
    before = random_assignment(code, 24, 1)
    now = changed_assignment(before, code, 2)
    tables = random_tables(code)
    header = KeyHeader(96, 64, b"abcd")
    frames = [
        pack_key_frame(header, now, code, (4, 6), entropy="raw"),
        pack_key_frame(header, now, code, (4, 6), tables=tables, entropy="rans", tile=4),
        pack_delta_frame(b"abcd", now, code, (4, 6), reference=before, tables=tables),
    ]
    for codes, base_end in ((frame.codes, frame.base_bytes) for frame in frames):
        ours, theirs = both_decode(codes, code, before)
        assert ours == theirs
        assert ours is not None
        for _ in range(60):
            damaged = bytearray(codes)
            damaged[generator.integers(10, len(codes))] = generator.integers(256)
            for end in (base_end, int(generator.integers(10, len(codes) + 1))):
                ours, theirs = both_decode(sealed(bytes(damaged), end), code, before)
                assert ours == theirs


def examples() -> list[bytes]:
    """The frames of the specification's worked examples, in order."""
    text = (ROOT / "docs" / "scq1.md").read_text()
    found = re.findall(r"^    (53 2[0-9a-f](?: [0-9a-f]{2})+)$", text, re.MULTILINE)
    return [bytes.fromhex(line) for line in found]


def test_the_specifications_examples_are_what_the_code_does() -> None:
    code = LatticeCode(5, 2, 4)
    frequencies = {}
    for name, (rows, alphabet) in table_shapes(code, 2, 2).items():
        table = np.full((rows, alphabet), 65536 // alphabet)
        table[:, 0] += 65536 - table.sum(1)
        frequencies[name] = table.astype(np.uint16)
    clusters = (np.array([0, 0, 0, 1, 1], np.uint16), np.array([0, 0, 1, 1, 1], np.uint16))
    tables = EntropyTables(code, *clusters, frequencies)
    header = KeyHeader(40, 16, bytes.fromhex("a1b2c3d4"))
    before = assignment_of([[2, 4], [0, 0], [3, 1]], [[3, 1], [4, 0], [3, 1]])
    now = assignment_of([[2, 4], [0, 0], [3, 1]], [[2, 2], [4, 0], [3, 1]])
    assert examples() == [
        pack_key(header, before, code, (1, 3), entropy="raw"),
        pack_key(header, before, code, (1, 3), tables=tables, entropy="rans"),
        pack_delta(header.model_hash, now, code, (1, 3), reference=before, tables=tables),
    ]
    assert fingerprint(canonical(before, code), (1, 3)) == 0x8051DCE6
