"""The soak test itself, for a few seconds against a real llmd process."""

from __future__ import annotations

import json
from pathlib import Path

import soak
from support.llmd import llm_server


async def test_a_healthy_server_passes(tmp_path: Path) -> None:
    folder = tmp_path / "fast"
    folder.mkdir()
    arguments = ["--model", str(folder), "--max-num-sequences", "4"]
    with llm_server(tmp_path, arguments) as server:
        report = await soak.soak(
            soak.SoakOptions(
                server.grpc_address,
                server.http_url.removeprefix("http://"),
                server.process.pid,
                seconds=3.0,
                clients=6,
                sample_seconds=0.5,
                prompt_words=20,
                max_tokens=40,
                max_growth_mb=64.0,
            )
        )
    assert report.problems == []
    assert report.outcomes["completed"] > 0
    assert report.outcomes["aborted"] > 0
    assert len(report.memory_mb) >= 3
    assert json.loads(report.to_json())["outcomes"] == dict(report.outcomes)


def test_growth_and_strange_outcomes_are_problems() -> None:
    report = soak.SoakReport(memory_mb=[100.0, 100.0, 100.0, 130.0, 130.0, 130.0])
    report.outcomes["completed"] = 3
    report.outcomes["InternalError"] = 1
    soak._judge(soak.SoakOptions("", "", 0), report)
    assert report.problems[0] == "memory grew by 30.0 MB"
    assert "InternalError" in report.problems[1]
