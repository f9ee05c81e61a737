"""Every family against transformers' own implementation, and what configs are refused."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from support.tiny_models import CONFIGS, VOCAB_SIZE, write_tiny_model
from vqllm.checkpoint import Checkpoint
from vqllm.decoder.block import forward_block, trace_block
from vqllm.decoder.rope import RotaryTable
from vqllm.decoder.trace import Tap
from vqllm.errors import CorruptCheckpoint, UnsupportedModel
from vqllm.model_config import parse_config
from vqllm.runtime.executors.torch import TorchExecutor
from vqllm.sources import PlainSource, source_logits

LENGTH = 24
TOKENS = np.random.default_rng(5).integers(0, VOCAB_SIZE, (2, LENGTH))
MODULES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "DeepseekV2ForCausalLM": "deepseek_v2",
    "DeepseekV3ForCausalLM": "deepseek_v3",
}


def transformers_logits(folder: Path, architecture: str) -> Any:
    # From its own module: the package root imports every model, for half a minute.
    module = MODULES[architecture]
    code = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
    model = getattr(code, architecture).from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        return model(torch.from_numpy(TOKENS)).logits.numpy()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", CONFIGS)
def test_logits_are_those_of_transformers(tmp_path: Path, family: str) -> None:
    folder = write_tiny_model(tmp_path, family)
    expected = transformers_logits(folder, CONFIGS[family]["architectures"][0])
    found = TorchExecutor(Checkpoint(folder), LENGTH, 1).score_windows(TOKENS)
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.filterwarnings("ignore")
def test_texts_longer_than_longrope_was_trained_on_use_the_long_factors(tmp_path: Path) -> None:
    rope = {**CONFIGS["llama-longrope"]["rope_scaling"], "original_max_position_embeddings": 16}
    folder = write_tiny_model(tmp_path, "llama-longrope", rope_scaling=rope)
    expected = transformers_logits(folder, "LlamaForCausalLM")
    found = TorchExecutor(Checkpoint(folder), LENGTH, 1).score_windows(TOKENS)
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.filterwarnings("ignore")
def test_texts_longer_than_the_context_stretch_the_dynamic_base(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path, "llama-dynamic", max_position_embeddings=16)
    expected = transformers_logits(folder, "LlamaForCausalLM")
    found = TorchExecutor(Checkpoint(folder), LENGTH, 1).score_windows(TOKENS)
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("family", ["mistral", "qwen2-window", "deepseek-v2", "deepseek-v3"])
def test_decoding_token_by_token_equals_scoring_the_text(tmp_path: Path, family: str) -> None:
    executor = TorchExecutor(Checkpoint(write_tiny_model(tmp_path, family)), LENGTH, 1)
    text = TOKENS[0].tolist()
    expected = executor.score(text)
    cache = executor.allocate()
    found = [executor.prefill(cache, text[:5])]
    found += [executor.decode([cache], [token])[0] for token in text[5:]]
    np.testing.assert_allclose(np.stack(found), expected[4:], atol=2e-5)


@pytest.mark.parametrize("family", CONFIGS)
def test_a_trace_shows_the_input_of_every_linear_in_order(tmp_path: Path, family: str) -> None:
    source = PlainSource(Checkpoint(write_tiny_model(tmp_path, family)))
    config, rotary = source.config, RotaryTable.build(source.config, LENGTH)
    hidden = source.embed(torch.from_numpy(TOKENS))
    for layer in range(config.num_layers):
        weights = source.block(layer)
        taps: list[Tap] = list(trace_block(hidden, weights, config, rotary))
        assert tuple(tap.parts for tap in taps) == config.linear_groups(layer)
        for tap in taps:
            for part in tap.parts:
                assert tap.inputs.shape[-1] == config.linear_shapes(layer)[part][1]
        hidden = forward_block(hidden, weights, config, rotary)


def test_a_trace_goes_on_with_weights_that_were_replaced(tmp_path: Path) -> None:
    source = PlainSource(Checkpoint(write_tiny_model(tmp_path, "deepseek-v3")))
    rotary = RotaryTable.build(source.config, LENGTH)
    hidden = source.embed(torch.from_numpy(TOKENS))
    traced, replaced = source.block(1), source.block(1)
    replaced.linears = {part: weight / 2 for part, weight in replaced.linears.items()}
    trace = trace_block(hidden, traced, source.config, rotary)
    while True:
        try:
            tap = next(trace)
        except StopIteration as stop:
            found = stop.value
            break
        for part in tap.parts:
            traced.linears[part] = traced.linears[part] / 2
    torch.testing.assert_close(found, forward_block(hidden, replaced, source.config, rotary))


def test_routed_experts_see_their_tokens_only(tmp_path: Path) -> None:
    source = PlainSource(Checkpoint(write_tiny_model(tmp_path, "deepseek-v3")))
    rotary = RotaryTable.build(source.config, LENGTH)
    hidden = source.embed(torch.from_numpy(TOKENS))
    taps = list(trace_block(hidden, source.block(1), source.config, rotary))
    routed = [tap for tap in taps if ".experts." in tap.parts[0]]
    num_routed = sum(len(tap.rows) for tap in routed if tap.rows is not None)
    assert num_routed == 2 * TOKENS.size * 3  # both linear groups of three experts per token
    for tap in routed:
        assert tap.rows is not None
        assert tap.every_token is not None
        everyone = tap.every_token()
        assert everyone.shape == (TOKENS.size, tap.inputs.shape[-1])
        torch.testing.assert_close(everyone[tap.rows], tap.inputs)


def test_sixteen_bit_products_stay_close(tmp_path: Path) -> None:
    checkpoint = Checkpoint(write_tiny_model(tmp_path, "deepseek-v2"))
    expected = TorchExecutor(checkpoint, LENGTH, 1).score_windows(TOKENS)
    fast = TorchExecutor(checkpoint, LENGTH, 1, dtype=torch.bfloat16).score_windows(TOKENS)
    assert np.abs(fast - expected).max() < 0.1 * np.abs(expected).max()


def test_prediction_layers_behind_the_last_block_are_left_out(tmp_path: Path) -> None:
    full = PlainSource(Checkpoint(write_tiny_model(tmp_path, "deepseek-v3")))
    config = CONFIGS["deepseek-v3"] | {"num_hidden_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    short = PlainSource(Checkpoint(tmp_path))
    assert any(".layers.2." in name for name in full.other_tensors())
    assert not any(".layers.2." in name for name in short.other_tensors())


def test_a_source_computes_what_the_executor_computes(tmp_path: Path) -> None:
    checkpoint = Checkpoint(write_tiny_model(tmp_path, "qwen2"))
    found = source_logits(PlainSource(checkpoint), torch.from_numpy(TOKENS)).numpy()
    expected = TorchExecutor(checkpoint, LENGTH, 1).score_windows(TOKENS)
    np.testing.assert_array_equal(found, expected)


def test_the_number_of_parameters_is_that_of_the_file(tmp_path: Path) -> None:
    for family in CONFIGS:
        checkpoint = Checkpoint(write_tiny_model(tmp_path / family, family))
        stored = sum(checkpoint.store.num_bytes(name) for name in checkpoint.store.names) // 4
        assert checkpoint.config.num_parameters == stored


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("llama", {"rope_scaling": {"rope_type": "mrope"}}, "rope type is 'mrope'"),
        ("llama", {"partial_rotary_factor": 0.5}, r"partial_rotary_factor is 0\.5"),
        ("deepseek-v2", {"norm_topk_prob": True}, "norm_topk_prob is True"),
        ("deepseek-v2", {"topk_method": "noaux_tc"}, "topk_method is 'noaux_tc'"),
        ("deepseek-v3", {"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
        ("deepseek-v3", {"moe_layer_freq": 2}, "moe_layer_freq is 2"),
    ],
)
def test_what_is_not_computed_is_refused(family: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        parse_config({**CONFIGS[family], **change})


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("llama", {"num_attention_heads": 5}, "no multiple of num_key_value_heads"),
        ("llama", {"head_dim": 7}, "7, is odd"),
        ("llama", {"num_attention_heads": 0}, "null, zero"),
        ("llama", {"hidden_size": None}, "null"),
        ("llama", {"rope_scaling": {"rope_type": "linear"}}, "'linear' has no factor"),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "below 1"),
        ("llama-longrope", {"head_dim": 16}, "8 short_factor"),
        ("deepseek-v3", {"n_routed_experts": 7}, "do not fill their groups"),
        ("deepseek-v3", {"num_experts_per_tok": 5}, "top_k"),
        ("deepseek-v2", {"num_experts_per_tok": None}, "null"),
    ],
)
def test_contradictory_sizes_are_named(family: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(CorruptCheckpoint, match=message):
        parse_config({**CONFIGS[family], **change})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_look_up_reads_rows_as_the_whole_table_would(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    checkpoint = Checkpoint(write_tiny_model(tmp_path, "llama", dtype))
    tokens = torch.from_numpy(TOKENS)
    expected = torch.from_numpy(checkpoint.embedding())[tokens]
    torch.testing.assert_close(PlainSource(checkpoint).embed(tokens), expected, atol=0, rtol=0)


def test_an_embedding_that_is_not_finite_is_named(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path, "llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][3, 4] = torch.inf
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CorruptCheckpoint, match=r"embed_tokens\.weight is not finite"):
        PlainSource(Checkpoint(folder)).embed(torch.tensor([1, 3]))


def test_an_embedding_of_another_size_is_named(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path, "llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"] = torch.zeros(5, 48)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CorruptCheckpoint, match=r"embed_tokens\.weight is F32 \(5, 48\)"):
        PlainSource(Checkpoint(folder)).embed(torch.tensor([1, 3]))
