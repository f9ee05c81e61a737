"""What llmd does when it cannot start: one clear line on stderr and exit status 2."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import pytest

from support.forkserver import start_module
from support.llmd import write_tiny_llama
from vqserve.common import lifecycle
from vqserve.generation.app import build_app, engine_loader
from vqserve.generation.config import GenerationSettings


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A sound model folder, to be damaged."""
    folder = tmp_path / "tiny"
    write_tiny_llama(folder)
    return folder


class Complaint(Protocol):
    """Runs llmd with some flags; the plain line on stderr that it ends with."""

    def __call__(self, *args: str) -> str: ...


@pytest.fixture
def complaint(capsys: pytest.CaptureFixture[str]) -> Complaint:
    """llmd inside this process, whose logging is left alone."""

    def run(*args: str) -> str:
        try:
            settings = GenerationSettings.from_args(["--grpc-port", "0", "--http-port", "0", *args])
            status: Any = lifecycle.run(lambda: build_app(settings, engine_loader(settings)))
        except SystemExit as leaving:
            status = leaving.code
        assert status == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return run


def test_no_model_at_all(complaint: Complaint) -> None:
    assert "--model" in complaint()


def test_a_truncated_checkpoint(tiny: Path, complaint: Complaint) -> None:
    weights = tiny / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert "model.safetensors" in complaint("--model", str(tiny))


def test_a_config_that_is_not_json(tiny: Path, complaint: Complaint) -> None:
    (tiny / "config.json").write_text('{"architectures": [')
    assert "config.json" in complaint("--model", str(tiny))


def test_an_unsupported_architecture(tiny: Path, complaint: Complaint) -> None:
    config = (tiny / "config.json").read_text()
    (tiny / "config.json").write_text(config.replace("LlamaForCausalLM", "MambaForCausalLM"))
    assert "MambaForCausalLM" in complaint("--model", str(tiny))


def test_an_unknown_executor(tiny: Path, complaint: Complaint) -> None:
    assert "abacus" in complaint("--model", str(tiny), "--executor", "abacus")


def test_both_onnxruntime_distributions(
    tiny: Path, tmp_path: Path, complaint: Complaint, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("onnxruntime", "onnxruntime_gpu"):
        metadata = tmp_path / "both" / f"{name}-1.0.dist-info" / "METADATA"
        metadata.parent.mkdir(parents=True)
        metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(tmp_path / "both")
    line = complaint("--model", str(tiny), "--executor", "onnx")
    assert "onnxruntime and onnxruntime-gpu are both installed" in line


def test_a_context_that_the_model_does_not_have(tiny: Path, complaint: Complaint) -> None:
    line = complaint("--model", str(tiny), "--context-length", "1000")
    assert "context_length is 1000" in line


def test_a_name_that_requests_could_not_use(tiny: Path, complaint: Complaint) -> None:
    assert "no model name" in complaint("--model", str(tiny), "--model-name", "My Model")


def test_a_flag_out_of_range(tiny: Path, complaint: Complaint) -> None:
    assert "--max-num-sequences" in complaint("--model", str(tiny), "--max-num-sequences", "0")


def test_a_missing_folder_as_a_process(tmp_path: Path) -> None:
    folder = str(tmp_path / "nowhere")
    ports = ("--grpc-port", "0", "--http-port", "0")
    log = tmp_path / "service.log"
    process = start_module("vqserve.generation", [*ports, "--model", folder], log)
    assert process.wait(120) == 2
    (line,) = [line for line in log.read_text().splitlines() if not line.startswith("{")]
    assert line.startswith("error: ")
    assert folder in line
