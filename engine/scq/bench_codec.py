"""``python -m scq.bench_codec``: times the frame codec, stage by stage, beside picture formats.

Every contender codes the same 256x256 picture (sign models: 32x32) in turns within one run, so
that load on the machine hits all alike; one thread; p50 and p95 over the rounds. Not part of the
library: this module prints.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from scq import zoo
from scq.codec import FrameCodec
from scq.compare.points import FilePoint, OperatingPoint, ScqPoint, available_formats
from scq.compare.report import circumstances, markdown_table, replace_section
from scq.errors import ScqError
from scq.images import Pixels, read_image

_T = TypeVar("_T")

SIDE, CROP_SIDE = 256, 32
MIN_ROUNDS = 100
_WARM_UP = 3
# Milliseconds at the 95th percentile that a 256x256 frame may take on one core.
TARGETS = {"encode": 15.0, "decode": 5.0}
# About the middle of each format's useful range; time depends on it little.
_QUALITY = {"jpeg": 30, "webp": 30, "avif": 30, "jxl": 30}


@dataclass(frozen=True)
class Timing:
    """One operation of one contender: milliseconds over the rounds, and the bytes it made."""

    contender: str
    operation: str
    p50_ms: float
    p95_ms: float
    coded_bytes: int
    rounds: int


@dataclass(frozen=True)
class _Contender:
    point: OperatingPoint
    image: Pixels
    codes: bytes


def photograph(side: int, seed: int = 0) -> Pixels:
    """A picture with the 1/f spectrum of photographs and some edges, uint8 (side, side, 3)."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    frequency[0, 0] = 1
    planes = []
    for _ in range(3):
        spectrum = rng.normal(size=frequency.shape) + 1j * rng.normal(size=frequency.shape)
        planes.append(np.fft.irfft2(spectrum / frequency**1.3, s=(side, side)))
    shared = planes[0]
    mixed = np.stack([shared + 0.4 * plane for plane in planes], 2)
    mixed = 110 + 45 * (mixed - mixed.mean()) / mixed.std()
    rows, columns = np.mgrid[0:side, 0:side]
    mixed[rows > 0.6 * side + 0.2 * columns] *= 0.6
    mixed[(rows - side // 3) ** 2 + (columns - side // 2) ** 2 < (side // 6) ** 2] += 60
    picture: Pixels = mixed.clip(0, 255).astype(np.uint8)
    return picture


def bench(codecs: Sequence[FrameCodec], image: Pixels, rounds: int = MIN_ROUNDS) -> list[Timing]:
    """Time every codec and format on `image`, cropped or synthesised to each model's size.

    Raises:
        ScqError: fewer than 100 rounds.
    """
    if rounds < MIN_ROUNDS:
        raise ScqError(f"p95 needs at least {MIN_ROUNDS} rounds, got {rounds}")
    torch.set_num_threads(1)
    contenders = [_contender(point, image) for point in _points(codecs)]
    samples: dict[tuple[int, str], list[float]] = {}
    for turn in range(_WARM_UP + rounds):
        for position, contender in enumerate(contenders):
            for operation, seconds in _time_once(contender).items():
                kept = samples.setdefault((position, operation), [])
                if turn >= _WARM_UP:
                    kept.append(1000 * seconds)
    return [
        _timing(contenders[position], operation, milliseconds)
        for (position, operation), milliseconds in samples.items()
    ]


def _points(codecs: Sequence[FrameCodec]) -> list[OperatingPoint]:
    points: list[OperatingPoint] = []
    for codec in codecs:
        points.append(ScqPoint(codec, "raw"))
        if codec.tables is not None:
            points.append(ScqPoint(codec, "rans"))
    return points + [FilePoint(name, _QUALITY[name]) for name in available_formats()[0]]


def _contender(point: OperatingPoint, image: Pixels) -> _Contender:
    crop = isinstance(point, ScqPoint) and point.frames.config.kind == "crop"
    shown = np.ascontiguousarray(image[:CROP_SIDE, :CROP_SIDE]) if crop else image
    return _Contender(point, shown, point.encode(shown))


def _time_once(contender: _Contender) -> dict[str, float]:
    """Seconds of each operation, and of the encoder's stages where it is ours."""
    point, image = contender.point, contender.image
    if isinstance(point, ScqPoint):
        encoded, total = _timed(lambda: point.frames.encode(image, entropy=point.entropy))
        times = {"encode": total} | {
            f"encode: {stage}": seconds for stage, seconds in encoded.stats.seconds.items()
        }
    else:
        times = {"encode": _timed(lambda: point.encode(image))[1]}
    times["decode"] = _timed(lambda: point.decode(contender.codes))[1]
    if isinstance(point, ScqPoint):
        times["decode: to codes"] = _timed(lambda: point.frames.read(contender.codes))[1]
    return times


def _timed(call: Callable[[], _T]) -> tuple[_T, float]:
    started = time.perf_counter()
    result = call()
    return result, time.perf_counter() - started


def _timing(contender: _Contender, operation: str, milliseconds: list[float]) -> Timing:
    middle, high = np.percentile(milliseconds, (50, 95)).tolist()
    height, width = contender.image.shape[:2]
    return Timing(
        contender=f"{contender.point.codec} {contender.point.setting}, {width}x{height}",
        operation=operation,
        p50_ms=middle,
        p95_ms=high,
        coded_bytes=len(contender.codes),
        rounds=len(milliseconds),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m scq.bench_codec", description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the timings to this file")
    parser.add_argument("--image", type=Path, help="a picture, else a synthetic one")
    parser.add_argument("--report", type=Path, help="Markdown page whose codec section to renew")
    parser.add_argument("--rounds", type=int, default=MIN_ROUNDS)
    chosen = parser.parse_args(arguments)
    image = photograph(SIDE)
    if chosen.image is not None:
        image = _centre(read_image(chosen.image.read_bytes()))
    codecs = [FrameCodec(zoo.load(info.name)) for info in zoo.list_models()]
    timings = bench(codecs, image, chosen.rounds)
    _print(timings)
    if chosen.report is not None:
        replace_section(chosen.report, "codec", _section(timings))
    if chosen.json is not None:
        rows = [asdict(timing) for timing in timings]
        chosen.json.write_text(json.dumps(rows, indent=1) + "\n")


def _centre(image: Pixels) -> Pixels:
    height, width = image.shape[:2]
    if min(height, width) < SIDE:
        raise ScqError(f"--image is {width}x{height}, it must be at least {SIDE} a side")
    top, left = (height - SIDE) // 2, (width - SIDE) // 2
    return np.ascontiguousarray(image[top : top + SIDE, left : left + SIDE])


def _section(timings: Sequence[Timing]) -> str:
    rows = [_cells(timing) for timing in timings]
    conditions = circumstances("python -m scq.bench_codec")
    return "\n\n".join((
        "## Time of one frame",
        f"One synthetic 256x256 picture (sign models: 32x32), {timings[0].rounds} rounds in turns. "
        f"{conditions}",
        _verdict(timings),
        markdown_table(_HEADER, rows),
    ))  # fmt: skip


def _verdict(timings: Sequence[Timing]) -> str:
    """Which of the targets are met, by the worst of our frames."""
    parts = []
    for operation, limit in TARGETS.items():
        found = [
            timing.p95_ms
            for timing in timings
            if timing.operation == operation
            and timing.contender.startswith("scq ")
            and timing.contender.endswith(f", {SIDE}x{SIDE}")
        ]
        if found:
            met = "met" if max(found) <= limit else "missed"
            parts.append(
                f"{operation} within {limit:g} ms p95: **{met}**, {min(found):.1f} to "
                f"{max(found):.1f} ms"
            )
    return f"Targets on one core, {SIDE}x{SIDE}: {'; '.join(parts) or 'no such frame here'}."


_HEADER = ("contender", "operation", "p50 ms", "p95 ms", "bytes")


def _cells(timing: Timing) -> list[str]:
    times = (f"{value:.2f}" for value in (timing.p50_ms, timing.p95_ms))
    return [timing.contender, timing.operation, *times, str(timing.coded_bytes)]


def _print(timings: Sequence[Timing]) -> None:
    table = Table(*_HEADER, title=f"one thread, {timings[0].rounds} interleaved rounds")
    for timing in timings:
        table.add_row(*_cells(timing))
    Console().print(table)


if __name__ == "__main__":
    main()
