"""The load generator as a real process: reports, JSON, exit codes."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from openloop.cli import app
from vqclient.testing import FakeTokenizerService, serve

RUN = Path(__file__).parents[2] / "loadtests" / "run.py"
SCENARIO = """
[scenario]
driver = "tokenizer-encode"
slo_latency_ms = {slo}
[arrivals]
rate = 50
duration = 0.2
max_requests = 5
[workload]
image_width = 32
image_height = 32
[thresholds]
min_goodput_ratio = 1.0
max_slip_p99_ms = 60000
max_client_cpu = 1000
"""


async def load(*arguments: str) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(RUN),
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(240):
        out, err = await process.communicate()
    return process.returncode or 0, out.decode(), err.decode()


@pytest.mark.parametrize(("slo", "code"), [(60000, 0), (0.0001, 1)])
async def test_check_holds_a_scenario_to_its_thresholds(
    tmp_path: Path, slo: float, code: int
) -> None:
    scenario, figures = tmp_path / "mine.toml", tmp_path / "figures.json"
    scenario.write_text(SCENARIO.format(slo=slo))
    async with serve(FakeTokenizerService()) as address:
        ended, out, err = await load(
            str(scenario), "--tokenizer-address", address, "--check", "--json", str(figures)
        )
    assert ended == code, err
    assert "mine: tokenizer-encode" in out
    assert ("min_goodput_ratio is 1, measured 0" in err) == (code == 1)
    (result,) = json.loads(figures.read_text())
    assert result["asked"]["workload"]["image_width"] == 32
    assert result["measured"]["fates"]["ok"] == result["measured"]["requests"]


async def test_options_replace_a_scenarios_values(tmp_path: Path) -> None:
    scenario, figures = tmp_path / "mine.toml", tmp_path / "figures.json"
    scenario.write_text(SCENARIO.format(slo=60000))
    async with serve(FakeTokenizerService()) as address:
        options = ["--arrivals", "constant", "--max-requests", "2", "--seed", "9"]
        files = ["--tokenizer-address", address, "--json", str(figures)]
        ended, _, err = await load(str(scenario), *options, *files)
    assert ended == 0, err
    (result,) = json.loads(figures.read_text())
    assert result["measured"]["requests"] == 2
    assert (result["asked"]["arrivals"]["seed"], result["asked"]["workload"]["seed"]) == (9, 9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--driver", "tokenizer-encode", "--tokenizer-address", "10.1.2.3:80"], "only loopback"),
        (["--driver", "llm-sse", "--llm-http-address", "example.org:80"], "only loopback"),
        (["--driver", "llm-grpc", "--llm-address", "127.0.0.1:1"], "cannot reach the generation"),
        (["nope.toml"], "cannot read nope.toml"),
        ([], "give scenario files, or --driver"),
        (["--driver", "llm-grpc", "--rate", "-1"], "rate is -1"),
    ],
)
def test_runs_that_cannot_be_made_exit_2_with_one_line(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.startswith("openloop: ")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""
