"""Keeps llmd busy with clients that come, leave and give up, and looks for leaks.

    python loadtests/soak.py --address 127.0.0.1:50052 --http 127.0.0.1:8081 --pid 4711

Every client sends prompts of random length, of which a share begin alike, and drops a share of its
answers in the middle. At the end nothing may be running, no page of the KV cache may be held, and
the server's memory may not have grown: the median of the last third of the samples is compared with
the first third's. Ends by itself. Exit code 1 when something was left behind.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from vqclient import NO_RETRY, ClientOptions, GenerationClient, Sampling, VqError

WORDS = (
    *("road", "lane", "sign", "bridge", "river", "night", "market"),
    *("soup", "bread", "stone", "light", "train", "winter", "song"),
)
SETTLE_SECONDS = 20.0


@dataclass(frozen=True)
class SoakOptions:
    """What to do, for how long. Memory may grow by `max_growth_mb` (warm-up excluded)."""

    address: str
    http_address: str
    pid: int
    seconds: float = 1800.0
    clients: int = 12
    abort_share: float = 0.4
    prompt_words: int = 60
    max_tokens: int = 96
    sample_seconds: float = 5.0
    max_growth_mb: float = 16.0
    seed: int = 0


@dataclass
class SoakReport:
    """What happened. Memory is resident, in MB; `problems` is empty after a clean run."""

    seconds: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    memory_mb: list[float] = field(default_factory=list)
    memory_first_mb: float = 0.0
    memory_last_mb: float = 0.0
    prefix_hit_tokens: float = 0.0
    preemptions: float = 0.0
    problems: list[str] = field(default_factory=list)

    def to_json(self) -> str:
        """The report as a JSON object."""
        memory = [round(value, 1) for value in self.memory_mb]
        return json.dumps({**vars(self), "memory_mb": memory}, indent=2)


async def soak(options: SoakOptions) -> SoakReport:
    """Run the clients, wait until the server is idle, and report."""
    report = SoakReport()
    started = time.monotonic()
    deadline = started + options.seconds
    clients = [_client(options, number, deadline, report) for number in range(options.clients)]
    await asyncio.gather(*clients, _sample_memory(options, deadline, report))
    await _settle(options, report)
    report.seconds = round(time.monotonic() - started, 1)
    _judge(options, report)
    return report


async def _client(options: SoakOptions, number: int, deadline: float, report: SoakReport) -> None:
    choice = random.Random(f"{options.seed}/{number}")
    transport = ClientOptions(timeout=120.0, retry=NO_RETRY)
    async with GenerationClient(options.address, transport) as client:
        while time.monotonic() < deadline:
            outcome, num_tokens = await _one_request(client, choice, options)
            report.outcomes[outcome] += 1
            report.tokens += num_tokens
            await asyncio.sleep(choice.expovariate(20.0))


async def _one_request(
    client: GenerationClient, choice: random.Random, options: SoakOptions
) -> tuple[str, int]:
    """Outcome and tokens of one request that may be given up after a random number of them."""
    half = max(1, options.prompt_words // 2)
    shared = [*WORDS * half][:half] if choice.random() < 0.3 else []
    prompt = " ".join([*shared, *choice.choices(WORDS, k=choice.randint(1, half))])
    limit = choice.randint(1, options.max_tokens)
    gives_up = choice.random() < options.abort_share
    patience = choice.randint(0, limit) if gives_up else limit + 1
    sampling = Sampling(max_tokens=limit, temperature=choice.choice([0.0, 0.8]), ignore_eos=True)
    num_tokens = 0
    try:
        async for piece in client.generate(prompt, sampling=sampling):
            num_tokens += len(piece.token_ids)
            if num_tokens >= patience:
                return "aborted", num_tokens
    except VqError as error:
        return type(error).__name__, num_tokens
    return "completed", num_tokens


async def _sample_memory(options: SoakOptions, deadline: float, report: SoakReport) -> None:
    while time.monotonic() < deadline:
        report.memory_mb.append(resident_mb(options.pid))
        await asyncio.sleep(min(options.sample_seconds, max(0.0, deadline - time.monotonic())))


async def _settle(options: SoakOptions, report: SoakReport) -> None:
    """Wait for the last answers; what is still held then is a leak."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while time.monotonic() < deadline:
        values = await asyncio.to_thread(metrics, options.http_address)
        busy = values["llm_requests_running"] + values["llm_requests_waiting"]
        if busy == values["llm_kv_pages_used"] == 0:
            break
        await asyncio.sleep(0.2)
    report.prefix_hit_tokens = values["llm_prefix_hit_tokens_total"]
    report.preemptions = values["llm_preemptions_total"]
    for name in ("llm_requests_running", "llm_requests_waiting", "llm_kv_pages_used"):
        if values[name]:
            report.problems.append(f"{name} is {values[name]:g} when all clients have left")


def _judge(options: SoakOptions, report: SoakReport) -> None:
    third = max(1, len(report.memory_mb) // 3)
    report.memory_first_mb = round(statistics.median(report.memory_mb[:third]), 1)
    report.memory_last_mb = round(statistics.median(report.memory_mb[-third:]), 1)
    growth = report.memory_last_mb - report.memory_first_mb
    if growth > options.max_growth_mb:
        report.problems.append(f"memory grew by {growth:.1f} MB")
    unexpected = set(report.outcomes) - {"completed", "aborted"}
    if unexpected or not report.outcomes["completed"]:
        report.problems.append(f"outcomes were {dict(report.outcomes)}")


def resident_mb(pid: int) -> float:
    """Resident memory of a process, as Linux counts it."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"process {pid} has no resident memory; has it ended?")


def metrics(http_address: str) -> dict[str, float]:
    """Every sample of /metrics by name, summed over its labels."""
    with urllib.request.urlopen(f"http://{http_address}/metrics", timeout=10) as answer:
        families = text_string_to_metric_families(answer.read().decode())
        values: Counter[str] = Counter()
        for family in families:
            for sample in family.samples:
                values[sample.name] += sample.value  # type: ignore[assignment]
    return dict(values)


def main() -> int:
    """Command line; prints the report as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--address", required=True, help="host:port of llmd's gRPC listener")
    parser.add_argument("--http", required=True, help="host:port of its HTTP listener")
    parser.add_argument("--pid", type=int, required=True, help="its process")
    parser.add_argument("--seconds", type=float, default=SoakOptions.seconds)
    parser.add_argument("--clients", type=int, default=SoakOptions.clients)
    arguments = parser.parse_args()
    options = SoakOptions(
        arguments.address, arguments.http, arguments.pid, arguments.seconds, arguments.clients
    )
    report = asyncio.run(soak(options))
    print(report.to_json())
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
