"""A load test as a TOML file: what is sent, how fast, and what must hold.

Tables: [scenario] driver, slo_latency_ms, slo_ttft_ms, drain_seconds; [arrivals], [workload] and
[thresholds] as in the dataclasses of the same names. Unknown keys are refused.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from openloop.arrivals import ArrivalKind, Arrivals
from openloop.drivers import DriverName
from openloop.outcome import Fate
from openloop.report import Objective, Summary
from openloop.workload import Workload

T = TypeVar("T")

_HEAD_KEYS = {"driver", "slo_latency_ms", "slo_ttft_ms", "drain_seconds"}
_TABLES = {"scenario", "arrivals", "workload", "thresholds"}


class ScenarioError(ValueError):
    """A scenario file that cannot be read or says something senseless."""


@dataclass(frozen=True)
class Thresholds:
    """Limits that --check holds a run to; None asks nothing. `max_slip_p99_ms` and
    `max_client_cpu` are about the generator: beyond them the run measured itself.
    """

    max_latency_p99_ms: float | None = None
    max_ttft_p99_ms: float | None = None
    max_itl_p99_ms: float | None = None
    max_rejected_ratio: float | None = None
    max_failed_ratio: float | None = 0.0
    min_goodput_ratio: float | None = None
    min_tokens_per_second: float | None = None
    max_slip_p99_ms: float | None = 25.0
    max_client_cpu: float | None = 0.9

    def breaches(self, summary: Summary) -> list[str]:
        """One sentence per limit that the run did not keep."""
        failed = sum(summary.ratio(fate) for fate in (Fate.ERROR, Fate.UNFINISHED, Fate.DROPPED))
        measured = {
            "max_latency_p99_ms": summary.latency.p99,
            "max_ttft_p99_ms": summary.ttft.p99,
            "max_itl_p99_ms": summary.itl.p99,
            "max_rejected_ratio": summary.ratio(Fate.REJECTED),
            "max_failed_ratio": failed,
            "min_goodput_ratio": summary.goodput_ratio,
            "min_tokens_per_second": summary.tokens_per_second,
            "max_slip_p99_ms": summary.slip.p99,
            "max_client_cpu": summary.client_cpu,
        }
        return [
            f"{name} is {limit:g}, measured {measured[name]:.4g}"
            for name, limit in self._limits()
            if not _keeps(name, measured[name], limit)
        ]

    def _limits(self) -> list[tuple[str, float]]:
        named = [(item.name, getattr(self, item.name)) for item in fields(self)]
        return [(name, limit) for name, limit in named if limit is not None]


@dataclass(frozen=True)
class Scenario:
    """One load test; `drain_seconds` is how long the last answers are waited for."""

    name: str
    driver: DriverName
    arrivals: Arrivals
    workload: Workload = field(default_factory=Workload)
    objective: Objective = field(default_factory=Objective)
    thresholds: Thresholds = field(default_factory=Thresholds)
    drain_seconds: float = 30.0

    def __post_init__(self) -> None:
        if not self.drain_seconds > 0:
            raise ValueError(f"drain_seconds is {self.drain_seconds}; give a positive number")


def load_scenario(path: Path) -> Scenario:
    """Read a scenario file; ScenarioError names the file and what is wrong in it."""
    try:
        return parse_scenario(path.stem, tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ScenarioError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, TypeError) as error:
        raise ScenarioError(f"{path}: {error}") from error


def parse_scenario(name: str, tables: Mapping[str, Any]) -> Scenario:
    """A scenario from its TOML tables; ValueError for unknown keys and senseless values."""
    _require_keys("the file", tables, _TABLES)
    head = dict(tables.get("scenario", {}))
    _require_keys("[scenario]", head, _HEAD_KEYS)
    if "driver" not in head:
        raise ValueError(f"[scenario] needs driver, one of {', '.join(DriverName)}")
    arrivals = dict(tables.get("arrivals", {}))
    if "kind" in arrivals:
        arrivals["kind"] = ArrivalKind(arrivals["kind"])
    return Scenario(
        name=name,
        driver=DriverName(head["driver"]),
        arrivals=_build(Arrivals, "[arrivals]", arrivals),
        workload=_build(Workload, "[workload]", tables.get("workload", {})),
        objective=Objective(head.get("slo_latency_ms"), head.get("slo_ttft_ms")),
        thresholds=_build(Thresholds, "[thresholds]", tables.get("thresholds", {})),
        drain_seconds=head.get("drain_seconds", 30.0),
    )


def _build(kind: type[T], where: str, values: Mapping[str, Any]) -> T:
    _require_keys(where, values, set(kind.__dataclass_fields__))  # type: ignore[attr-defined]
    return kind(**values)


def _require_keys(where: str, values: Mapping[str, Any], known: set[str]) -> None:
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"{where} has unknown {unknown}; known: {', '.join(sorted(known))}")


def _keeps(name: str, measured: float, limit: float) -> bool:
    """Whether a figure keeps its limit; NaN (nothing measured) keeps none."""
    return measured >= limit if name.startswith("min_") else measured <= limit
