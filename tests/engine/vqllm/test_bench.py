"""The benchmark's bookkeeping, with an engine that takes no time, and one real run."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vqkernels import native_status
from vqllm.cli import app
from vqllm.errors import ExecutorUnavailable, InvalidConfig
from vqllm.runtime import bench
from vqllm.runtime.bench import BenchConfig, Contender, make_contenders, run_bench

MakeFolder = Callable[..., Path]

pytestmark = pytest.mark.skipif(
    not native_status().available, reason=f"no native library: {native_status().reason}"
)


@pytest.fixture(autouse=True)
def _little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "READ_BYTES", 1 << 20)


class Clockwork(Contender):
    """Says that steps take 1, 2, 3, ... ms and prefills 10 ms."""

    engine, model, vocab_size, threads, load_seconds = "clockwork", "none", 10, 2, 0.5
    bytes_per_token = 3_000_000

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.count = 0

    def start(self, prompts: Sequence[list[int]], num_tokens: int) -> float:
        self.calls.append(f"start {len(prompts)}x{len(prompts[0])}, {num_tokens}")
        self.count = 0
        return 0.01

    def step(self) -> float:
        self.calls.append("step")
        self.count += 1
        return 0.001 * self.count

    def stop(self) -> None:
        self.calls.append("stop")

    def phases(self) -> dict[str, float]:
        return {"all": 7.0}


def test_turns_alternate_and_rows_hold_medians() -> None:
    first, second = Clockwork(), Clockwork()
    config = BenchConfig(prompt_length=20, num_tokens=9, batch_size=2, rounds=5)
    lines: list[str] = []
    rows = run_bench([first, second], config, lines.append)
    turn = ["start 2x20, 9", *["step"] * 8, "stop"]
    assert first.calls == second.calls == turn * 5
    assert lines[-1] == "round 5 of 5"
    row = rows[0].to_dict()
    assert row["median_ms"] == pytest.approx(3)
    assert row["p10_ms"] == pytest.approx(1)
    assert row["p90_ms"] == pytest.approx(5)
    assert row["cold_ms"] == pytest.approx(7)
    assert row["decode_tok_s"] == pytest.approx(2 / 0.003)
    assert row["prefill_tok_s"] == pytest.approx(2 * 20 / 0.01)
    assert row["hot_fraction"] == pytest.approx(1e9 / (1e9 * row["ceiling_gb_s"]))
    assert row["ceiling_fraction"] > 0
    assert row["phase_us"] == {"all": 7.0}


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("rounds", {"rounds": 4}),
        ("prompt_length", {"prompt_length": 0}),
        ("num_tokens", {"num_tokens": 4}),
        ("batch_size", {"batch_size": 0}),
    ],
)
def test_settings_out_of_range(field: str, changes: dict[str, int]) -> None:
    with pytest.raises(InvalidConfig, match=field):
        BenchConfig(**changes)


def test_engines_that_cannot_run_are_named(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="engines is 'vllm'"):
        make_contenders([tiny_folder], ["vllm"], BenchConfig())
    with pytest.raises(InvalidConfig, match="gguf"):
        make_contenders([tiny_folder], ["llama.cpp"], BenchConfig())
    with pytest.raises(InvalidConfig, match=r"engines is 'native'.*llama\.cpp"):
        make_contenders([], ["native"], BenchConfig(), [tmp_path / "x.gguf"])
    lines: list[str] = []
    with pytest.raises(ExecutorUnavailable, match="no engine can run"):
        make_contenders([], ["llama.cpp"], BenchConfig(), [tmp_path / "x.gguf"], lines.append)
    assert "llama-cpp-python" in lines[0]


def test_a_gguf_brings_llama_cpp_with_it(tiny_folder: Path, tmp_path: Path) -> None:
    arguments = ["bench", str(tiny_folder), "--prompt", "9", "--tokens", "5"]
    result = CliRunner().invoke(app, [*arguments, "--gguf", str(tmp_path / "absent.gguf")])
    assert "llama.cpp on absent.gguf" in result.output
    assert result.exit_code == 0, result.output


def test_the_command_measures_a_real_engine(tiny_folder: Path, tmp_path: Path) -> None:
    arguments = ["bench", str(tiny_folder), "--engines", "native", "--prompt", "20"]
    arguments += ["--tokens", "6", "--batch", "2", "--threads", "2"]
    result = CliRunner().invoke(app, [*arguments, "--json", "-"])
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)
    assert (row["engine"], row["model"], row["threads"]) == ("native", "tiny", 2)
    assert row["decode_tok_s"] > 0
    assert row["bytes_per_token"] > 2 * 7 * 64 * 64
    assert set(row["phase_us"]) >= {"qkv", "attention", "head"}
    path = tmp_path / "rows.json"
    result = CliRunner().invoke(app, [*arguments, "--json", str(path)])
    assert result.exit_code == 0, result.output
    assert len(result.stdout.splitlines()) > 3
    assert len(json.loads(path.read_text())) == 1
