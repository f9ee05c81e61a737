"""Write the golden vectors of SCQ1: python tests/golden/scq/generate.py

Everything in them follows from integers that a linear congruential generator yields, so that the
file is the same on every machine. It must not change unless the format does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scq.bitstream import (
    EntropyTables,
    KeyHeader,
    PackedFrame,
    pack_delta_frame,
    pack_key_frame,
    parse_header,
    unpack,
)
from scq.bitstream.canonical import Grid, canonical
from scq.bitstream.frame import EntropyChoice
from scq.bitstream.header import sealed
from scq.bitstream.rans import TOTAL
from scq.bitstream.tables import table_shapes
from scq.bitstream.weights import compositions
from scq.lattice import LatticeAssignment, LatticeCode

OUTPUTS = (
    Path(__file__).parent / "vectors_v2.json",
    Path(__file__).parents[3] / "clients" / "conformance" / "vectors.json",
)
MODEL_HASH = bytes.fromhex("c0de5c01")
# name: K, s, n, base clusters, other clusters (0 for no tables)
PROFILES = {
    "k5s1n1": (5, 1, 1, 2, 3),
    "k6s2n2": (6, 2, 2, 3, 2),
    "k12s2n4": (12, 2, 4, 4, 5),
    "k24s3n4": (24, 3, 4, 3, 4),
    "k16s4n8": (16, 4, 8, 2, 3),
    "k90s2n4": (90, 2, 4, 0, 0),
    "k256s3n16": (256, 3, 16, 0, 0),
    "k65536s4n16": (65536, 4, 16, 0, 0),
}


class Dice:
    """x -> 6364136223846793005 x + 1442695040888963407 mod 2^64, upper 31 bits."""

    def __init__(self, seed: int) -> None:
        self._state = seed

    def below(self, limit: int) -> int:
        """The next number in 0..limit - 1."""
        self._state = (self._state * 6364136223846793005 + 1442695040888963407) % 2**64
        return (self._state >> 33) % limit


def tables_of(code: LatticeCode, base: int, other: int, dice: Dice) -> EntropyTables:
    """Tables with every cluster used and uneven frequencies."""
    clusters = [
        np.array([i % count if i < count else dice.below(count) for i in range(code.num_codes)])
        for count in (base, other)
    ]
    frequencies = {}
    for name, (rows, alphabet) in table_shapes(code, base, other).items():
        weights = np.array(
            [[1 + dice.below(60) ** 2 for _ in range(alphabet)] for _ in range(rows)]
        )
        table = 1 + weights * (TOTAL - alphabet) // weights.sum(1, keepdims=True)
        table[:, 0] += TOTAL - table.sum(1)
        frequencies[name] = table.astype(np.uint16)
    maps = [cluster.astype(np.uint16) for cluster in clusters]
    return EntropyTables(code, maps[0], maps[1], frequencies)


def draw(code: LatticeCode, count: int, dice: Dice) -> LatticeAssignment:
    """Latents of all support sizes, canonical."""
    indices = np.zeros((count, code.max_support), np.int64)
    numerators = np.zeros_like(indices)
    for row in range(count):
        size = 1 + dice.below(code.max_support)
        chosen: list[int] = []
        while len(chosen) < size:
            index = dice.below(code.num_codes)
            chosen += [index] if index not in chosen else []
        choices = compositions(code.denominator, size)
        indices[row, :size] = chosen
        numerators[row, :size] = choices[dice.below(len(choices))]
    loose = LatticeAssignment(torch.from_numpy(indices), torch.from_numpy(numerators))
    return canonical(loose, code).to_assignment()


def change(before: LatticeAssignment, code: LatticeCode, dice: Dice) -> LatticeAssignment:
    """A third of the latents as before, others with new weights, one new code, or all new."""
    fresh = draw(code, len(before), dice)
    indices, numerators = before.indices.clone(), before.numerators.clone()
    for row in range(len(before)):
        size = int((numerators[row] > 0).sum())
        kind = dice.below(6)
        choices = compositions(code.denominator, size)
        if kind == 2:
            indices[row], numerators[row] = fresh.indices[row], fresh.numerators[row]
        if kind in (3, 4):
            numerators[row, :size] = torch.tensor(choices[dice.below(len(choices))])
        index = dice.below(code.num_codes)
        if kind in (4, 5) and index not in indices[row, :size].tolist():
            indices[row, dice.below(size)] = index
    return canonical(LatticeAssignment(indices, numerators), code).to_assignment()


def lists(assignment: LatticeAssignment) -> dict[str, Any]:
    return {
        "indices": assignment.indices.tolist(),
        "numerators": assignment.numerators.tolist(),
    }


class Profile:
    """One row of PROFILES: its vectors share a code and tables."""

    def __init__(self, name: str) -> None:
        codes, support, denominator, base, other = PROFILES[name]
        self.name = name
        self.code = LatticeCode(codes, support, denominator)
        self.dice = Dice(sum(PROFILES[name]))
        self.tables = tables_of(self.code, base, other, self.dice) if base else None

    def document(self) -> dict[str, Any]:
        tables = None
        if self.tables is not None:
            tables = {
                "base_cluster": self.tables.base_cluster.tolist(),
                "other_cluster": self.tables.other_cluster.tolist(),
                "frequencies": {n: t.tolist() for n, t in self.tables.frequencies.items()},
            }
        return {
            "num_codes": self.code.num_codes,
            "max_support": self.code.max_support,
            "denominator": self.code.denominator,
            "tables": tables,
        }

    def vectors(self) -> Iterator[dict[str, Any]]:
        large = self.code.num_codes > 1000
        yield self.key("raw", (5, 13) if large else (9, 15), None)
        yield self.key("raw", (3, 4), 2)
        if self.tables is None:
            return
        yield self.key("rans", (9, 15), None)
        yield self.key("rans", (5, 4), 3)
        yield self.key("rans", (1, 1), None)
        yield self.delta((9, 15), None, still=False)
        yield self.delta((5, 4), 3, still=False)
        yield self.delta((4, 4), None, still=True)

    def key(self, entropy: EntropyChoice, grid: Grid, tile: int | None) -> dict[str, Any]:
        assignment = draw(self.code, grid[0] * grid[1], self.dice)
        header = KeyHeader(16 * grid[1], 16 * grid[0] - 7, MODEL_HASH, letterboxed=tile is not None)
        packed = pack_key_frame(
            header, assignment, self.code, grid, tables=self.tables, tile=tile, entropy=entropy
        )
        return self.record(f"key-{entropy}", packed, grid, assignment, None)

    def delta(self, grid: Grid, tile: int | None, *, still: bool) -> dict[str, Any]:
        before = draw(self.code, grid[0] * grid[1], self.dice)
        now = before if still else change(before, self.code, self.dice)
        packed = pack_delta_frame(
            MODEL_HASH, now, self.code, grid, reference=before, tables=self.tables, tile=tile
        )
        return self.record("still" if still else "delta", packed, grid, now, before)

    def record(
        self,
        kind: str,
        packed: PackedFrame,
        grid: Grid,
        assignment: LatticeAssignment,
        before: LatticeAssignment | None,
    ) -> dict[str, Any]:
        header = parse_header(packed.codes)
        base = unpack(
            packed.codes[: packed.base_bytes],
            self.code,
            grid,
            tables=self.tables,
            reference=before,
            allow_partial=True,
        ).assignment
        tiled = "-tiled" if header.tile else ""
        return {
            "name": f"{self.name}-{kind}{tiled}-{grid[0]}x{grid[1]}",
            "profile": self.name,
            "grid": list(grid),
            "codes": packed.codes.hex(),
            "header": {
                "flags": packed.codes[1] & 15,
                "model_hash": header.model_hash.hex(),
                "width": header.width,
                "height": header.height,
                "tile": header.tile,
                "reference": header.reference,
            },
            "base_bytes": packed.base_bytes,
            **lists(assignment),
            "base": lists(base),
            "reference": None if before is None else lists(before),
        }


def refusals(vectors: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Frames with good checks, unless that is the point, that must be refused."""
    found = {vector["name"]: vector for vector in vectors}
    raw = found["k12s2n4-key-raw-9x15"]
    rans, delta = found["k12s2n4-key-rans-9x15"], found["k12s2n4-delta-9x15"]
    for kind, vector in (("raw", raw), ("rans", rans), ("delta", delta)):
        codes, end = bytes.fromhex(vector["codes"]), vector["base_bytes"]
        last = codes[:-1] + bytes([codes[-1] ^ 128])
        cases = {
            "bit-flipped": last,
            "cut": codes[:-1],
            "byte-added": sealed(codes + b"\0", end),
            "byte-missing": sealed(codes[:-1], end),
            "wrong-base-check": sealed(codes, end - 1),
            "version-3": sealed(codes[:1] + bytes([codes[1] ^ 16]) + codes[2:], end),
        }
        for name, bad in cases.items():
            yield refused(f"{kind}-{name}", vector, bad)
    codes, end = bytes.fromhex(raw["codes"]), raw["base_bytes"]
    # A tile side of 0; the rest moves by one byte.
    tiled = codes[:1] + bytes([codes[1] | 8]) + codes[2:13] + b"\0" + codes[13:]
    yield refused("raw-tile-0", raw, sealed(tiled, end + 1))
    beyond = codes[: end - 1] + b"\xff" + codes[end:]
    yield refused("raw-base-beyond-last", raw, sealed(beyond, end))
    long_width = codes[:10] + b"\x90\x00" + codes[11:]
    yield refused("raw-long-varint", raw, sealed(long_width, end + 1))
    other = {**delta, "reference": lists(change_one(delta["reference"]))}
    yield refused("delta-wrong-reference", other, bytes.fromhex(delta["codes"]))
    yield refused("delta-no-reference", {**delta, "reference": None}, bytes.fromhex(delta["codes"]))
    yield refused("version-1", raw, bytes.fromhex("5351010028001800010203049e16121e7f1bf205"))
    yield refused("empty", raw, b"")


def change_one(record: dict[str, Any]) -> LatticeAssignment:
    assignment = LatticeAssignment(
        torch.tensor(record["indices"]), torch.tensor(record["numerators"])
    )
    assignment.indices[0] = (assignment.indices[0] + 1) % 12
    return canonical(assignment, LatticeCode(12, 2, 4)).to_assignment()


def refused(name: str, vector: dict[str, Any], codes: bytes) -> dict[str, Any]:
    return {
        "name": f"refused-{name}",
        "profile": vector["profile"],
        "grid": vector["grid"],
        "codes": codes.hex(),
        "reference": vector["reference"],
        "refused": True,
    }


def document() -> dict[str, Any]:
    """All profiles and vectors."""
    profiles = [Profile(name) for name in PROFILES]
    vectors = [vector for profile in profiles for vector in profile.vectors()]
    vectors += list(refusals(vectors))
    return {
        "format": "SCQ1 version 2",
        "profiles": {profile.name: profile.document() for profile in profiles},
        "vectors": vectors,
    }


def serialized() -> str:
    """The file's text: one profile or vector to a line."""
    whole = document()
    profiles = [f"{json.dumps(n)}: {json.dumps(p)}" for n, p in whole["profiles"].items()]
    vectors = [json.dumps(vector) for vector in whole["vectors"]]
    return (
        f'{{"format": {json.dumps(whole["format"])},\n"profiles": {{\n'
        + ",\n".join(profiles)
        + '\n},\n"vectors": [\n'
        + ",\n".join(vectors)
        + "\n]}\n"
    )


if __name__ == "__main__":
    for path in OUTPUTS:
        path.write_text(serialized())
