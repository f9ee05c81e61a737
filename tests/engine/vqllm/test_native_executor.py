"""The native executor against the torch reference on the same packed checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from vqkernels import NativeStatus, native_status
from vqllm.api import AutoQuantizer
from vqllm.calibration import CalibrationConfig
from vqllm.checkpoint import Checkpoint
from vqllm.errors import ExecutorUnavailable, UnsupportedModel
from vqllm.runtime.engine import EngineConfig
from vqllm.runtime.executors import native
from vqllm.runtime.executors.native import NativeExecutor
from vqllm.runtime.executors.torch import TorchExecutor
from vqllm.runtime.loading import make_executor

MakeFolder = Callable[..., Path]

TOKENS = np.random.default_rng(3).integers(0, 258, 40).tolist()
needs_library = pytest.mark.skipif(
    not native_status().available, reason=f"no native library: {native_status().reason}"
)


def quantized(folder: Path, target: Path, bits: int = 4) -> Checkpoint:
    quantizer = AutoQuantizer.from_pretrained(folder)
    quantizer.quantize(bits, 32, CalibrationConfig(num_windows=4, window_length=64))
    return Checkpoint(quantizer.save_pretrained(target))


@needs_library
def test_int8_activations_keep_the_reference_s_predictions(
    tiny_folder: Path, tmp_path: Path
) -> None:
    checkpoint = quantized(tiny_folder, tmp_path / "q")
    expected = torch.from_numpy(TorchExecutor(checkpoint, 128, 1).score(TOKENS))
    executor = make_executor(checkpoint, "native", EngineConfig(max_num_sequences=1))
    found = torch.from_numpy(executor.score(TOKENS))
    divergence = torch.nn.functional.kl_div(
        found.log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    assert divergence < 0.02
    assert not torch.equal(found, expected)
    assert executor.providers[0].startswith("vqkernels ")


@needs_library
@pytest.mark.parametrize("num_threads", [1, 3])
def test_decoding_token_by_token_equals_scoring_the_text(
    tiny_folder: Path, tmp_path: Path, num_threads: int
) -> None:
    executor = NativeExecutor(quantized(tiny_folder, tmp_path / "q"), 128, 2, num_threads)
    expected = executor.score(TOKENS)
    cache = executor.allocate()
    np.testing.assert_allclose(executor.prefill(cache, TOKENS[:20]), expected[19], atol=2e-2)
    for position in range(20, 24):
        logits = executor.decode([cache], [TOKENS[position]])
        np.testing.assert_allclose(logits[0], expected[position], atol=2e-2)


@needs_library
def test_other_widths_are_refused_by_layer(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"layers\.0\.self_attn\.q_proj is not a 4-bit"):
        NativeExecutor(quantized(tiny_folder, tmp_path / "q", bits=8), 128, 1)


def test_without_a_library_the_reason_and_the_remaining_executors_are_named(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = NativeStatus(False, "", "built without a C++ compiler", ("onnx", "torch"))
    monkeypatch.setattr(native, "native_status", lambda: status)
    with pytest.raises(ExecutorUnavailable, match=r"without a C\+\+ compiler; use one of onnx"):
        NativeExecutor(Checkpoint(tiny_folder), 128, 1)
