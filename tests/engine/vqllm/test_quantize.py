"""Quantizing a whole model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vqllm.api import AutoQuantizer, resolve_model
from vqllm.calibration import CalibrationConfig, calibration_windows, default_text
from vqllm.checkpoint import Checkpoint, GptqFormat
from vqllm.errors import (
    CalibrationError,
    CorruptCheckpoint,
    UnknownModel,
    UnsupportedModel,
    VqllmError,
)
from vqllm.evaluation.perplexity import evaluate
from vqllm.quantization.gptq import GptqOptions, quantize_rtn
from vqllm.quantization.pipeline import QuantizedPart, quantize_model
from vqllm.quantization.saving import CheckpointWriter
from vqllm.runtime.executors.torch import TorchExecutor
from vqllm.runtime.tokenizer import ChatTokenizer

MakeFolder = Callable[..., Path]
Windows = np.ndarray[Any, np.dtype[np.int64]]

SMALL_TEXT = CalibrationConfig(num_windows=4, window_length=64)


def write(folder: Path, target: Path, parts: Iterator[QuantizedPart], options: GptqOptions) -> Path:
    with CheckpointWriter(Checkpoint(folder), target, GptqFormat(options.spec), "") as writer:
        for part in parts:
            writer.add(part)
    return target


def test_gptq_stays_closer_to_the_model_than_rounding(
    tiny_folder: Path, tmp_path: Path, windows: Windows, options: GptqOptions
) -> None:
    source = Checkpoint(tiny_folder)
    gptq = write(tiny_folder, tmp_path / "gptq", quantize_model(source, windows, options), options)
    rounded = (
        QuantizedPart(name, quantize_rtn(torch.from_numpy(source.dense_linear(name)), options), 0.0)
        for name in source.linear_names()
    )
    rtn = write(tiny_folder, tmp_path / "rtn", rounded, options)
    reference = TorchExecutor(source, 128, 1)
    divergences = []
    for folder in (gptq, rtn):
        score = evaluate(TorchExecutor(Checkpoint(folder), 128, 1), windows, reference)
        assert score.divergence is not None
        divergences.append(score.divergence)
    assert divergences[0] < divergences[1]


def test_a_model_scored_against_itself_does_not_diverge(
    tiny_folder: Path, windows: Windows
) -> None:
    executor = TorchExecutor(Checkpoint(tiny_folder), 128, 1)
    score = evaluate(executor, windows, executor)
    assert score.divergence == pytest.approx(0, abs=1e-6)
    assert score.top1_agreement == 1.0
    assert score.num_tokens == 8 * 31


def test_parts_are_reported_in_execution_order(
    tiny_folder: Path, windows: Windows, options: GptqOptions
) -> None:
    checkpoint = Checkpoint(tiny_folder)
    parts = list(quantize_model(checkpoint, windows, options))
    assert [part.name for part in parts] == checkpoint.linear_names()
    assert all(0 < part.relative_error < 0.1 for part in parts)


def test_the_three_calls_of_the_readme(tiny_folder: Path, tmp_path: Path) -> None:
    quantizer = AutoQuantizer.from_pretrained(tiny_folder)
    with pytest.raises(VqllmError, match=r"call quantize\(\) first"):
        quantizer.save_pretrained(tmp_path / "quantized")
    quantizer.quantize(bits=4, group_size=32, calibration=SMALL_TEXT)
    target = quantizer.save_pretrained(tmp_path / "quantized")
    assert Checkpoint(target).info().method == "gptq"


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_other_widths_write_readable_folders(tiny_folder: Path, tmp_path: Path, bits: int) -> None:
    quantizer = AutoQuantizer.from_pretrained(tiny_folder)
    quantizer.quantize(bits=bits, group_size=32, calibration=SMALL_TEXT)
    info = Checkpoint(quantizer.save_pretrained(tmp_path / "quantized")).info()
    assert info.bits == bits
    assert bits < info.bpw < bits + 1.5


def test_an_existing_target_is_left_alone(tiny_folder: Path, options: GptqOptions) -> None:
    before = (tiny_folder / "config.json").read_bytes()
    with pytest.raises(VqllmError, match="exists already"):
        AutoQuantizer.from_pretrained(tiny_folder).quantize_to(tiny_folder, options, SMALL_TEXT)
    assert (tiny_folder / "config.json").read_bytes() == before


def test_a_failure_leaves_nothing_behind(
    make_folder: MakeFolder, tmp_path: Path, options: GptqOptions
) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    folder = make_folder(tensors={name: torch.full((64, 160), torch.nan)})
    with pytest.raises(CorruptCheckpoint, match=name):
        AutoQuantizer.from_pretrained(folder).quantize_to(tmp_path / "out", options, SMALL_TEXT)
    assert sorted(path.name for path in tmp_path.iterdir()) == [folder.name]


def test_activations_that_overflow_name_the_layer(
    make_folder: MakeFolder, windows: Windows, options: GptqOptions
) -> None:
    norm = torch.full((64,), 3e38)
    folder = make_folder(tensors={"model.layers.1.input_layernorm.weight": norm})
    with pytest.raises(CalibrationError, match=r"model\.layers\.1\.self_attn\.q_proj.*NaN"):
        list(quantize_model(Checkpoint(folder), windows, options))


def test_weights_beyond_the_scales_of_the_format_name_the_layer(
    make_folder: MakeFolder, windows: Windows, options: GptqOptions
) -> None:
    weight = torch.full((64, 160), 1e30)
    folder = make_folder(tensors={"model.layers.0.mlp.down_proj.weight": weight})
    with pytest.raises(UnsupportedModel, match=r"model\.layers\.0\.mlp\.down_proj.*too large"):
        list(quantize_model(Checkpoint(folder), windows, options))


def test_a_quantized_model_is_not_quantized_again(
    tiny_folder: Path, tmp_path: Path, options: GptqOptions
) -> None:
    target = tmp_path / "out"
    AutoQuantizer.from_pretrained(tiny_folder).quantize_to(target, options, SMALL_TEXT)
    with pytest.raises(UnsupportedModel, match="quantized already"):
        AutoQuantizer.from_pretrained(target).quantize_to(tmp_path / "b", options, SMALL_TEXT)


def test_the_default_text_fills_the_default_windows(tiny_folder: Path) -> None:
    tokenizer = ChatTokenizer.from_folder(tiny_folder)
    config = CalibrationConfig()
    windows = calibration_windows(tokenizer, config)
    assert windows.shape == (config.num_windows, config.window_length)
    assert len(default_text()) > 50_000


def test_windows_spread_over_the_text(tiny_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("a" * 100 + "b" * 100 + "c" * 100 + "d" * 100)
    tokenizer = ChatTokenizer.from_folder(tiny_folder)
    windows = calibration_windows(tokenizer, CalibrationConfig(path, 4, 50))
    assert [tokenizer.decode(window.tolist())[0] for window in windows] == list("abcd")


def test_a_text_shorter_than_a_window_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("too short")
    with pytest.raises(CalibrationError, match=r"short\.txt has 9 tokens, one window needs 512"):
        calibration_windows(ChatTokenizer.from_folder(tiny_folder), CalibrationConfig(path))


def test_an_unreadable_text_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "binary.txt"
    path.write_bytes(b"\xff\xfe\x00")
    tokenizer = ChatTokenizer.from_folder(tiny_folder)
    for name in (path, tmp_path / "absent.txt"):
        with pytest.raises(CalibrationError, match=f"{name.name} cannot be read"):
            calibration_windows(tokenizer, CalibrationConfig(name))


def test_an_unknown_name_is_taken_for_a_folder() -> None:
    with pytest.raises(UnknownModel, match="no-such-model"):
        Checkpoint(resolve_model("no-such-model"))
