"""Rows of a comparison as Markdown, CSV and JSON, with paired intervals between arms.

Knows rows, no model. An arm's seeds are averaged window by window before arms are compared, so an
interval speaks of the text; the spread over seeds stands beside it.
"""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vqllm.evaluation.compare import Row
from vqllm.evaluation.statistics import bootstrap_mean, bootstrap_ratio, ratio_interval

OURS, PUBLISHED = "ours", "VPTQ as published"

Cell = str | float | int | None


@dataclass(frozen=True)
class ArmResult:
    """All seeds of one arm on one text.

    Attributes:
        rows: the arm's rows that have results, one per seed.
        text: which of their results.
    """

    rows: tuple[Row, ...]
    text: str

    @property
    def name(self) -> str:
        return self.rows[0].arm

    @property
    def family(self) -> str:
        return self.rows[0].family

    @property
    def bpw(self) -> float:
        return statistics.fmean(row.bpw for row in self.rows)

    def values(self, metric: str) -> list[float]:
        """One number per seed."""
        return [float(row.results[self.text][metric]) for row in self.rows]

    def mean(self, metric: str) -> float:
        return statistics.fmean(self.values(metric))

    def deviation(self, metric: str) -> float | None:
        """Standard deviation over seeds, None for a single one."""
        values = self.values(metric)
        return statistics.stdev(values) if len(values) > 1 else None

    def windows(self, metric: str) -> NDArray[np.float64]:
        """One number per window, seeds averaged."""
        return np.asarray(
            np.mean([row.results[self.text][f"window_{metric}"] for row in self.rows], axis=0)
        )


@dataclass(frozen=True)
class Duel:
    """Our arm against another at equal or more bits, on one text.

    `ratio` is ours over theirs for perplexity, `kl` ours minus theirs in nats; each with the ends
    of its paired interval.
    """

    ours: str
    theirs: str
    ratio: tuple[float, float, float]
    kl: tuple[float, float, float]

    @property
    def is_won(self) -> bool:
        """Lower perplexity and lower KL, both outside the interval."""
        return self.ratio[2] < 1 and self.kl[2] < 0


def collect(rows: Sequence[Row], text: str) -> list[ArmResult]:
    """Arms that have results on a text, by bits per weight."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if text in row.results:
            groups.setdefault(row.arm, []).append(row)
    arms = [ArmResult(tuple(group), text) for group in groups.values()]
    return sorted(arms, key=lambda arm: (arm.bpw, arm.name))


def duel(ours: ArmResult, theirs: ArmResult) -> Duel:
    """Paired comparison of two arms on the same windows."""
    nll, other = ours.windows("nll"), theirs.windows("nll")
    kl = ours.windows("kl") - theirs.windows("kl")
    ratio, difference = ratio_interval(nll, other), bootstrap_mean(kl)
    return Duel(
        ours.name,
        theirs.name,
        (math.exp(float((nll - other).mean())), ratio.low, ratio.high),
        (float(kl.mean()), difference.low, difference.high),
    )


def duels(arms: Sequence[ArmResult]) -> list[Duel]:
    """Every other arm against ours of least KL among those of as many bits or fewer."""
    result = []
    for theirs in arms:
        ours = [arm for arm in arms if arm.family == OURS and arm.bpw <= theirs.bpw]
        if theirs.family != OURS and ours:
            result.append(duel(min(ours, key=lambda arm: arm.mean("mean_kl")), theirs))
    return result


def _median_seconds(arm: ArmResult) -> int | None:
    """Over the seeds that ran without a stop."""
    seconds = [row.seconds for row in arm.rows if row.seconds]
    return round(statistics.median(seconds)) if seconds else None


_COLUMNS = ("arm", "bpw", "seeds", "ratio", "sd", "interval", "mean KL", "median KL", "p99 KL")
_MORE_COLUMNS = ("top-1", "flips", "MB", "seconds", "peak GB")


def table_cells(arm: ArmResult) -> dict[str, Cell]:
    """One line of the table."""
    low, high = arm.mean("ratio_low"), arm.mean("ratio_high")
    cells: tuple[Cell, ...] = (
        arm.name,
        round(arm.bpw, 3),
        len(arm.rows),
        _rounded(arm.mean("ratio")),
        _rounded(arm.deviation("ratio")),
        f"{_rounded(low)} to {_rounded(high)}",
        *(_rounded(arm.mean(metric)) for metric in ("mean_kl", "median_kl", "p99_kl")),
        round(arm.mean("top1_agreement"), 3),
        round(arm.mean("flips"), 3),
        round(statistics.fmean(row.file_bytes for row in arm.rows) / 1e6, 1),
        _median_seconds(arm),
        round(max(row.peak_bytes for row in arm.rows) / 1e9, 2) or None,
    )
    return dict(zip((*_COLUMNS, *_MORE_COLUMNS), cells, strict=True))


def to_markdown(rows: Sequence[Row], texts: Sequence[str]) -> str:
    """Tables of every text, the duels, the storage types, and what could not be run."""
    parts = []
    for text in texts:
        arms = collect(rows, text)
        if arms:
            parts += [f"### {text}", "", _reference_line(arms[0]), ""]
            parts += [markdown_table([table_cells(arm) for arm in arms]), ""]
            parts += _duel_section(duels(arms))
            parts += _excess_section(arms)
    return "\n".join([*parts, *_types_section(rows), *_failure_section(rows)]).rstrip() + "\n"


def _reference_line(arm: ArmResult) -> str:
    perplexity, tokens = arm.mean("reference_perplexity"), arm.rows[0].results[arm.text]["tokens"]
    return f"Reference perplexity {perplexity:.3f} on {tokens:,} predicted tokens."


def _duel_section(results: Sequence[Duel]) -> list[str]:
    if not results:
        return []
    lines: list[dict[str, Cell]] = [
        {
            "ours": one.ours,
            "against": one.theirs,
            "perplexity, ours / theirs": _with_interval(one.ratio),
            "KL, ours - theirs": _with_interval(one.kl),
            "lower in both, outside the interval": "yes" if one.is_won else "no",
        }
        for one in results
    ]
    return ["Against every peer at equal or more bits:", "", markdown_table(lines), ""]


def excess_removed(ours: ArmResult, theirs: ArmResult) -> tuple[float, float, float]:
    """Part of their loss above the reference's that ours does not have, with its interval."""
    reference = ours.windows("reference_nll")
    our_excess = ours.windows("nll") - reference
    their_excess = theirs.windows("nll") - reference
    interval = bootstrap_ratio(our_excess, their_excess)
    value = float(our_excess.mean() / their_excess.mean())
    return 1 - value, 1 - interval.high, 1 - interval.low


def _excess_section(arms: Sequence[ArmResult]) -> list[str]:
    """VPTQ as published against ours at the same codebook sizes."""
    by_name = {arm.name: arm for arm in arms}
    lines: list[dict[str, Cell]] = []
    for name, arm in by_name.items():
        if not name.startswith(PUBLISHED):
            continue
        same = name.replace(PUBLISHED, "vptq")
        for ours in (by_name.get(same), by_name.get(f"{same} tune-steps 0")):
            if ours is not None:
                part = _with_interval(excess_removed(ours, arm))
                lines.append({"codebooks of": ours.name, "excess loss removed": part})
    if not lines:
        return []
    return ["VPTQ as published against ours, same codebook sizes:", "", markdown_table(lines), ""]


def _types_section(rows: Sequence[Row]) -> list[str]:
    seen = {row.arm: row.types for row in rows if row.types}
    if not seen:
        return []
    lines = [
        f"- {name}: {', '.join(f'{count} {kind}' for kind, count in sorted(types.items()))}"
        for name, types in seen.items()
    ]
    return ["### Storage types of the linears in the peers' files", "", *lines, ""]


def _failure_section(rows: Sequence[Row]) -> list[str]:
    reasons = {row.arm: row.failure for row in rows if row.failure}
    if not reasons:
        return []
    lines = [f"- {name}: {' '.join(reason.split())[-300:]}" for name, reason in reasons.items()]
    return ["### Not run", "", *lines, ""]


def markdown_table(lines: Sequence[dict[str, Cell]]) -> str:
    """A table whose columns are those of the first line."""
    header = list(lines[0])
    rows = [header, ["---"] * len(header)]
    rows += [["" if line[name] is None else str(line[name]) for name in header] for line in lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def to_csv(tables: Mapping[str, Sequence[Row]], texts: Sequence[str]) -> str:
    """The tables of all references and texts, both named in front."""
    lines = [
        {"reference": reference, "text": text, **table_cells(arm)}
        for reference, rows in tables.items()
        for text in texts
        for arm in collect(rows, text)
    ]
    output = io.StringIO()
    columns = ["reference", "text", *_COLUMNS, *_MORE_COLUMNS]
    writer = csv.DictWriter(output, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return output.getvalue()


def to_json(rows: Sequence[Row], texts: Sequence[str]) -> dict[str, Any]:
    """Every row without its windows, and the duels by text."""
    return {
        "rows": [_without_windows(row) for row in rows],
        "duels": {text: [vars(one) for one in duels(collect(rows, text))] for text in texts},
    }


def _without_windows(row: Row) -> dict[str, Any]:
    results = {
        text: {name: value for name, value in result.items() if not name.startswith("window_")}
        for text, result in row.results.items()
    }
    return {**vars(row), "results": results}


def _rounded(value: float | None) -> float | None:
    """Four significant digits."""
    return None if value is None else float(f"{value:.4g}")


def _with_interval(values: tuple[float, float, float]) -> str:
    value, low, high = map(_rounded, values)
    return f"{value} ({low} to {high})"
