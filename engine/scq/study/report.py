"""Tables in Markdown from the CSV files of a study's folder: mean and spread over the seeds.

Knows no training. Comparisons at equal bytes go along the SCQ curve: its PSNR at the bytes of the
other method, by a straight line through its two nearest points of the same seed, less the other's.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from scq.errors import ScqError
from scq.study.results import ResultRow, TraceRow, read_rows
from scq.study.spec import STUDIES, Study

_CURVE_LABEL = "s=2 n=2"
# How far beyond the curve's own ends a comparison may go, as a share of the end's bytes.
_MAX_EXTRAPOLATION = 0.1

_Row = TypeVar("_Row", ResultRow, TraceRow)
Measure = Callable[[ResultRow], float]


@dataclass(frozen=True)
class _Column:
    title: str
    value: Measure
    digits: int
    spread: bool = False


_COLUMNS = (
    _Column("bits a latent", lambda row: row.raw_bits_per_latent, 2),
    _Column("RAW bytes", lambda row: row.raw_bytes, 2),
    _Column("rANS bytes", lambda row: row.rans_bytes, 2, spread=True),
    _Column("MSE x 1000", lambda row: 1000 * row.mse, 3, spread=True),
    _Column("PSNR dB", lambda row: row.psnr_db, 2, spread=True),
    _Column("MSE x 1000, not coded", lambda row: 1000 * row.forward_mse, 3),
    _Column("latent MSE", lambda row: row.latent_mse, 4),
    _Column("codes used", lambda row: row.top1_usage, 3),
    _Column("perplexity", lambda row: row.perplexity, 0),
    _Column("by mass", lambda row: row.mass_perplexity, 0),
)


def report(folder: Path) -> str:
    """Every table that the results in `folder` allow.

    Raises ScqError when there are no results.
    """
    rows = read_rows(folder / "results.csv", ResultRow)
    if not rows:
        raise ScqError(f"{folder}: no results.csv with finished runs; run a study with --out first")
    traces = read_rows(folder / "traces.csv", TraceRow)
    parts = []
    for study in STUDIES.values():
        order = {variant.label: number for number, variant in enumerate(study.variants)}
        own = [row for row in rows if _belongs(row, study)]
        own.sort(key=lambda row: (order[_base_label(row.label)], row.rate_weight, row.seed))
        if own:
            parts += _study_tables(study, own)
        if study.traced:
            parts += _trace_table(study.name, [row for row in traces if _belongs(row, study)])
    parts += _equal_bytes(rows)
    return "\n".join(parts)


def _belongs(row: ResultRow | TraceRow, study: Study) -> bool:
    return _base_label(row.label) in {variant.label for variant in study.variants}


def _base_label(label: str) -> str:
    """The variant's own label, without the rate weight that a row may add."""
    return label.split(" w=")[0]


def _study_tables(study: Study, rows: Sequence[ResultRow]) -> list[str]:
    parts = [f"### {study.name}", "", study.question, ""]
    for pictures, own in sorted(_grouped(rows, lambda row: row.pictures).items()):
        parts += [f"{pictures}, seeds {_seeds(own)}:", "", *_result_table(own), ""]
    return parts


def _result_table(rows: Sequence[ResultRow]) -> list[str]:
    lines = _header(["quantizer", *(column.title for column in _COLUMNS), "n"])
    for label, own in _grouped(rows, lambda row: row.label).items():
        cells = [_cell(column, own) for column in _COLUMNS]
        lines.append(_line([label, *cells, str(len(own))]))
    return lines


def _cell(column: _Column, rows: Sequence[ResultRow]) -> str:
    values = [column.value(row) for row in rows]
    return _mean(values, column.digits, spread=column.spread)


def _trace_table(name: str, rows: Sequence[TraceRow]) -> list[str]:
    """KKT residual and support at the first, middle and last step logged."""
    if not rows:
        return []
    steps = sorted({row.step for row in rows})
    shown = sorted({steps[0], steps[len(steps) // 2], steps[-1]})
    titles = [f"{name}, step {step}" for step in shown for name in ("KKT max", "support")]
    lines = [f"### {name}: while training", "", *_header(["quantizer", *titles])]
    for label, own in _grouped(rows, lambda row: row.label).items():
        cells = []
        for step in shown:
            here = [row for row in own if row.step == step]
            cells.append(f"{max((row.kkt_residual for row in here), default=math.nan):.1e}")
            cells.append(_mean([row.support for row in here], 1))
        lines.append(_line([label, *cells]))
    return [*lines, ""]


def _equal_bytes(rows: Sequence[ResultRow]) -> list[str]:
    """Gain of the SCQ curves over every other coded variant, in dB, at that variant's bytes."""
    coded = [row for row in rows if row.study in ("rate", "curve") and row.raw_bytes > 0]
    titles = ["SCQ against, RAW bytes", "rANS bytes", "rate-aware SCQ against, rANS bytes"]
    lines: list[str] = []
    for pictures, own in sorted(_grouped(coded, lambda row: row.pictures).items()):
        for label, others in sorted(_grouped(own, lambda row: row.label).items()):
            if _CURVE_LABEL in label:
                continue
            gains = [[gain(own, row) for row in others] for gain in _GAINS]
            if any(not math.isnan(value) for values in gains for value in values):
                cells = [_mean(values, 2, spread=True, sign=True) for values in gains]
                lines.append(_line([pictures, label, *cells, str(len(others))]))
    if not lines:
        return []
    head = _header(["pictures", "quantizer", *titles, "n"])
    return ["### equal bytes", "", "Gain of SCQ s=2 n=2 in dB:", "", *head, *lines, ""]


def _gain_raw(rows: Iterable[ResultRow], other: ResultRow) -> float:
    if other.rate_weight:
        return math.nan
    curve = [(row.raw_bytes, row.psnr_db) for row in _curve(rows, other.seed, aware=False)]
    return interpolate(sorted(curve), other.raw_bytes) - other.psnr_db


def _gain_rans(rows: Iterable[ResultRow], other: ResultRow) -> float:
    curve = [(row.rans_bytes, row.psnr_db) for row in _curve(rows, other.seed, aware=False)]
    return interpolate(sorted(curve), other.rans_bytes) - other.psnr_db


def _gain_aware(rows: Iterable[ResultRow], other: ResultRow) -> float:
    curve = [(row.rans_bytes, row.psnr_db) for row in _curve(rows, other.seed, aware=True)]
    return interpolate(sorted(curve), other.rans_bytes) - other.psnr_db


_GAINS = (_gain_raw, _gain_rans, _gain_aware)


def _curve(rows: Iterable[ResultRow], seed: int, *, aware: bool) -> list[ResultRow]:
    return [
        row
        for row in rows
        if _CURVE_LABEL in row.label and row.seed == seed and bool(row.rate_weight) == aware
    ]


def interpolate(curve: Sequence[tuple[float, float]], position: float) -> float:
    """Value at `position` of the line through the two points of `curve` (ascending) around it.

    Beyond the ends by up to a tenth the last line goes on; farther, or with fewer than two
    points, the answer is NaN.
    """
    if len(curve) < 2 or math.isnan(position):
        return math.nan
    first, last = curve[0][0], curve[-1][0]
    if position < first * (1 - _MAX_EXTRAPOLATION) or position > last * (1 + _MAX_EXTRAPOLATION):
        return math.nan
    above = next((i for i, point in enumerate(curve) if point[0] >= position), len(curve) - 1)
    low, high = curve[max(above, 1) - 1], curve[max(above, 1)]
    return low[1] + (high[1] - low[1]) * (position - low[0]) / (high[0] - low[0])


def _grouped(rows: Iterable[_Row], key: Callable[[_Row], str]) -> dict[str, list[_Row]]:
    groups: dict[str, list[_Row]] = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return dict(groups)


def _mean(values: Sequence[float], digits: int, *, spread: bool = False, sign: bool = False) -> str:
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return "-"
    text = f"{statistics.fmean(known):{'+' if sign else ''}.{digits}f}"
    if spread and len(known) > 1:
        text += f" ± {statistics.stdev(known):.{digits}f}"
    return text


def _seeds(rows: Sequence[ResultRow]) -> str:
    return ", ".join(str(seed) for seed in sorted({row.seed for row in rows}))


def _header(titles: Sequence[str]) -> list[str]:
    return [_line(titles), _line(["---", *["---:"] * (len(titles) - 1)])]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
