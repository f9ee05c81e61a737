"""Figures from a hand-made recording, thresholds and scenario files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from openloop.arrivals import ArrivalKind
from openloop.drivers import DriverName
from openloop.generator import Recording
from openloop.outcome import Fate, Outcome, Reply
from openloop.report import Objective, Percentiles, Summary, summarize, table_of
from openloop.scenario import ScenarioError, Thresholds, load_scenario, parse_scenario

SCENARIOS = sorted((Path(__file__).parents[2] / "loadtests" / "scenarios").glob("*.toml"))


def outcome(
    due: float, latency: float, fate: Fate = Fate.OK, reply: Reply | None = None
) -> Outcome:
    reason = "" if fate is Fate.OK else "WHY"
    return Outcome(due, due + 0.001, due + latency, fate, reason, reply or Reply())


def recording() -> Recording:
    """Four requests in two seconds: two answered (one slow), one rejected, one failed."""
    pieces = Reply(100, 50, piece_times=(10.1, 10.2, 10.4), num_tokens=3)
    outcomes = (
        outcome(10.0, 0.4, reply=pieces),
        outcome(10.5, 1.0, reply=Reply(100, 50, piece_times=(11.4,), num_tokens=1)),
        outcome(11.0, 0.01, Fate.REJECTED),
        outcome(11.5, 0.02, Fate.ERROR),
    )
    return Recording(outcomes, seconds=1.9, cpu_seconds=0.5)


def summary(objective: Objective | None = None) -> Summary:
    return summarize(recording(), 2.0, objective or Objective())


def test_figures_of_a_run() -> None:
    figures = summary(Objective(latency_ms=500))
    assert figures.requests == 4
    assert figures.fates == {"ok": 2, "rejected": 1, "dropped": 0, "error": 1, "unfinished": 0}
    assert figures.reasons == {"WHY": 2}
    assert (figures.offered_rate, figures.achieved_rate) == (2.0, 1.0)
    assert figures.tokens_per_second == 2.0
    assert (figures.sent_kbps, figures.received_kbps) == pytest.approx((0.8, 0.4))
    assert (figures.goodput_ratio, figures.goodput_rate) == (0.25, 0.5)
    assert figures.client_cpu == 0.25
    assert figures.latency.max == pytest.approx(1000)
    assert figures.ttft.p50 == pytest.approx(100)
    assert figures.ttft.max == pytest.approx(900)
    assert (figures.itl.p50, figures.itl.max) == pytest.approx((100, 200))
    assert figures.slip.max == pytest.approx(1)


def test_rejected_requests_never_count_as_good() -> None:
    assert summary(Objective()).goodput_ratio == 0.5
    assert summary(Objective(ttft_ms=200)).goodput_ratio == 0.25
    assert summary(Objective(latency_ms=2000, ttft_ms=2000)).goodput_ratio == 0.5


@pytest.mark.parametrize(
    ("count", "expected"),
    [(1, (1, 1, 1)), (10, (5, 9, 10)), (100, (50, 90, 99)), (101, (51, 91, 100))],
)
def test_percentiles_are_nearest_ranks(count: int, expected: tuple[int, int, int]) -> None:
    figures = Percentiles.of_seconds([(count - index) / 1000 for index in range(count)])
    assert (figures.p50, figures.p90, figures.p99) == pytest.approx(expected)
    assert figures.count == count


def test_percentiles_of_nothing_are_null_in_json() -> None:
    assert math.isnan(Percentiles.of_seconds([]).p50)
    unanswered = Recording((outcome(0.0, 1.0, Fate.ERROR),), 1.0, 0.0)
    figures = summarize(unanswered, 1.0, Objective()).to_json()
    assert json.loads(json.dumps(figures, allow_nan=False))["latency"]["p99"] is None


def test_table_names_what_was_measured() -> None:
    console = Console(width=100)
    objective = Objective(latency_ms=500)
    with console.capture() as capture:
        console.print(table_of("title", summary(objective), objective))
    shown = capture.get()
    for text in ("first token", "schedule slip", "2 ok, 1 rejected, 1 error", "2 x WHY", "25%"):
        assert text in shown


@pytest.mark.parametrize(
    ("limits", "names"),
    [
        ({}, ["max_failed_ratio"]),
        ({"max_failed_ratio": 0.5}, []),
        ({"max_failed_ratio": None, "max_latency_p99_ms": 900}, ["max_latency_p99_ms"]),
        ({"max_failed_ratio": None, "max_ttft_p99_ms": 901, "max_itl_p99_ms": 201}, []),
        ({"max_failed_ratio": None, "max_rejected_ratio": 0.2}, ["max_rejected_ratio"]),
        ({"max_failed_ratio": None, "min_goodput_ratio": 0.6}, ["min_goodput_ratio"]),
        ({"max_failed_ratio": None, "min_tokens_per_second": 3}, ["min_tokens_per_second"]),
        ({"max_failed_ratio": None, "max_slip_p99_ms": 0.5}, ["max_slip_p99_ms"]),
        ({"max_failed_ratio": None, "max_client_cpu": 0.1}, ["max_client_cpu"]),
    ],
)
def test_thresholds_tell_what_was_breached(limits: dict[str, Any], names: list[str]) -> None:
    breaches = Thresholds(**limits).breaches(summary())
    assert [breach.split()[0] for breach in breaches] == names


def test_a_figure_that_was_not_measured_keeps_no_limit() -> None:
    unanswered = Recording((outcome(0.0, 1.0, Fate.REJECTED),), 1.0, 0.0)
    figures = summarize(unanswered, 1.0, Objective())
    assert Thresholds(max_latency_p99_ms=1e9).breaches(figures) == [
        "max_latency_p99_ms is 1e+09, measured nan"
    ]


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_shipped_scenarios_are_short_and_checked(path: Path) -> None:
    scenario = load_scenario(path)
    assert scenario.arrivals.span() <= 10
    assert scenario.thresholds != Thresholds()


def test_there_is_a_scenario_for_every_driver() -> None:
    assert {load_scenario(path).driver for path in SCENARIOS} == set(DriverName)


MINIMAL = {
    "scenario": {"driver": "llm-grpc", "slo_ttft_ms": 900},
    "arrivals": {"rate": 1, "duration": 2, "max_requests": 3, "kind": "constant"},
}


def test_scenario_values_are_read() -> None:
    scenario = parse_scenario("mine", MINIMAL | {"workload": {"max_tokens": 4}})
    assert (scenario.name, scenario.driver) == ("mine", DriverName.LLM_GRPC)
    assert scenario.arrivals.kind is ArrivalKind.CONSTANT
    assert scenario.objective == Objective(ttft_ms=900)
    assert scenario.workload.max_tokens == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nonsense": {}}, "the file has unknown"),
        ({"scenario": {}}, "needs driver, one of tokenizer-encode"),
        ({"scenario": {"driver": "ftp"}}, "'ftp' is not a valid DriverName"),
        ({"scenario": {"driver": "llm-grpc", "speed": 1}}, r"\[scenario\] has unknown \['speed'\]"),
        ({"workload": {"colour": 1}}, r"\[workload\] has unknown \['colour'\]"),
        ({"thresholds": {"max_fun": 1}}, r"\[thresholds\] has unknown \['max_fun'\]"),
        ({"arrivals": {"rate": -1, "duration": 1, "max_requests": 1}}, "rate is -1"),
        ({"arrivals": {"kind": "bursty"}}, "'bursty' is not a valid ArrivalKind"),
    ],
)
def test_bad_scenarios_say_what_is_wrong(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_scenario("mine", MINIMAL | changes)


def test_bad_scenario_files_are_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.toml"
    broken.write_text("[scenario")
    for path in (broken, tmp_path / "missing.toml"):
        with pytest.raises(ScenarioError, match=path.name):
            load_scenario(path)
