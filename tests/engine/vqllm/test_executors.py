"""ONNX Runtime against the torch reference, and the reference against transformers."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from vqllm.api import AutoQuantizer
from vqllm.calibration import CalibrationConfig
from vqllm.checkpoint import Checkpoint
from vqllm.errors import ExecutorUnavailable, UnsupportedModel
from vqllm.export.onnx_graph import GraphOptions
from vqllm.quantization.base import GroupedLinear, GroupedSpec
from vqllm.runtime.engine import Engine, EngineConfig
from vqllm.runtime.executors import onnx as onnx_module
from vqllm.runtime.executors.base import Executor
from vqllm.runtime.executors.onnx import OnnxExecutor, check_onnxruntime_distribution
from vqllm.runtime.executors.torch import TorchExecutor
from vqllm.runtime.loading import load
from vqllm.runtime.sampling import SamplingParams

MakeFolder = Callable[..., Path]

EXACT = GraphOptions(accuracy_level=0, head="float32")
TOKENS = np.random.default_rng(3).integers(0, 258, 60).tolist()
TOLERANCE = 2e-4


def quantized(folder: Path, target: Path, bits: int = 4, group_size: int = 32) -> Checkpoint:
    quantizer = AutoQuantizer.from_pretrained(folder)
    text = CalibrationConfig(num_windows=4, window_length=64)
    quantizer.quantize(text, bits=bits, group_size=group_size)
    return Checkpoint(quantizer.save_pretrained(target))


@pytest.mark.filterwarnings("ignore")
def test_the_reference_computes_what_transformers_computes(tiny_folder: Path) -> None:
    # From its own module: the package root imports every model, for half a minute.
    from transformers.models.llama.modeling_llama import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    with torch.inference_mode():
        expected = model(torch.tensor([TOKENS])).logits[0].numpy()
    found = TorchExecutor(Checkpoint(tiny_folder), 128, 1).score(TOKENS)
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_exact_onnx_equals_the_reference(tiny_folder: Path, tmp_path: Path, bits: int) -> None:
    checkpoint = quantized(tiny_folder, tmp_path / "q", bits)
    expected = TorchExecutor(checkpoint, 128, 1).score(TOKENS)
    found = OnnxExecutor(checkpoint, 128, 1, 1, EXACT).score(TOKENS)
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)


def test_groups_that_do_not_divide_the_width_are_padded(tiny_folder: Path, tmp_path: Path) -> None:
    checkpoint = quantized(tiny_folder, tmp_path / "q", group_size=128)
    expected = TorchExecutor(checkpoint, 128, 1).score(TOKENS)
    found = OnnxExecutor(checkpoint, 128, 1, 1, EXACT).score(TOKENS)
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)


def test_an_unquantized_folder_runs_too(tiny_folder: Path) -> None:
    checkpoint = Checkpoint(tiny_folder)
    expected = TorchExecutor(checkpoint, 128, 1).score(TOKENS)
    found = OnnxExecutor(checkpoint, 128, 1, 1, EXACT).score(TOKENS)
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)


def test_int8_activations_and_head_keep_the_predictions(tiny_folder: Path, tmp_path: Path) -> None:
    checkpoint = quantized(tiny_folder, tmp_path / "q")
    expected = torch.from_numpy(TorchExecutor(checkpoint, 128, 1).score(TOKENS))
    found = torch.from_numpy(OnnxExecutor(checkpoint, 128, 1, 1).score(TOKENS))
    divergence = torch.nn.functional.kl_div(
        found.log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    assert divergence < 0.02


@pytest.mark.parametrize("name", ["onnx", "torch"])
def test_a_batch_decodes_as_its_members_do_alone(
    tiny_folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_module, "PREFILL_CHUNK", 16)  # prompts of several chunks
    checkpoint = Checkpoint(tiny_folder)
    executor = (
        OnnxExecutor(checkpoint, 128, 3, 1, EXACT)
        if name == "onnx"
        else TorchExecutor(checkpoint, 128, 3)
    )
    expected = executor.score(TOKENS)
    caches = [executor.allocate() for _ in range(3)]
    lengths = [20, 45, 7]
    for cache, length in zip(caches, lengths, strict=True):
        logits = executor.prefill(cache, TOKENS[:length])
        np.testing.assert_allclose(logits, expected[length - 1], atol=TOLERANCE)
    logits = executor.decode(caches, [TOKENS[length] for length in lengths])
    np.testing.assert_allclose(logits, expected[lengths], atol=TOLERANCE)
    # The first leaves: its row is filled by the last; the others go on, in another order.
    executor.free(caches[0])
    logits = executor.decode([caches[2], caches[1]], [TOKENS[8], TOKENS[46]])
    np.testing.assert_allclose(logits, expected[[8, 46]], atol=TOLERANCE)
    # A newcomer takes the freed place and sees nothing of its predecessor.
    cache = executor.allocate()
    np.testing.assert_allclose(executor.prefill(cache, TOKENS[:9]), expected[8], atol=TOLERANCE)
    logits = executor.decode([caches[1]], [TOKENS[47]])
    np.testing.assert_allclose(logits, expected[[47]], atol=TOLERANCE)


def test_a_batch_changes_no_bit_of_its_members_logits(tiny_folder: Path, tmp_path: Path) -> None:
    executor = OnnxExecutor(quantized(tiny_folder, tmp_path / "q"), 128, 4, 1)

    def decode(num_mates: int) -> list[np.ndarray[tuple[int, ...], np.dtype[np.float32]]]:
        caches = [executor.allocate() for _ in range(1 + num_mates)]
        for index, cache in enumerate(caches):
            executor.prefill(cache, TOKENS[index : 10 + 3 * index])
        steps = [executor.decode(caches, TOKENS[s : s + len(caches)])[0] for s in range(5)]
        for cache in caches:
            executor.free(cache)
        return steps

    alone = decode(0)
    for num_mates in (1, 3):
        for expected, found in zip(alone, decode(num_mates), strict=True):
            np.testing.assert_array_equal(found, expected)


class Bytes:
    """A tokenizer of which the engine needs the least."""

    eos_token_ids: frozenset[int] = frozenset()
    vocab_size = 258

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id % 256])


@pytest.mark.parametrize("name", ["onnx", "torch"])
def test_a_prompt_read_in_chunks_beside_others_changes_no_bit(
    tiny_folder: Path, tmp_path: Path, name: str
) -> None:
    checkpoint = quantized(tiny_folder, tmp_path / "q")
    executor: Executor = (
        OnnxExecutor(checkpoint, 128, 3, 1) if name == "onnx" else TorchExecutor(checkpoint, 128, 3)
    )
    config = EngineConfig(max_num_sequences=3, max_tokens_per_step=16)

    def logprobs(num_mates: int) -> list[float]:
        engine = Engine(executor, Bytes(), config)
        params = SamplingParams(max_tokens=4, temperature=0, logprobs=0)
        for mate in range(num_mates):
            engine.add(f"mate{mate}", TOKENS[mate : mate + 21], SamplingParams(max_tokens=9))
            engine.step()
        engine.add("it", TOKENS[:50], params)
        outputs = []
        while engine.has_work:
            outputs += [output for output in engine.step() if output.sequence_id == "it"]
        return [entry.logprob for output in outputs for entry in output.logprobs]

    alone = logprobs(0)
    assert len(alone) == 4
    assert logprobs(1) == alone
    assert logprobs(2) == alone


def test_more_sequences_than_caches_is_our_own_mistake(tiny_folder: Path) -> None:
    executor = OnnxExecutor(Checkpoint(tiny_folder), 128, 2, 1)
    executor.allocate()
    executor.allocate()
    with pytest.raises(RuntimeError, match="all 2 KV caches"):
        executor.allocate()


def test_the_graph_is_made_once(tiny_folder: Path) -> None:
    OnnxExecutor(Checkpoint(tiny_folder), 128, 1, 1)
    made = list((tiny_folder / "onnx").rglob("model.onnx"))
    assert len(made) == 1
    before = made[0].stat().st_mtime_ns
    OnnxExecutor(Checkpoint(tiny_folder), 128, 1, 1)
    assert made[0].stat().st_mtime_ns == before


def test_providers_are_those_of_the_session(tiny_folder: Path) -> None:
    executor = OnnxExecutor(Checkpoint(tiny_folder), 128, 1, 1)
    assert "CPUExecutionProvider" in executor.providers


def test_permuted_groups_are_refused_by_onnx_and_run_by_torch(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = quantized(tiny_folder, tmp_path / "q")
    linear = checkpoint.linear("model.layers.0.mlp.up_proj")
    assert isinstance(linear, GroupedLinear)
    permuted = GroupedLinear(
        linear.codes, linear.scales, linear.zeros, linear.group_index[::-1].copy(), linear.spec
    )
    monkeypatch.setattr(Checkpoint, "linear", lambda self, name: permuted)
    with pytest.raises(UnsupportedModel, match="groups are permuted"):
        onnx_module._export_into(tmp_path, "key", checkpoint, EXACT)
    assert permuted.dequantize().shape == (160, 64)


def test_int8_head_rounds_within_half_a_step() -> None:
    from vqllm.export.onnx_graph import quantize_rows_int8

    weight = np.random.default_rng(0).standard_normal((40, 64)).astype(np.float32)
    head = quantize_rows_int8(weight)
    assert head.spec == GroupedSpec(8, 32)
    steps = np.repeat(head.scales.T.astype(np.float32), 32, axis=1)
    assert (np.abs(head.dequantize() - weight) <= 0.51 * steps).all()


@pytest.mark.parametrize(
    ("installed", "message"),
    [
        (("onnxruntime", "onnxruntime-gpu"), "both installed"),
        ((), "not installed"),
    ],
)
def test_wrong_distributions_are_refused(
    monkeypatch: pytest.MonkeyPatch, installed: tuple[str, ...], message: str
) -> None:
    def version(name: str) -> str:
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ExecutorUnavailable, match=message):
        check_onnxruntime_distribution()


def test_one_distribution_is_named() -> None:
    assert check_onnxruntime_distribution() in ("onnxruntime", "onnxruntime-gpu")


def test_an_unknown_executor_is_refused(tiny_folder: Path) -> None:
    with pytest.raises(ExecutorUnavailable, match="'tpu'; known: auto, cuda, native, onnx, torch"):
        load(tiny_folder, executor="tpu")
