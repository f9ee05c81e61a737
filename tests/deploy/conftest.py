"""The tools venv (`make tools`) and the rendered chart, for all deployment tests."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS_BIN = ROOT / ".tools" / "bin"

Render = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def tools_bin() -> Path:
    """Folder of the deployment linters."""
    if not (TOOLS_BIN / "python").exists():
        pytest.skip("the tools venv is absent; run `make tools`")
    return TOOLS_BIN


@pytest.fixture(scope="session")
def render(tools_bin: Path) -> Iterator[Render]:
    """Render the chart: `render(values, versions)` gives the answer of chart_tool.py."""
    tool = Path(__file__).with_name("chart_tool.py")
    # One process for all requests: loading Helm's engine takes half a second.
    with subprocess.Popen(
        [str(tools_bin / "python"), str(tool), str(ROOT / "deploy/helm/vqstack")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        requests, answers = process.stdin, process.stdout

        def ask(
            values: dict[str, Any] | None = None, versions: tuple[str, ...] = ()
        ) -> dict[str, Any]:
            requests.write(json.dumps({"values": values or {}, "versions": versions}) + "\n")
            requests.flush()
            line = answers.readline()
            assert line, "chart_tool.py ended; its standard error says why"
            answer: dict[str, Any] = json.loads(line)
            return answer

        yield ask
        requests.close()


@pytest.fixture(scope="session")
def objects(render: Render) -> list[dict[str, Any]]:
    """The objects of the chart with its default values."""
    answer = render()
    assert "error" not in answer, answer
    rendered: list[dict[str, Any]] = answer["objects"]
    return rendered
