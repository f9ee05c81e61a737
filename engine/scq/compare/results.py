"""What can be read off measured points: CSV rows, neighbours in bytes, bytes for an accuracy."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from scq.compare.measure import PointResult
from scq.metrics import wilson_interval

ACCURACY_COLUMNS = (
    "decoded_accuracy", "decoded_low", "decoded_high", "codes_accuracy", "codes_low", "codes_high",
)  # fmt: skip


@dataclass(frozen=True)
class EqualAccuracy:
    """What a codec needs for some accuracy. relation: "=" interpolated, "<=" at its lowest rate
    already, ">" not reached at its highest measured rate; bytes go with it."""

    codec: str
    relation: str
    mean_bytes: float


def write_csv(points: Sequence[PointResult], path: Path) -> None:
    """One row a point, with 95 % Wilson intervals of the accuracies; empty where not measured."""
    names = [field.name for field in fields(PointResult)]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*names, *ACCURACY_COLUMNS])
        for point in points:
            values = asdict(point)
            accuracies = _accuracies(point.decoded_right, point.n)
            accuracies += _accuracies(point.codes_right, point.n)
            writer.writerow([_cell(values[name]) for name in names] + accuracies)


def by_codec(points: Sequence[PointResult]) -> dict[str, list[PointResult]]:
    """Points of each codec, fewest bytes first, codecs in the order of their first point."""
    curves: dict[str, list[PointResult]] = {}
    for point in points:
        curves.setdefault(point.codec, []).append(point)
    return {codec: sorted(curve, key=lambda p: p.mean_bytes) for codec, curve in curves.items()}


def nearest_at_or_above(curve: Sequence[PointResult], mean_bytes: float) -> PointResult | None:
    """The point of fewest bytes that are no fewer than `mean_bytes`; None if there is none."""
    enough = [point for point in curve if point.mean_bytes >= mean_bytes]
    return min(enough, key=lambda point: point.mean_bytes) if enough else None


def bytes_for_accuracy(curve: Sequence[PointResult], accuracy: float) -> EqualAccuracy | None:
    """Mean bytes at which a curve reaches a decoded accuracy, linear in log bytes between points.

    The curve's running maximum is used, so a dip that is noise does not move the answer. None
    for a curve without accuracies.
    """
    known = [(p.mean_bytes, p.decoded_accuracy) for p in curve if p.decoded_accuracy is not None]
    if not known:
        return None
    codec, best = curve[0].codec, -1.0
    previous = known[0][0]
    for position, (size, reached) in enumerate(sorted(known)):
        if reached >= accuracy:
            if position == 0:
                return EqualAccuracy(codec, "<=", size)
            share = (accuracy - best) / (reached - best)
            log_size = math.log(previous) + share * (math.log(size) - math.log(previous))
            return EqualAccuracy(codec, "=", math.exp(log_size))
        if reached >= best:
            best, previous = reached, size
    return EqualAccuracy(codec, ">", max(size for size, _ in known))


def _accuracies(right: int | None, n: int) -> list[str]:
    if right is None:
        return ["", "", ""]
    return [_cell(value) for value in (right / n, *wilson_interval(right, n))]


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)
