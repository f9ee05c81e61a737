"""From a recording to figures, a table and JSON. Percentiles are exact, over all samples."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from rich.console import Group
from rich.table import Table

from openloop.generator import Recording
from openloop.outcome import Fate, Outcome


@dataclass(frozen=True)
class Objective:
    """What a request must keep to count as good, in milliseconds; None asks nothing."""

    latency_ms: float | None = None
    ttft_ms: float | None = None

    def __str__(self) -> str:
        limits = {"latency": self.latency_ms, "first token": self.ttft_ms}
        kept = [f"{name} <= {limit:g} ms" for name, limit in limits.items() if limit is not None]
        return " and ".join(kept) or "answered at all"

    def is_met(self, outcome: Outcome) -> bool:
        """Whether a request was answered well and in time."""
        if outcome.fate is not Fate.OK:
            return False
        first = outcome.time_to_first_token
        is_latency_met = self.latency_ms is None or 1000 * outcome.latency <= self.latency_ms
        is_first_met = self.ttft_ms is None or (first is not None and 1000 * first <= self.ttft_ms)
        return is_latency_met and is_first_met


@dataclass(frozen=True)
class Percentiles:
    """Nearest-rank percentiles of a sample, in milliseconds; NaN of an empty one."""

    p50: float
    p90: float
    p99: float
    max: float
    count: int

    @classmethod
    def of_seconds(cls, samples: Sequence[float]) -> Percentiles:
        ordered = sorted(1000 * sample for sample in samples)
        if not ordered:
            return cls(math.nan, math.nan, math.nan, math.nan, 0)
        p50, p90, p99 = (ordered[rank_of(part, len(ordered))] for part in (0.5, 0.9, 0.99))
        return cls(p50, p90, p99, ordered[-1], len(ordered))


def rank_of(fraction: float, count: int) -> int:
    """Index of the smallest of `count` ordered samples that `fraction` of them do not exceed."""
    return max(math.ceil(fraction * count) - 1, 0)


@dataclass(frozen=True)
class Summary:
    """The figures of a run. Latency, TTFT and ITL are of answered requests, from the due time;
    ratios and goodput are of all requests; rates are per second, `*_kbps` in kilobits per second.
    """

    requests: int
    fates: dict[str, int]
    reasons: dict[str, int]
    seconds: float
    offered_rate: float
    achieved_rate: float
    latency: Percentiles
    ttft: Percentiles
    itl: Percentiles
    slip: Percentiles
    tokens_per_second: float
    sent_kbps: float
    received_kbps: float
    goodput_rate: float
    goodput_ratio: float
    client_cpu: float

    def ratio(self, fate: Fate) -> float:
        """The share of requests that ended so."""
        return self.fates[fate] / self.requests

    def to_json(self) -> dict[str, Any]:
        """A JSON object; percentiles of empty samples are null."""
        return {name: _json_value(value) for name, value in asdict(self).items()}


def summarize(recording: Recording, span: float, objective: Objective) -> Summary:
    """The figures of a run whose schedule covered `span` seconds."""
    outcomes, seconds = recording.outcomes, max(recording.seconds, span)
    answered = [outcome for outcome in outcomes if outcome.fate is Fate.OK]
    firsts = [outcome.time_to_first_token for outcome in answered]
    num_good = sum(objective.is_met(outcome) for outcome in outcomes)
    return Summary(
        requests=len(outcomes),
        fates={fate: sum(outcome.fate is fate for outcome in outcomes) for fate in Fate},
        reasons=dict(Counter(outcome.reason for outcome in outcomes if outcome.reason)),
        seconds=seconds,
        offered_rate=len(outcomes) / span,
        achieved_rate=len(answered) / seconds,
        latency=Percentiles.of_seconds([outcome.latency for outcome in answered]),
        ttft=Percentiles.of_seconds([first for first in firsts if first is not None]),
        itl=Percentiles.of_seconds([gap for outcome in answered for gap in _gaps(outcome)]),
        slip=Percentiles.of_seconds([outcome.slip for outcome in outcomes]),
        tokens_per_second=sum(outcome.reply.num_tokens for outcome in answered) / seconds,
        sent_kbps=_kilobits(sum(outcome.reply.sent_bytes for outcome in answered)) / seconds,
        received_kbps=_kilobits(sum(o.reply.received_bytes for o in answered)) / seconds,
        goodput_rate=num_good / seconds,
        goodput_ratio=num_good / len(outcomes),
        client_cpu=recording.cpu_seconds / seconds,
    )


def table_of(title: str, summary: Summary, objective: Objective) -> Group:
    """The report for a person; lines that do not apply are left out."""
    table = Table("milliseconds")
    for column in ("p50", "p90", "p99", "max"):
        table.add_column(column, justify="right")
    _add_percentiles(table, "latency", summary.latency)
    _add_percentiles(table, "first token", summary.ttft)
    _add_percentiles(table, "between pieces", summary.itl)
    _add_percentiles(table, "schedule slip", summary.slip)
    lines = Table.grid(padding=(0, 2))
    for name, value in _lines(summary, objective):
        lines.add_row(name, value)
    return Group("", title, table, lines)


def _lines(summary: Summary, objective: Objective) -> list[tuple[str, str]]:
    fates = ", ".join(f"{count} {fate}" for fate, count in summary.fates.items() if count)
    lines = [
        ("requests", f"{summary.requests}: {fates}"),
        ("rate /s", f"{summary.offered_rate:.2f} offered, {summary.achieved_rate:.2f} answered"),
        ("payload", f"{summary.sent_kbps:.0f} kbit/s out, {summary.received_kbps:.1f} kbit/s in"),
        ("goodput", f"{summary.goodput_ratio:.0%}, {summary.goodput_rate:.2f} /s ({objective})"),
        ("client CPU", f"{summary.client_cpu:.0%} of one core"),
    ]
    if summary.tokens_per_second:
        lines.insert(2, ("tokens /s", f"{summary.tokens_per_second:.1f}"))
    lines += [("reason", f"{count} x {reason}") for reason, count in summary.reasons.items()]
    return lines


def _add_percentiles(table: Table, name: str, figures: Percentiles) -> None:
    if figures.count:
        values = (figures.p50, figures.p90, figures.p99, figures.max)
        table.add_row(name, *(f"{value:.1f}" for value in values))


def _gaps(outcome: Outcome) -> list[float]:
    return [after - before for before, after in pairwise(outcome.reply.piece_times)]


def _kilobits(num_bytes: int) -> float:
    return 8 * num_bytes / 1000


def _json_value(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _json_value(inner) for name, inner in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value
