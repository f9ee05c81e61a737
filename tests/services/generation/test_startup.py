"""What llmd does when it cannot start: one clear line on stderr and exit status 2."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vqserve.generation.testing import write_tiny_llama


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A sound model folder, to be damaged."""
    folder = tmp_path / "tiny"
    write_tiny_llama(folder)
    return folder


def complaint(*args: str, search_path: Path | None = None) -> str:
    """The plain line that llmd ends with, after checking that it exits with status 2."""
    roots = [str(search_path)] if search_path else []
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([*roots, os.environ.get("PYTHONPATH", "")])
    }
    ports = ("--grpc-port", "0", "--http-port", "0")
    done = subprocess.run(
        [sys.executable, "-m", "vqserve.generation", *ports, *args],
        env=environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("{")]
    return line


def test_a_missing_folder(tmp_path: Path) -> None:
    assert "nowhere" in complaint("--model", str(tmp_path / "nowhere"))


def test_no_model_at_all() -> None:
    assert "--model" in complaint()


def test_a_truncated_checkpoint(tiny: Path) -> None:
    weights = tiny / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert "model.safetensors" in complaint("--model", str(tiny))


def test_a_config_that_is_not_json(tiny: Path) -> None:
    (tiny / "config.json").write_text('{"architectures": [')
    assert "config.json" in complaint("--model", str(tiny))


def test_an_unsupported_architecture(tiny: Path) -> None:
    config = (tiny / "config.json").read_text()
    (tiny / "config.json").write_text(config.replace("LlamaForCausalLM", "MambaForCausalLM"))
    assert "MambaForCausalLM" in complaint("--model", str(tiny))


def test_an_unknown_executor(tiny: Path) -> None:
    assert "abacus" in complaint("--model", str(tiny), "--executor", "abacus")


def test_both_onnxruntime_distributions(tiny: Path, tmp_path: Path) -> None:
    for name in ("onnxruntime", "onnxruntime_gpu"):
        metadata = tmp_path / "both" / f"{name}-1.0.dist-info" / "METADATA"
        metadata.parent.mkdir(parents=True)
        metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    line = complaint("--model", str(tiny), search_path=tmp_path / "both")
    assert "onnxruntime and onnxruntime-gpu are both installed" in line


def test_a_context_that_the_model_does_not_have(tiny: Path) -> None:
    line = complaint("--model", str(tiny), "--context-length", "1000")
    assert "context_length is 1000" in line


def test_a_name_that_requests_could_not_use(tiny: Path) -> None:
    assert "no model name" in complaint("--model", str(tiny), "--model-name", "My Model")


def test_a_flag_out_of_range(tiny: Path) -> None:
    assert "--max-num-sequences" in complaint("--model", str(tiny), "--max-num-sequences", "0")
