"""AutoQuantizer: three calls, straight into a folder, resume, and the hub."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from vqllm.api import AutoQuantizer, RunOptions, resolve_model
from vqllm.calibration import CalibrationConfig
from vqllm.checkpoint import Checkpoint
from vqllm.errors import (
    CorruptArtefact,
    CorruptCheckpoint,
    InvalidConfig,
    OverBudget,
    ResumeMismatch,
    UnknownModel,
    UnsupportedModel,
    VqllmError,
)
from vqllm.evaluation.sizes import measure_sizes
from vqllm.quantization.parts import QuantizedPart
from vqllm.quantization.presets import QuantizeConfig

MakeFolder = Callable[..., Path]

SMALL_TEXT = CalibrationConfig(num_windows=4, window_length=64)
CONFIG = QuantizeConfig(bits=4, group_size=32, dampings=(0.01,))


class Stop(Exception):
    """Ends a run in the middle."""


def stop_after(num_parts: int) -> RunOptions:
    seen: list[str] = []

    def report(part: QuantizedPart) -> None:
        seen.append(part.name)
        if len(seen) == num_parts:
            raise Stop

    return RunOptions(report=report)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_three_calls_of_the_readme(tiny_folder: Path, tmp_path: Path) -> None:
    quantizer = AutoQuantizer.from_pretrained(tiny_folder)
    with pytest.raises(VqllmError, match=r"call quantize\(\) first"):
        quantizer.save_pretrained(tmp_path / "quantized")
    quantizer.quantize(bits=4, group_size=32, calibration=SMALL_TEXT)
    target = quantizer.save_pretrained(tmp_path / "quantized")
    assert Checkpoint(target).info().method == "gptq"


def test_both_ways_to_a_folder_give_the_same_bytes(tiny_folder: Path, tmp_path: Path) -> None:
    quantizer = AutoQuantizer.from_pretrained(tiny_folder)
    quantizer.quantize(SMALL_TEXT, method="tcq", bits=2, dampings=(0.01,))
    (tmp_path / "a").mkdir()
    first = quantizer.save_pretrained(tmp_path / "a" / "out")
    config = QuantizeConfig(method="tcq", bits=2, dampings=(0.01,))
    second = quantizer.quantize_to(tmp_path / "out", config, SMALL_TEXT)
    assert content(first) == content(second)
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_other_widths_write_readable_folders(tiny_folder: Path, tmp_path: Path, bits: int) -> None:
    quantizer = AutoQuantizer.from_pretrained(tiny_folder)
    quantizer.quantize(bits=bits, group_size=32, calibration=SMALL_TEXT)
    info = Checkpoint(quantizer.save_pretrained(tmp_path / "quantized")).info()
    assert info.bits == bits
    assert bits < info.bpw < bits + 1.5


@pytest.mark.parametrize(("method", "bpw"), [("tcq", 3.0), ("vptq", 5.5), ("gptq", 4.0)])
def test_a_bit_budget_is_true_in_the_file(
    tiny_folder: Path, tmp_path: Path, method: str, bpw: float
) -> None:
    quantizer = AutoQuantizer.from_pretrained(tiny_folder)
    quantizer.quantize(SMALL_TEXT, method=method, bpw=bpw, dampings=(0.01,))
    info = Checkpoint(quantizer.save_pretrained(tmp_path / "out")).info()
    assert bpw - 1 < info.bpw <= bpw


@pytest.mark.parametrize("preprocess", ["none", "quarot", "smoothquant"])
def test_preprocessed_models_are_written(
    tiny_folder: Path, tmp_path: Path, preprocess: str
) -> None:
    quantizer = AutoQuantizer.from_pretrained(tiny_folder)
    config = replace(CONFIG, preprocess=preprocess)
    info = Checkpoint(quantizer.quantize_to(tmp_path / "out", config, SMALL_TEXT)).info()
    assert info.is_rotated == (preprocess == "quarot")


def test_a_portable_rotation_keeps_the_format_of_other_tools(
    tiny_folder: Path, tmp_path: Path
) -> None:
    config = replace(CONFIG, preprocess="quarot-portable")
    AutoQuantizer.from_pretrained(tiny_folder).quantize_to(tmp_path / "out", config, SMALL_TEXT)
    checkpoint = Checkpoint(tmp_path / "out")
    assert checkpoint.info().format == "gptq"
    assert not checkpoint.transform.is_online


def test_an_8_bit_embedding_is_counted_as_such(tiny_folder: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, embedding_bits=8)
    AutoQuantizer.from_pretrained(tiny_folder).quantize_to(tmp_path / "out", config, SMALL_TEXT)
    checkpoint = Checkpoint(tmp_path / "out")
    assert 8 < measure_sizes(checkpoint).embedding_bits == checkpoint.info().embedding_bpw < 9


def test_an_existing_target_is_left_alone(tiny_folder: Path) -> None:
    before = content(tiny_folder)
    with pytest.raises(VqllmError, match="exists already"):
        AutoQuantizer.from_pretrained(tiny_folder).quantize_to(tiny_folder, CONFIG, SMALL_TEXT)
    assert content(tiny_folder) == before


def test_a_quantized_model_is_not_quantized_again(tiny_folder: Path, tmp_path: Path) -> None:
    target = AutoQuantizer.from_pretrained(tiny_folder).quantize_to(
        tmp_path / "out", CONFIG, SMALL_TEXT
    )
    with pytest.raises(UnsupportedModel, match="quantized already"):
        AutoQuantizer.from_pretrained(target).quantize_to(tmp_path / "b", CONFIG, SMALL_TEXT)


def test_a_damaged_model_keeps_the_finished_linears_but_no_folder(
    make_folder: MakeFolder, tmp_path: Path
) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    folder = make_folder(tensors={name: torch.full((64, 160), torch.nan)})
    with pytest.raises(CorruptCheckpoint, match=name):
        AutoQuantizer.from_pretrained(folder).quantize_to(tmp_path / "out", CONFIG, SMALL_TEXT)
    assert not (tmp_path / "out").exists()
    kept = list((tmp_path / "out.partial").glob("model.layers.0.*.safetensors"))
    assert len(kept) == 7


@pytest.mark.parametrize("num_parts", [1, 4, 7, 8, 14])
def test_a_stopped_run_goes_on_to_the_same_bytes(
    tiny_folder: Path, tmp_path: Path, num_parts: int
) -> None:
    quantizer = AutoQuantizer.from_pretrained(tiny_folder)
    (tmp_path / "whole").mkdir()
    whole = quantizer.quantize_to(tmp_path / "whole" / "out", CONFIG, SMALL_TEXT)
    with pytest.raises(Stop):
        quantizer.quantize_to(tmp_path / "out", CONFIG, SMALL_TEXT, stop_after(num_parts))
    target = quantizer.quantize_to(tmp_path / "out", CONFIG, SMALL_TEXT)
    assert content(target) == content(whole)


KILLED = """
import os, signal, sys
from pathlib import Path
from vqllm.api import AutoQuantizer, RunOptions
from vqllm.calibration import CalibrationConfig
from vqllm.quantization.presets import QuantizeConfig
model, left = sys.argv[1], int(sys.argv[2])
def report(part):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
config = QuantizeConfig(bits=4, group_size=32, dampings=(0.01,))
text = CalibrationConfig(num_windows=4, window_length=64)
quantizer = AutoQuantizer.from_pretrained(model)
for target in sys.argv[3:]:
    quantizer.quantize_to(target, config, text, RunOptions(report=report))
"""


def test_a_killed_run_goes_on_to_the_same_bytes(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    target, whole = tmp_path / "out", tmp_path / "whole" / "out"

    def run(num_parts: int, *targets: Path) -> int:
        words = [sys.executable, "-c", KILLED, tiny_folder, num_parts, *targets]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run([str(word) for word in words], env=environment).returncode

    assert run(5, target) == -signal.SIGKILL
    assert run(11, target) == -signal.SIGKILL
    finished = {path.name for path in (tmp_path / "out.partial").glob("*.json")}
    assert "model.layers.1.self_attn.o_proj.json" in finished
    assert run(0, target, whole) == 0
    assert content(target) == content(whole)


def test_a_bit_budget_is_not_measured_twice(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = QuantizeConfig(method="tcq", bpw=3.0, dampings=(0.01,))
    quantizer = AutoQuantizer.from_pretrained(tiny_folder)
    with pytest.raises(Stop):
        quantizer.quantize_to(tmp_path / "out", config, SMALL_TEXT, stop_after(3))
    monkeypatch.delattr("vqllm.quantization.job.sensitivities")
    quantizer.quantize_to(tmp_path / "out", config, SMALL_TEXT)


def test_other_settings_do_not_go_on(tiny_folder: Path, tmp_path: Path) -> None:
    quantizer = AutoQuantizer.from_pretrained(tiny_folder)
    with pytest.raises(Stop):
        quantizer.quantize_to(tmp_path / "out", CONFIG, SMALL_TEXT, stop_after(3))
    other = replace(CONFIG, alpha=0.25)
    with pytest.raises(ResumeMismatch, match=r"out\.partial was started with another config"):
        quantizer.quantize_to(tmp_path / "out", other, SMALL_TEXT)
    longer = replace(SMALL_TEXT, num_windows=5)
    with pytest.raises(ResumeMismatch, match="another calibration"):
        quantizer.quantize_to(tmp_path / "out", CONFIG, longer)
    options = RunOptions(resume=False)
    assert quantizer.quantize_to(tmp_path / "out", other, SMALL_TEXT, options).is_dir()


def test_a_corrupted_artefact_is_named_on_resume(tiny_folder: Path, tmp_path: Path) -> None:
    quantizer = AutoQuantizer.from_pretrained(tiny_folder)
    with pytest.raises(Stop):
        quantizer.quantize_to(tmp_path / "out", CONFIG, SMALL_TEXT, stop_after(3))
    path = tmp_path / "out.partial" / "model.layers.0.self_attn.k_proj.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x00\x01")
    with pytest.raises(CorruptArtefact, match=r"k_proj\.safetensors.*remove both files"):
        quantizer.quantize_to(tmp_path / "out", CONFIG, SMALL_TEXT)
    path.unlink()
    path.with_suffix(".json").unlink()
    assert quantizer.quantize_to(tmp_path / "out", CONFIG, SMALL_TEXT).is_dir()


def test_memory_that_cannot_suffice_is_refused_before_any_work(
    tiny_folder: Path, tmp_path: Path
) -> None:
    quantizer = AutoQuantizer.from_pretrained(tiny_folder)
    options = RunOptions(max_memory=10**6, report=lambda part: pytest.fail("it started"))
    with pytest.raises(OverBudget, match=r"needs about \d+\.\d\d GB"):
        quantizer.quantize_to(tmp_path / "out", CONFIG, SMALL_TEXT, options)


def test_tuning_goes_into_the_folder(tiny_folder: Path, tmp_path: Path) -> None:
    quantizer = AutoQuantizer.from_pretrained(tiny_folder)
    text = CalibrationConfig(num_windows=12, window_length=32)
    config = QuantizeConfig(method="tcq", bits=2, dampings=(0.01,))
    plain = quantizer.quantize_to(tmp_path / "plain", config, text)
    steps: list[int] = []
    options = RunOptions(report_tuning=lambda step: steps.append(step.step))
    tuned = quantizer.quantize_to(tmp_path / "tuned", replace(config, tune_steps=3), text, options)
    assert steps == [1, 2, 3]
    names = [folder / "model.safetensors" for folder in (plain, tuned)]
    assert names[0].read_bytes() != names[1].read_bytes()


def test_push_to_hub_uploads_what_was_saved(tiny_folder: Path) -> None:
    class FakeHub:
        def __init__(self) -> None:
            self.calls: list[tuple[str, dict[str, Any]]] = []
            self.files: set[str] = set()

        def create_repo(self, repo_id: str, **arguments: Any) -> None:
            self.calls.append((repo_id, arguments))

        def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> None:
            self.calls.append((repo_id, {"message": commit_message}))
            self.files = {path.name for path in Path(folder_path).iterdir()}
            assert Checkpoint(Path(folder_path)).info("x").method == "gptq"

    hub, quantizer = FakeHub(), AutoQuantizer.from_pretrained(tiny_folder)
    with pytest.raises(VqllmError, match=r"call quantize\(\) first"):
        quantizer.push_to_hub("me/tiny-4bit", hub=hub)
    quantizer.quantize(SMALL_TEXT, bits=4, group_size=32, dampings=(0.01,))
    quantizer.push_to_hub("me/tiny-4bit", private=True, hub=hub)
    assert [repo for repo, _ in hub.calls] == ["me/tiny-4bit"] * 2
    assert hub.calls[0][1] == {"private": True, "exist_ok": True}
    assert {"config.json", "model.safetensors", "README.md", "tokenizer.json"} <= hub.files


def test_unknown_settings_and_names_are_refused(tiny_folder: Path) -> None:
    with pytest.raises(UnknownModel, match="no-such-model"):
        Checkpoint(resolve_model("no-such-model"))
    with pytest.raises(InvalidConfig, match="method is 'magic'"):
        AutoQuantizer.from_pretrained(tiny_folder).quantize(method="magic")


def test_an_unknown_architecture_is_named(make_folder: MakeFolder) -> None:
    folder = make_folder(architectures=["GrokForCausalLM"])
    with pytest.raises(UnsupportedModel, match="GrokForCausalLM"):
        AutoQuantizer.from_pretrained(folder)
