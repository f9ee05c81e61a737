"""Hostile bytes for the SCQ1 parser: python -m scq.fuzz --bytes 10000000 --seed 1

Frames of several profiles and every kind (RAW and rANS, key and delta, tiled and not) are damaged
in many ways, most with their checksums made right again so that the damage gets past them, and
mixed with random bytes. A frame must be refused with an ScqError or give a valid assignment, in
bounded time, and the native decoder, where there is one, must find the same. Knows nothing of
networks; models here are a code and tables.
"""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
import torch
import typer

from scq.bitstream.canonical import Grid, canonical
from scq.bitstream.coder import NativeCoder
from scq.bitstream.fitting import CodedGrid, fit_tables
from scq.bitstream.frame import (
    UnpackedFrame,
    base_layer_end,
    pack_delta_frame,
    pack_key_frame,
    unpack,
)
from scq.bitstream.header import CHECKED_FROM, KeyHeader, sealed
from scq.bitstream.tables import EntropyTables
from scq.bitstream.weights import compositions
from scq.errors import CorruptCodes, ScqError
from scq.lattice import LatticeAssignment, LatticeCode
from vqkernels.scq1 import Scq1Error
from vqkernels.status import native_status

CODES = (
    LatticeCode(2, 1, 1),
    LatticeCode(6, 2, 2),
    LatticeCode(90, 2, 4),
    LatticeCode(256, 3, 8),
    LatticeCode(40, 4, 16),
)
GRIDS = ((1, 1), (4, 4), (9, 8), (12, 20))
TILES = (None, 1, 5)

Random = np.random.Generator


@dataclass(frozen=True)
class Subject:
    """A valid frame and what its decoder has at hand."""

    codes: bytes
    base_bytes: int
    code: LatticeCode
    grid: Grid
    tables: EntropyTables
    reference: LatticeAssignment | None
    native: NativeCoder | None


@dataclass(frozen=True)
class FuzzLimits:
    """When to stop, and how much processor time one frame may take."""

    num_bytes: int
    seconds_per_frame: float = 2.0


@dataclass
class FuzzReport:
    """Counts of one run.

    outcomes: frames by mutation and result. slowest: processor seconds of one frame.
    """

    num_frames: int = 0
    num_bytes: int = 0
    slowest: float = 0.0
    seconds: float = 0.0
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)

    def lines(self) -> list[str]:
        """The report for people."""
        results = sorted({result for _, result in self.outcomes})
        head = (
            f"{self.num_bytes} bytes in {self.num_frames} frames, {self.seconds:.0f} s, slowest "
            f"frame {1000 * self.slowest:.1f} ms, no crash"
        )
        table = ["mutation".ljust(20) + "".join(r.rjust(20) for r in results)]
        for mutation in sorted({m for m, _ in self.outcomes}):
            counts = (str(self.outcomes[mutation, r]).rjust(20) for r in results)
            table.append(mutation.ljust(20) + "".join(counts))
        return [head, *table]


class FuzzFailure(AssertionError):
    """A frame that crashed the parser, broke its promise or took too long; holds it in hex."""


@functools.lru_cache(maxsize=1)
def subjects(seed: int) -> list[Subject]:
    """Valid frames of all codes, grids and kinds."""
    generator = np.random.default_rng(seed)
    found = []
    for code in CODES:
        grids = [CodedGrid(_draw(code, 72, generator), (8, 9)) for _ in range(3)]
        tables = fit_tables(grids, code, videos=[grids], base_clusters=4, other_clusters=8)
        native = NativeCoder(code, tables) if native_status().available else None
        for grid in GRIDS:
            found += _subjects_on(code, grid, tables, native, generator)
    return found


def fuzz(
    limits: FuzzLimits, seed: int, progress: Callable[[int], object] | None = None
) -> FuzzReport:
    """Feed the parser damaged frames. Raises FuzzFailure for the first that it mishandles."""
    generator = np.random.default_rng([seed, 1])
    pool, report = subjects(seed), FuzzReport()
    names = sorted(_MUTATIONS)
    started = time.perf_counter()
    while report.num_bytes < limits.num_bytes:
        subject = pool[generator.integers(len(pool))]
        name = names[generator.integers(len(names))]
        codes = _MUTATIONS[name](subject, generator, pool)
        if generator.random() < 0.9:
            codes = repaired(codes, subject)
        _try(codes, subject, bool(generator.integers(2)), name, report)
        if report.slowest > limits.seconds_per_frame:
            raise FuzzFailure(f"{report.slowest:.1f} s for {codes.hex()} on {subject.grid}")
        if progress is not None:
            progress(report.num_bytes)
    report.seconds = time.perf_counter() - started
    return report


def repaired(codes: bytes, subject: Subject) -> bytes:
    """The bytes with both checks right, as far as they have the form of a frame."""
    if len(codes) < CHECKED_FROM:
        return codes
    try:
        end = base_layer_end(codes, subject.code, subject.grid)
    except CorruptCodes:
        end = subject.base_bytes
    return sealed(codes, min(end, len(codes)))


def _try(codes: bytes, subject: Subject, partial: bool, name: str, report: FuzzReport) -> None:
    started = time.process_time()
    found: UnpackedFrame | None = None
    try:
        frame = unpack(
            codes,
            subject.code,
            subject.grid,
            tables=subject.tables,
            reference=subject.reference,
            allow_partial=partial,
        )
    except ScqError as error:
        if not isinstance(error, CorruptCodes):
            raise FuzzFailure(f"{type(error).__name__} for {codes.hex()}: {error}") from error
        result = type(error).__name__
    except Exception as error:
        raise FuzzFailure(f"{error!r} for {codes.hex()} on {subject.grid}") from error
    else:
        found = frame
        result = "decoded" if frame.complete else "base layer"
        _check(frame, codes, subject)
    report.slowest = max(report.slowest, time.process_time() - started)
    _compare(found, codes, subject, partial)
    report.num_frames += 1
    report.num_bytes += len(codes)
    report.outcomes[name, result] += 1


def _compare(found: UnpackedFrame | None, codes: bytes, subject: Subject, partial: bool) -> None:
    """The native decoder must find what the reference found, and refuse what it refused."""
    if subject.native is None:
        return
    try:
        frame = subject.native.unpack_natively(
            codes, subject.grid, reference=subject.reference, allow_partial=partial
        )
    except (CorruptCodes, Scq1Error) as error:
        if found is not None:
            raise FuzzFailure(f"only the native decoder refuses {codes.hex()}: {error}") from error
        return
    if found is None or not (
        found.complete == frame.complete
        and torch.equal(found.assignment.indices, frame.assignment.indices)
        and torch.equal(found.assignment.numerators, frame.assignment.numerators)
    ):
        raise FuzzFailure(f"the native decoder finds something else in {codes.hex()}")


def _check(frame: UnpackedFrame, codes: bytes, subject: Subject) -> None:
    """What was decoded must be a canonical assignment of the grid."""
    try:
        latents = canonical(frame.assignment, subject.code)
    except ScqError as error:
        raise FuzzFailure(f"invalid assignment from {codes.hex()}: {error}") from error
    same = np.array_equal(latents.indices, frame.assignment.indices.numpy())
    same &= np.array_equal(latents.numerators, frame.assignment.numerators.numpy())
    if not same or len(latents) != subject.grid[0] * subject.grid[1]:
        raise FuzzFailure(f"assignment from {codes.hex()} is not canonical")


def _draw(code: LatticeCode, count: int, generator: Random) -> LatticeAssignment:
    indices = np.zeros((count, code.max_support), np.int64)
    numerators = np.zeros_like(indices)
    for row in range(count):
        size = int(generator.integers(1, code.max_support + 1))
        choices = compositions(code.denominator, size)
        indices[row, :size] = generator.choice(code.num_codes, size, replace=False)
        numerators[row, :size] = choices[generator.integers(len(choices))]
    loose = LatticeAssignment(torch.from_numpy(indices), torch.from_numpy(numerators))
    return canonical(loose, code).to_assignment()


def _subjects_on(
    code: LatticeCode,
    grid: Grid,
    tables: EntropyTables,
    native: NativeCoder | None,
    generator: Random,
) -> list[Subject]:
    before, now = (_draw(code, grid[0] * grid[1], generator) for _ in range(2))
    keep = torch.from_numpy(generator.random(len(now)) < 0.6)[:, None]
    now = LatticeAssignment(
        torch.where(keep, before.indices, now.indices),
        torch.where(keep, before.numerators, now.numerators),
    )
    header = KeyHeader(16 * grid[1], 16 * grid[0], b"fuzz")
    found = []
    for tile in TILES:
        raw, rans = (
            pack_key_frame(header, now, code, grid, tables=tables, tile=tile, entropy=e)
            for e in ("raw", "rans")
        )
        delta = pack_delta_frame(
            b"fuzz", now, code, grid, reference=before, tables=tables, tile=tile
        )
        for frame in (raw, rans, delta):
            found.append(Subject(frame.codes, frame.base_bytes, code, grid, tables, before, native))
    return found


def _set_bytes(subject: Subject, generator: Random, pool: Sequence[Subject]) -> bytes:
    codes = bytearray(subject.codes)
    for _ in range(1 + generator.geometric(0.5)):
        codes[generator.integers(len(codes))] = generator.integers(256)
    return bytes(codes)


def _flip_bit(subject: Subject, generator: Random, pool: Sequence[Subject]) -> bytes:
    codes = bytearray(subject.codes)
    codes[generator.integers(CHECKED_FROM, len(codes))] ^= 1 << generator.integers(8)
    return bytes(codes)


def _change_header(subject: Subject, generator: Random, pool: Sequence[Subject]) -> bytes:
    codes = bytearray(subject.codes)
    places = [1, *range(CHECKED_FROM, min(len(codes), 20))]
    codes[places[generator.integers(len(places))]] = generator.choice([0, 1, 127, 128, 255])
    codes[1] = 32 | (codes[1] ^ generator.integers(16)) & 15
    return bytes(codes)


def _cut(subject: Subject, generator: Random, pool: Sequence[Subject]) -> bytes:
    return subject.codes[: generator.integers(len(subject.codes) + 1)]


def _extend(subject: Subject, generator: Random, pool: Sequence[Subject]) -> bytes:
    return subject.codes + generator.bytes(int(generator.integers(1, 40)))


def _splice(subject: Subject, generator: Random, pool: Sequence[Subject]) -> bytes:
    other = pool[int(generator.integers(len(pool)))].codes
    head = subject.codes[: generator.integers(len(subject.codes) + 1)]
    return head + other[int(generator.integers(len(other))) :]


def _move_bytes(subject: Subject, generator: Random, pool: Sequence[Subject]) -> bytes:
    start, end = sorted(generator.integers(CHECKED_FROM, len(subject.codes) + 1, 2).tolist())
    rest = subject.codes[:start] + subject.codes[end:]
    place = int(generator.integers(start, len(rest) + 1))
    return rest[:place] + subject.codes[start:end] * int(generator.integers(3)) + rest[place:]


def _random_body(subject: Subject, generator: Random, pool: Sequence[Subject]) -> bytes:
    return subject.codes[:14] + generator.bytes(int(generator.integers(300)))


def _random_bytes(subject: Subject, generator: Random, pool: Sequence[Subject]) -> bytes:
    return generator.bytes(int(generator.integers(200)))


def _random_frame(subject: Subject, generator: Random, pool: Sequence[Subject]) -> bytes:
    start = bytes([0x53, 32 | int(generator.integers(16))])
    return start + generator.bytes(int(generator.integers(8, 300)))


_Mutation = Callable[[Subject, Random, Sequence[Subject]], bytes]
_MUTATIONS: dict[str, _Mutation] = {
    "set bytes": _set_bytes,
    "flip a bit": _flip_bit,
    "change the header": _change_header,
    "cut": _cut,
    "extend": _extend,
    "splice": _splice,
    "move bytes": _move_bytes,
    "random body": _random_body,
    "random frame": _random_frame,
    "random bytes": _random_bytes,
}


def main(
    num_bytes: Annotated[int, typer.Option("--bytes", help="Stop after this many bytes.")] = 10**7,
    seed: Annotated[int, typer.Option(help="Same seed, same frames.")] = 1,
    limit: Annotated[float, typer.Option(help="Processor seconds that one frame may take.")] = 2.0,
) -> None:
    """Feed the SCQ1 parser hostile bytes; exits with an error for the first mishandled frame."""
    with typer.progressbar(length=num_bytes, label="fuzzing") as bar:
        report = fuzz(FuzzLimits(num_bytes, limit), seed, lambda n: bar.update(n - bar.pos))
    for line in report.lines():
        typer.echo(line)


if __name__ == "__main__":
    typer.run(main)
