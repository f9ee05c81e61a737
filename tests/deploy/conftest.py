"""The tools venv (`make tools`) and the rendered chart, for all deployment tests."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
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
def render(tools_bin: Path) -> Render:
    """Render the chart: `render(values, versions=[...])` gives the answer of chart_tool.py."""
    tool = Path(__file__).with_name("chart_tool.py")
    answers: dict[str, str] = {}

    def ask(request: str) -> str:
        done = subprocess.run(
            [str(tools_bin / "python"), str(tool), str(ROOT / "deploy/helm/vqstack")],
            input=request,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    def run(values: dict[str, Any] | None = None, versions: tuple[str, ...] = ()) -> dict[str, Any]:
        request = json.dumps({"values": values or {}, "versions": versions})
        if request not in answers:
            answers[request] = ask(request)
        answer: dict[str, Any] = json.loads(answers[request])
        return answer

    return run


@pytest.fixture(scope="session")
def objects(render: Render) -> list[dict[str, Any]]:
    """The objects of the chart with its default values."""
    answer = render()
    assert "error" not in answer, answer
    rendered: list[dict[str, Any]] = answer["objects"]
    return rendered
