"""The command line of the load generator.

Exit codes: 0 done, 1 a threshold was breached under --check, 2 the run could not be made.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console

from openloop.arrivals import ArrivalKind, Arrivals
from openloop.drivers import DriverName, make_driver
from openloop.generator import Recording, run_open_loop
from openloop.outcome import RequestFailed
from openloop.report import Objective, Summary, summarize, table_of
from openloop.scenario import Scenario, load_scenario
from openloop.target import require_loopback
from openloop.workload import Workload
from vqclient import VqError

EXIT_BREACH = 1
EXIT_ERROR = 2
_HARD_MAX_REQUESTS = 100_000

T = TypeVar("T", Arrivals, Workload, Objective)

console = Console(highlight=False)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@dataclass(frozen=True)
class Addresses:
    """Where the services listen; loopback only."""

    tokenizer: str
    llm: str
    llm_http: str

    def of(self, driver: DriverName) -> str:
        """The address that a driver talks to."""
        if driver is DriverName.LLM_SSE:
            return require_loopback(self.llm_http)
        if driver is DriverName.LLM_GRPC:
            return require_loopback(self.llm)
        return require_loopback(self.tokenizer)


@dataclass(frozen=True)
class Overrides:
    """Values of the command line that replace a scenario's; None keeps them."""

    rate: float | None = None
    duration: float | None = None
    max_requests: int | None = None
    arrivals: ArrivalKind | None = None
    seed: int | None = None
    model: str | None = None
    slo_ms: float | None = None
    slo_ttft_ms: float | None = None

    def applied_to(self, scenario: Scenario) -> Scenario:
        """A new scenario with these values."""
        arrivals = _replaced(
            scenario.arrivals,
            rate=self.rate,
            duration=self.duration,
            max_requests=self.max_requests,
            kind=self.arrivals,
            seed=self.seed,
        )
        workload = _replaced(scenario.workload, model=self.model, seed=self.seed)
        objective = _replaced(scenario.objective, latency_ms=self.slo_ms, ttft_ms=self.slo_ttft_ms)
        return replace(scenario, arrivals=arrivals, workload=workload, objective=objective)


@dataclass(frozen=True)
class Result:
    """A finished scenario."""

    scenario: Scenario
    summary: Summary
    breaches: tuple[str, ...]

    def to_json(self) -> dict[str, object]:
        """A JSON object: what was asked and what came out."""
        return {
            "scenario": self.scenario.name,
            "asked": asdict(self.scenario),
            "measured": self.summary.to_json(),
            "breaches": list(self.breaches),
        }


@app.command()
def run(
    scenarios: Annotated[list[Path] | None, typer.Argument(help="Scenario files (TOML).")] = None,
    driver: Annotated[DriverName | None, typer.Option(help="Instead of a scenario file.")] = None,
    tokenizer_address: Annotated[str, typer.Option(help="gRPC HOST:PORT.")] = "127.0.0.1:50051",
    llm_address: Annotated[str, typer.Option(help="gRPC HOST:PORT.")] = "127.0.0.1:50052",
    llm_http_address: Annotated[str, typer.Option(help="HTTP HOST:PORT.")] = "127.0.0.1:8081",
    rate: Annotated[float | None, typer.Option(help="Requests per second.")] = None,
    duration: Annotated[float | None, typer.Option(help="Seconds.")] = None,
    max_requests: Annotated[
        int | None, typer.Option(min=1, max=_HARD_MAX_REQUESTS, help="Stop after so many.")
    ] = None,
    arrivals: Annotated[ArrivalKind | None, typer.Option(help="Spacing.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of schedule and payloads.")] = None,
    model: Annotated[str | None, typer.Option(help="Model name.")] = None,
    slo_ms: Annotated[float | None, typer.Option(help="Latency that counts as good.")] = None,
    slo_ttft_ms: Annotated[float | None, typer.Option(help="First token that is good.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Exit 1 on a breached limit.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write figures here.")] = None,
) -> None:
    """Send open-loop load to the services on this machine and report what they did with it."""
    overrides = Overrides(rate, duration, max_requests, arrivals, seed, model, slo_ms, slo_ttft_ms)
    addresses = Addresses(tokenizer_address, llm_address, llm_http_address)
    try:
        if json_file is not None:
            json_file.parent.mkdir(parents=True, exist_ok=True)
        planned = [overrides.applied_to(item) for item in _planned(scenarios or [], driver)]
        targets = [addresses.of(scenario.driver) for scenario in planned]
        results = [_run_one(*pair) for pair in zip(planned, targets, strict=True)]
        if json_file is not None:
            json_file.write_text(json.dumps([result.to_json() for result in results], indent=2))
    except (ValueError, OSError, VqError, RequestFailed) as error:
        typer.echo(f"openloop: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(EXIT_ERROR) from error
    if check and any(result.breaches for result in results):
        raise typer.Exit(EXIT_BREACH)


def main() -> None:
    """Entry point."""
    app()


def _planned(paths: Sequence[Path], driver: DriverName | None) -> list[Scenario]:
    """The scenarios of the files, or the one that --driver stands for."""
    if bool(paths) == (driver is not None):
        raise ValueError("give scenario files, or --driver without any")
    if driver is None:
        return [load_scenario(path) for path in paths]
    return [Scenario(driver, driver, Arrivals(rate=2.0, duration=10.0, max_requests=1000))]


def _run_one(scenario: Scenario, address: str) -> Result:
    """Run a scenario and print its report."""
    recording = asyncio.run(_record(scenario, address))
    summary = summarize(recording, scenario.arrivals.span(), scenario.objective)
    breaches = tuple(scenario.thresholds.breaches(summary))
    title = f"{scenario.name}: {scenario.driver} at {address}"
    console.print(table_of(title, summary, scenario.objective))
    for breach in breaches:
        typer.echo(f"openloop: {scenario.name}: {breach}", err=True)
    return Result(scenario, summary, breaches)


async def _record(scenario: Scenario, address: str) -> Recording:
    offsets = scenario.arrivals.offsets()
    async with make_driver(scenario.driver, address, scenario.workload) as driver:
        return await run_open_loop(driver, offsets, scenario.drain_seconds)


def _replaced(value: T, **changes: Any) -> T:
    """`value` with the changes that are not None."""
    return replace(value, **{name: new for name, new in changes.items() if new is not None})
