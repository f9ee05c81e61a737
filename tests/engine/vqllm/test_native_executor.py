"""The native executor against the torch reference on the same packed checkpoint."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from vqkernels import NativeStatus, forced_isa, native_status, supported_isas
from vqkernels.matrix_weights import GridWeights
from vqllm.checkpoint import Checkpoint
from vqllm.errors import ExecutorUnavailable, InvalidConfig, UnsupportedModel
from vqllm.formats.base import FolderFormat
from vqllm.formats.gptq import GptqFormat, packed_tensors
from vqllm.formats.vptq import VptqFormat
from vqllm.quantization.base import Arrays, GroupedLinear, GroupedSpec, contiguous_groups
from vqllm.quantization.vptq_linear import VptqLinear, VptqSpec, layer_config
from vqllm.runtime.engine import EngineConfig
from vqllm.runtime.executors import native
from vqllm.runtime.executors.base import Logits
from vqllm.runtime.executors.native import NativeExecutor, NativeOptions
from vqllm.runtime.executors.paged import Chunk
from vqllm.runtime.executors.torch import TorchExecutor
from vqllm.runtime.loading import make_executor
from vqllm.runtime.native_weights import packable

MakeFolder = Callable[..., Path]

TOKENS = np.random.default_rng(3).integers(0, 258, 40).tolist()
OTHER = np.random.default_rng(4).integers(0, 258, 70).tolist()
EXACT = NativeOptions(is_exact=True)
# What a head of 8 bits and a cache of halves leave of exactness.
EXACT_TOLERANCE = 0.03

pytestmark = pytest.mark.skipif(
    not native_status().available, reason=f"no native library: {native_status().reason}"
)


def quantized(folder: Path, target: Path, bits: int = 4, group_size: int = 32) -> Checkpoint:
    """The folder with every linear rounded to the nearest code, as a GPTQ folder."""
    form = GptqFormat(GroupedSpec(bits, group_size))

    def packed(name: str, weight: NDArray[np.float32]) -> Arrays:
        return packed_tensors(name, rounded(weight, form.spec), form)

    return written(folder, target, packed, lambda: form)


def vectorized(folder: Path, target: Path, spec: VptqSpec) -> Checkpoint:
    """The folder with every linear made of random vectors, as a VPTQ folder."""
    random, layers = np.random.default_rng(9), {}

    def packed(name: str, weight: NDArray[np.float32]) -> Arrays:
        linear = random_vectors(weight.shape, spec, 0.5 * float(weight.std()), random)
        layers[name] = layer_config(linear)
        return {f"{name}.{part}": values for part, values in linear.tensors().items()}

    return written(folder, target, packed, lambda: VptqFormat(layers))


def random_vectors(
    shape: tuple[int, ...], spec: VptqSpec, scale: float, random: np.random.Generator
) -> VptqLinear:
    (out, columns), v, v0 = shape, spec.vector_length, spec.outlier_vector_length

    def indices(count: int, *shape: int) -> NDArray[np.uint16]:
        return random.integers(0, count, shape).astype(np.uint16)

    def codebook(*shape: int) -> NDArray[np.float16]:
        return (scale * random.standard_normal(shape)).astype(np.float16)

    groups = (spec.num_groups, -(-out // v), spec.group_size(columns))
    return VptqLinear(
        num_rows=out,
        spec=spec,
        indices=indices(spec.num_centroids, *groups),
        centroids=codebook(spec.num_groups, spec.num_centroids, v),
        res_indices=indices(spec.num_res_centroids, *groups),
        res_centroids=codebook(spec.num_groups, spec.num_res_centroids, v),
        outlier_indices=indices(spec.num_outlier_centroids, -(-out // v0), spec.num_outliers),
        outlier_centroids=codebook(spec.num_outlier_centroids, v0),
        order=random.permutation(columns).astype(np.uint16),
        column_scales=random.uniform(0.5, 1.5, columns).astype(np.float16),
        column_biases=codebook(columns),
    )


def written(
    folder: Path,
    target: Path,
    packed: Callable[[str, NDArray[np.float32]], Arrays],
    form: Callable[[], FolderFormat],
) -> Checkpoint:
    """The folder with `packed` tensors for every linear; `form` is asked after that."""
    plain = Checkpoint(folder)
    linears = plain.linear_names()
    tensors = {
        name: np.array(plain.store.raw(name))
        for name in plain.store.names
        if name.removesuffix(".weight") not in linears
    }
    for name in linears:
        tensors |= packed(name, plain.dense_linear(name))
    target.mkdir()
    save_file(tensors, target / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = form().to_dict()
    (target / "config.json").write_text(json.dumps(config))
    return Checkpoint(target)


def rounded(weight: NDArray[np.float32], spec: GroupedSpec) -> GroupedLinear:
    groups = contiguous_groups(weight.shape[1], spec)
    largest = np.stack([np.abs(weight[:, groups == g]).max(1) for g in range(groups[-1] + 1)])
    scales = (2 * largest / spec.max_code).astype(np.float16)
    codes = np.rint(weight.T / scales.astype(np.float32)[groups]) + spec.symmetric_zero
    return GroupedLinear(
        codes=codes.clip(0, spec.max_code).astype(np.uint8),
        scales=scales,
        zeros=np.full_like(scales, spec.symmetric_zero, dtype=np.uint8),
        group_index=groups,
        spec=spec,
    )


def uneven(weight: NDArray[np.float32], spec: GroupedSpec) -> GroupedLinear:
    """As `rounded`, with a zero point of its own for every group."""
    linear, middle = rounded(weight, spec), spec.symmetric_zero
    shape = linear.zeros.shape
    zeros = np.random.default_rng(5).integers(middle - 2, middle + 3, shape, dtype=np.uint8)
    codes = linear.codes.astype(np.int16) + zeros[linear.group_index] - middle
    return replace(linear, codes=codes.clip(0, spec.max_code).astype(np.uint8), zeros=zeros)


@pytest.fixture
def checkpoint(tiny_folder: Path, tmp_path: Path) -> Checkpoint:
    return quantized(tiny_folder, tmp_path / "q")


def divergence(found: Logits, expected: Logits) -> float:
    """Mean KL divergence of the predictions from the expected ones, in nats."""
    ours, theirs = (torch.from_numpy(logits).log_softmax(-1) for logits in (found, expected))
    kl = torch.nn.functional.kl_div(ours, theirs, log_target=True, reduction="batchmean")
    return float(kl)


def assert_follows_the_reference(checkpoint: Checkpoint, tokens: list[int] = TOKENS) -> None:
    expected = TorchExecutor(checkpoint, 128, 1).score(tokens)
    exact = NativeExecutor(checkpoint, 128, 1, 1, EXACT).score(tokens)
    np.testing.assert_allclose(exact, expected, atol=EXACT_TOLERANCE * np.abs(expected).max())
    assert divergence(exact, expected) < 1e-3
    fast = NativeExecutor(checkpoint, 128, 1, 2).score(tokens)
    assert divergence(fast, expected) < 0.02


@pytest.mark.parametrize("is_mislabelled", [False, True])
def test_zero_points_of_groups_come_from_the_file_as_from_its_reader(
    tiny_folder: Path, tmp_path: Path, is_mislabelled: bool
) -> None:
    spec = GroupedSpec(4, 32)
    label = GptqFormat(spec, is_symmetric=False, is_v2=True)
    truth = replace(label, is_v2=not is_mislabelled)

    def packed(name: str, weight: NDArray[np.float32]) -> Arrays:
        return packed_tensors(name, uneven(weight, spec), truth)

    checkpoint = written(tiny_folder, tmp_path / "q", packed, lambda: label)
    weights, _ = packable(checkpoint, "model.layers.0.mlp.gate_proj")
    linear = checkpoint.linear("model.layers.0.mlp.gate_proj")
    assert isinstance(weights, GridWeights)
    assert isinstance(linear, GroupedLinear)
    assert weights.zeros is not None
    np.testing.assert_array_equal(weights.zeros, linear.zeros)
    assert (weights.codes.dtype == np.int32) == (not is_mislabelled)  # unpacked only where needed
    assert_follows_the_reference(checkpoint)


def test_int8_activations_keep_the_reference_s_predictions(checkpoint: Checkpoint) -> None:
    assert_follows_the_reference(checkpoint)
    executor = make_executor(checkpoint, "native", EngineConfig(max_num_sequences=1))
    assert executor.providers[0].startswith("vqkernels ")


@pytest.mark.parametrize(("bits", "group_size"), [(2, 32), (3, 64), (8, 128), (4, 128)])
def test_every_width_and_group_size_runs(
    tiny_folder: Path, tmp_path: Path, bits: int, group_size: int
) -> None:
    assert_follows_the_reference(quantized(tiny_folder, tmp_path / "q", bits, group_size))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_key_value_heads": 1},
        {"num_key_value_heads": 4, "head_dim": 24},
        {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8},
        {"rope_theta": 500_000.0, "rms_norm_eps": 1e-6},
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
        {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 9},
    ],
    ids=["one kv head", "odd head size", "three queries a head", "base", "llama3", "window"],
)
def test_every_shape_of_attention(
    make_folder: MakeFolder, tmp_path: Path, changes: dict[str, Any]
) -> None:
    assert_follows_the_reference(quantized(make_folder(**changes), tmp_path / "q"))


def test_outlier_columns_and_groups_with_codebooks_of_their_own(
    tiny_folder: Path, tmp_path: Path
) -> None:
    spec = VptqSpec(
        vector_length=6,
        num_centroids=512,
        num_res_centroids=64,
        num_groups=2,
        num_outliers=8,
        outlier_vector_length=4,
        has_order=True,
    )
    assert_follows_the_reference(vectorized(tiny_folder, tmp_path / "q", spec))


def test_biases_of_queries_keys_and_values(make_folder: MakeFolder, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(5)
    sizes = {"q_proj": 64, "k_proj": 32, "v_proj": 32}
    biases = {
        f"model.layers.{layer}.self_attn.{part}.bias": torch.randn(size, generator=generator)
        for layer in range(2)
        for part, size in sizes.items()
    }
    folder = make_folder(tensors=biases, architectures=["Qwen2ForCausalLM"], model_type="qwen2")
    assert_follows_the_reference(quantized(folder, tmp_path / "q"))


def test_biases_of_attention_and_mlp(make_folder: MakeFolder, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(5)
    rows = {"q": 64, "k": 32, "v": 32, "o": 64}
    sizes = {f"self_attn.{part}_proj": size for part, size in rows.items()}
    sizes |= {"mlp.gate_proj": 160, "mlp.up_proj": 160, "mlp.down_proj": 64}
    biases = {
        f"model.layers.{layer}.{part}.bias": torch.randn(size, generator=generator)
        for layer in range(2)
        for part, size in sizes.items()
    }
    folder = make_folder(tensors=biases, attention_bias=True, mlp_bias=True)
    assert_follows_the_reference(quantized(folder, tmp_path / "q"))


def test_an_untied_head(make_folder: MakeFolder, tmp_path: Path) -> None:
    head = torch.randn(258, 64, generator=torch.Generator().manual_seed(6))
    folder = make_folder(tensors={"lm_head.weight": head}, tie_word_embeddings=False)
    assert_follows_the_reference(quantized(folder, tmp_path / "q"))


@pytest.mark.parametrize("is_tied", [True, False])
def test_tables_of_8_bit_codes(make_folder: MakeFolder, tmp_path: Path, is_tied: bool) -> None:
    head = torch.randn(258, 64, generator=torch.Generator().manual_seed(6))
    tensors = {} if is_tied else {"lm_head.weight": head}
    folder = make_folder(tensors=tensors, tie_word_embeddings=is_tied)
    path = quantized(folder, tmp_path / "q").folder / "model.safetensors"
    stored = load_file(path)
    for stem in ("model.embed_tokens", "lm_head")[: 1 if is_tied else 2]:
        table = stored.pop(f"{stem}.weight")
        scales = (np.abs(table).max(1) / 127).astype(np.float32)
        stored[f"{stem}.weight_codes"] = np.rint(table / scales[:, None]).astype(np.int8)
        stored[f"{stem}.weight_scales"] = scales
    save_file(stored, path)
    assert_follows_the_reference(Checkpoint(tmp_path / "q"))


@pytest.mark.parametrize(("kv_bits", "bound"), [(8, 0.02), (4, 0.2)])
def test_small_caches_cost_little(checkpoint: Checkpoint, kv_bits: int, bound: float) -> None:
    expected = TorchExecutor(checkpoint, 128, 1).score(OTHER)
    executor = NativeExecutor(checkpoint, 128, 1, 1, NativeOptions(kv_bits=kv_bits))
    assert divergence(executor.score(OTHER), expected) < bound
    assert executor.page_bytes < NativeExecutor(checkpoint, 128, 1, 1).page_bytes


@pytest.mark.parametrize("kv_bits", [16, 8, 4])
@pytest.mark.parametrize("num_threads", [1, 3])
def test_bits_do_not_depend_on_chunks_batches_or_threads(
    checkpoint: Checkpoint, num_threads: int, kv_bits: int
) -> None:
    alone = NativeExecutor(checkpoint, 128, 2, 1, NativeOptions(kv_bits=kv_bits, max_rows=1))
    expected = [alone.score(tokens) for tokens in (TOKENS, OTHER)]
    options = NativeOptions(kv_bits=kv_bits, max_rows=13, page_size=32)
    executor = NativeExecutor(checkpoint, 128, 4, num_threads, options)
    first, second = executor.allocate(), executor.allocate()
    np.testing.assert_array_equal(executor.prefill(first, TOKENS[:20]), expected[0][19])
    np.testing.assert_array_equal(executor.prefill(second, OTHER[:50]), expected[1][49])
    for step in range(20):
        found = executor.decode([first, second], [TOKENS[20 + step], OTHER[50 + step]])
        np.testing.assert_array_equal(found[0], expected[0][20 + step])
        np.testing.assert_array_equal(found[1], expected[1][50 + step])


def test_every_tier_gives_the_same_bits(checkpoint: Checkpoint) -> None:
    found = []
    for isa in supported_isas():
        with forced_isa(isa):
            executor = NativeExecutor(checkpoint, 128, 1, 1)
            found.append(executor.score(OTHER))
            assert executor.providers[0] == f"vqkernels {isa.name.lower()}"
    for logits in found[1:]:
        np.testing.assert_array_equal(logits, found[0])


def test_greedy_answers_are_those_of_whole_logits(checkpoint: Checkpoint) -> None:
    executor = NativeExecutor(checkpoint, 128, 1, 2)
    pages = list(range(executor.num_pages))
    token, other = TOKENS[0], TOKENS[0]
    for position in range(60):
        vocab_size = executor.vocab_size
        logits = executor.step([Chunk(pages, position, [token], 1, vocab_size)])[0].copy()
        whole = executor.step([Chunk(pages, position, [other], 1)])[0]
        token, other = int(logits.argmax()), int(whole.argmax())
        assert token == other
        assert logits[token] == whole[token]
    assert 0 < executor.spared_bytes < executor.weight_bytes / 2


def test_prompts_and_answers_share_a_step(checkpoint: Checkpoint) -> None:
    executor = NativeExecutor(checkpoint, 128, 4, 2)
    expected = executor.score(TOKENS), executor.score(OTHER)
    # Scattered pages; the longer text comes in three chunks of odd lengths.
    tables = [[7, 2, 9], [1, 8, 0, 5, 3]]
    cuts = [0, 17, 37, 70]
    executor.step([Chunk(tables[0], 0, TOKENS[:30], 0)])
    for i, (start, stop) in enumerate(itertools.pairwise(cuts)):
        chunks = [
            Chunk(tables[0], 30 + i, TOKENS[30 + i : 31 + i]),
            Chunk(tables[1], start, OTHER[start:stop], stop - start),
        ]
        logits = executor.step(chunks)
        np.testing.assert_array_equal(logits[0], expected[0][30 + i])
        np.testing.assert_array_equal(logits[1:], expected[1][start:stop])


def test_pages_are_reused_and_copied(checkpoint: Checkpoint) -> None:
    executor = NativeExecutor(checkpoint, 128, 2, 2)
    expected = executor.score(TOKENS)
    executor.step([Chunk([4, 5], 0, OTHER[:32], 0)])  # leaves other keys behind
    executor.step([Chunk([4, 5], 0, TOKENS[:20], 0)])
    executor.copy_page(5, 6)
    executor.step([Chunk([4, 5], 20, OTHER[:4], 0)])  # one branch goes elsewhere
    logits = executor.step([Chunk([4, 6], 20, TOKENS[20:30], 10)])
    np.testing.assert_array_equal(logits, expected[20:30])


def test_what_does_not_exist_is_refused(checkpoint: Checkpoint) -> None:
    executor = NativeExecutor(checkpoint, 64, 1, 2)
    for chunk in (
        Chunk([0], 0, [258]),
        Chunk([0], 0, [-1]),
        Chunk([4], 0, [1]),
        Chunk([-1], 0, [1]),
        Chunk([0], -1, [1]),
        Chunk([0], 16, [1]),
        Chunk([0, 1, 2, 3, 0], 64, [1]),
    ):
        with pytest.raises(IndexError, match="lies outside"):
            executor.step([chunk])
    for chunk in (Chunk([0], 0, []), Chunk([0], 0, [1], 2), Chunk([], 0, [1])):
        with pytest.raises(ValueError, match="decoder step"):
            executor.step([chunk])
    with pytest.raises(IndexError):
        executor.copy_page(0, 4)
    cache = executor.allocate()
    with pytest.raises(RuntimeError, match="caches are taken"):
        executor.allocate()
    executor.free(cache)


def test_options_out_of_range() -> None:
    with pytest.raises(InvalidConfig, match="kv_bits"):
        NativeOptions(kv_bits=5)
    with pytest.raises(InvalidConfig, match="page_size"):
        NativeOptions(page_size=24)
    with pytest.raises(InvalidConfig, match="max_rows"):
        NativeOptions(max_rows=0)
    with pytest.raises(InvalidConfig, match="num_pages"):
        NativeOptions(num_pages=0)


def test_groups_without_a_kernel_are_refused_by_layer(tiny_folder: Path, tmp_path: Path) -> None:
    checkpoint = quantized(tiny_folder, tmp_path / "q", group_size=16)
    with pytest.raises(UnsupportedModel, match=r"layers\.0\.self_attn\.q_proj.*groups of 16"):
        NativeExecutor(checkpoint, 128, 1)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.INFO, logger="vqllm.runtime.loading"):
        yield caplog


def test_auto_takes_the_first_executor_that_runs_the_folder(
    tiny_folder: Path, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    config = EngineConfig(max_num_sequences=1)
    found = make_executor(quantized(tiny_folder, tmp_path / "q"), "auto", config)
    assert found.name == "native"
    assert make_executor(Checkpoint(tiny_folder), "auto", config).name == "onnx"
    small = quantized(tiny_folder, tmp_path / "small", group_size=16)
    assert make_executor(small, "auto", config).name == "onnx"
    assert "native cannot run" in log.text
    assert "groups of 16" in log.text


def test_without_a_library_the_reason_and_the_remaining_executors_are_named(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = NativeStatus(False, "", "built without a C++ compiler", ("onnx", "torch"))
    monkeypatch.setattr(native, "native_status", lambda: status)
    with pytest.raises(ExecutorUnavailable, match=r"without a C\+\+ compiler; use one of onnx"):
        NativeExecutor(Checkpoint(tiny_folder), 128, 1)
