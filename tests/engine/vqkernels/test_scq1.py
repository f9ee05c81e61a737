"""The native SCQ1 codec against the golden vectors and against hostile bytes."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vqkernels.errors import ShapeError
from vqkernels.scq1 import (
    Scq1Codes,
    Scq1Error,
    Scq1Frame,
    Scq1Model,
    Scq1Options,
    Scq1Reason,
    Scq1Tables,
)

pytestmark = pytest.mark.usefixtures("native")

GOLDEN = Path(__file__).parents[3] / "tests" / "golden" / "scq" / "vectors_v2.json"
DOCUMENT: dict[str, Any] = json.loads(GOLDEN.read_text())
GOOD = [vector for vector in DOCUMENT["vectors"] if "refused" not in vector]
REFUSED = [vector for vector in DOCUMENT["vectors"] if "refused" in vector]
SMALL = "k12s2n4"


def make_model(profile: dict[str, Any], *, with_tables: bool = True) -> Scq1Model:
    tables = None
    if with_tables and profile["tables"] is not None:
        record = profile["tables"]
        tables = Scq1Tables(
            np.array(record["base_cluster"], np.uint16),
            np.array(record["other_cluster"], np.uint16),
            {name: np.array(rows, np.uint16) for name, rows in record["frequencies"].items()},
        )
    sizes = (profile["num_codes"], profile["max_support"], profile["denominator"])
    return Scq1Model(*sizes, tables)


@pytest.fixture(scope="module")
def models(native: None) -> dict[str, Scq1Model]:
    return {name: make_model(profile) for name, profile in DOCUMENT["profiles"].items()}


def codes_in(record: dict[str, Any] | None) -> Scq1Codes | None:
    if record is None:
        return None
    return Scq1Codes(np.array(record["indices"]), np.array(record["numerators"]))


def assert_same(found: Scq1Codes, expected: Scq1Codes | None) -> None:
    assert expected is not None
    np.testing.assert_array_equal(found.indices, expected.indices)
    np.testing.assert_array_equal(found.numerators, expected.numerators)


def pack_again(model: Scq1Model, vector: dict[str, Any], entropy: str) -> Scq1Frame:
    header, codes = vector["header"], bytes.fromhex(vector["codes"])
    options = Scq1Options(
        bytes.fromhex(header["model_hash"]),
        header["width"],
        header["height"],
        bool(header["flags"] & 4),
        tile_side(codes, vector),
        entropy,
    )
    now = codes_in(vector)
    assert now is not None
    return model.pack(now, tuple(vector["grid"]), options, codes_in(vector["reference"]))


def tile_side(codes: bytes, vector: dict[str, Any]) -> int:
    if not codes[1] & 8:
        return 0
    position = 10
    if vector["reference"] is not None:
        return codes[position + 4]
    for _ in range(2):
        while codes[position] & 128:
            position += 1
        position += 1
    return codes[position]


@pytest.mark.parametrize("vector", GOOD, ids=lambda v: v["name"])
def test_golden_frames_decode_whole_and_cut(
    models: dict[str, Scq1Model], vector: dict[str, Any]
) -> None:
    model, grid = models[vector["profile"]], tuple(vector["grid"])
    codes, reference = bytes.fromhex(vector["codes"]), codes_in(vector["reference"])
    found, complete = model.unpack(codes, grid, reference=reference)
    assert complete
    assert_same(found, codes_in(vector))
    base = vector["base_bytes"]
    for length in {base, len(codes) - 1} - {len(codes)}:
        if length >= base:
            cut, complete = model.unpack(
                codes[:length], grid, reference=reference, allow_partial=True
            )
            assert not complete
            assert_same(cut, codes_in(vector["base"]))
    with pytest.raises(Scq1Error):
        model.unpack(codes[: base - 1], grid, reference=reference, allow_partial=True)


@pytest.mark.parametrize("vector", GOOD, ids=lambda v: v["name"])
def test_golden_codes_pack_to_the_golden_bytes(
    models: dict[str, Scq1Model], vector: dict[str, Any]
) -> None:
    codes = bytes.fromhex(vector["codes"])
    entropy = "rans" if codes[1] & 2 else "raw"
    frame = pack_again(models[vector["profile"]], vector, entropy)
    assert frame.codes == codes
    assert frame.base_bytes == vector["base_bytes"]
    assert frame.is_rans == (entropy == "rans")
    if vector["reference"] is not None:
        assert sum(frame.modes) == vector["grid"][0] * vector["grid"][1]


@pytest.mark.parametrize("vector", REFUSED, ids=lambda v: v["name"])
def test_golden_refusals_are_refused(models: dict[str, Scq1Model], vector: dict[str, Any]) -> None:
    with pytest.raises(Scq1Error):
        models[vector["profile"]].unpack(
            bytes.fromhex(vector["codes"]),
            tuple(vector["grid"]),
            reference=codes_in(vector["reference"]),
        )


def test_auto_takes_the_shorter_frame(models: dict[str, Scq1Model]) -> None:
    for vector in GOOD:
        if vector["reference"] is None and DOCUMENT["profiles"][vector["profile"]]["tables"]:
            sizes = {
                entropy: len(pack_again(models[vector["profile"]], vector, entropy).codes)
                for entropy in ("auto", "raw", "rans")
            }
            assert sizes["auto"] == min(sizes["raw"], sizes["rans"])


def mutated(codes: bytes, randomness: random.Random) -> bytes:
    """A few bytes changed, inserted or cut; checks made to fit again half of the time."""
    out = bytearray(codes)
    for _ in range(randomness.randint(1, 4)):
        at = randomness.randrange(len(out)) if out else 0
        kind = randomness.randrange(4)
        if kind == 0:
            del out[at:]
        elif kind == 1:
            out[at:at] = randomness.randbytes(randomness.randint(1, 3))
        elif out:
            out[at] = randomness.randrange(256)
    return bytes(out)


def test_mutated_frames_decode_or_are_refused(models: dict[str, Scq1Model]) -> None:
    randomness = random.Random(5)
    outcomes = set()
    for _ in range(20):
        for vector in GOOD:
            if vector["profile"] == "k65536s4n16":
                continue
            model, grid = models[vector["profile"]], tuple(vector["grid"])
            codes = mutated(bytes.fromhex(vector["codes"]), randomness)
            try:
                found, _ = model.unpack(
                    codes, grid, reference=codes_in(vector["reference"]), allow_partial=True
                )
            except Scq1Error as error:
                outcomes.add(error.reason)
                continue
            outcomes.add(Scq1Reason.GOOD)
            sizes = DOCUMENT["profiles"][vector["profile"]]
            assert (found.numerators.sum(axis=1) == sizes["denominator"]).all()
            assert 0 <= found.indices.min() <= found.indices.max() < sizes["num_codes"]
    assert {Scq1Reason.GOOD, Scq1Reason.HEADER, Scq1Reason.CHECK} <= outcomes


def test_rans_frames_need_tables_and_deltas_their_reference() -> None:
    bare = make_model(DOCUMENT["profiles"][SMALL], with_tables=False)
    full = make_model(DOCUMENT["profiles"][SMALL])
    vectors = {v["name"].removeprefix(f"{SMALL}-"): v for v in GOOD if v["profile"] == SMALL}
    key, delta = vectors["key-rans-9x15"], vectors["delta-9x15"]
    with pytest.raises(Scq1Error) as error:
        bare.unpack(bytes.fromhex(key["codes"]), tuple(key["grid"]))
    assert error.value.reason is Scq1Reason.TABLES
    for reference in (None, codes_in(key)):
        with pytest.raises(Scq1Error) as error:
            full.unpack(bytes.fromhex(delta["codes"]), tuple(delta["grid"]), reference=reference)
        assert error.value.reason is Scq1Reason.REFERENCE
    with pytest.raises(Scq1Error, match="tables"):
        pack_again(bare, key, "rans")
    with pytest.raises(Scq1Error, match="tables"):
        pack_again(bare, delta, "auto")


def test_codes_of_another_model_are_refused(models: dict[str, Scq1Model]) -> None:
    options = Scq1Options(b"1234", 16, 16, entropy="raw")
    good = np.array([[3, 5]]), np.array([[3, 1]])
    for indices, numerators in (
        (np.array([[12, 5]]), good[1]),
        (np.array([[-1, 5]]), good[1]),
        (np.array([[5, 5]]), good[1]),
        (good[0], np.array([[3, 2]])),
        (good[0], np.array([[5, -1]])),
        (good[0], np.array([[0, 0]])),
    ):
        with pytest.raises(Scq1Error) as error:
            models[SMALL].pack(Scq1Codes(indices, numerators), (1, 1), options)
        assert error.value.reason is Scq1Reason.ASSIGNMENT
    with pytest.raises(ShapeError, match=r"\(1, 2\)"):
        models[SMALL].pack(Scq1Codes(*good), (2, 1), options)


def test_slots_may_come_in_any_order(models: dict[str, Scq1Model]) -> None:
    options = Scq1Options(b"1234", 16, 16, entropy="raw")
    sorted_slots = Scq1Codes(np.array([[5, 3]]), np.array([[3, 1]]))
    swapped = Scq1Codes(np.array([[3, 5]]), np.array([[1, 3]]))
    model = models[SMALL]
    first = model.pack(sorted_slots, (1, 1), options).codes
    assert model.pack(swapped, (1, 1), options).codes == first
    found, _ = model.unpack(first, (1, 1))
    assert found.indices.tolist() == [[5, 3]]


def test_sizes_without_a_profile_and_wrong_tables_are_refused() -> None:
    for sizes in ((1, 1, 1), (65537, 1, 1), (8, 5, 8), (8, 2, 3), (8, 2, 32), (8, 4, 2)):
        with pytest.raises(ShapeError, match="SCQ1 model"):
            Scq1Model(*sizes)
    record = DOCUMENT["profiles"][SMALL]["tables"]
    clusters = [np.array(record[f"{name}_cluster"], np.uint16) for name in ("base", "other")]
    tables = {n: np.array(rows, np.uint16) for n, rows in record["frequencies"].items()}
    broken = {**tables, "mode": np.zeros_like(tables["mode"])}
    missing = {n: table for n, table in tables.items() if n != "swap"}
    for frequencies in (broken, missing):
        with pytest.raises(ShapeError):
            Scq1Model(12, 2, 4, Scq1Tables(clusters[0], clusters[1], frequencies))
    with pytest.raises(ShapeError, match="unknown entropy tables: odd"):
        Scq1Model(12, 2, 4, Scq1Tables(clusters[0], clusters[1], {**tables, "odd": broken["mode"]}))
    with pytest.raises(ShapeError, match="cluster map"):
        Scq1Model(12, 2, 4, Scq1Tables(clusters[0][:5], clusters[1], tables))
