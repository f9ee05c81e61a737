"""From a folder of any family to a quantized, preprocessed folder and back into logits."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from support.tiny_models import CONFIGS, VOCAB_SIZE, write_tiny_model
from vqllm.checkpoint import Checkpoint
from vqllm.errors import UnsupportedModel
from vqllm.outlier.quarot import QuarotOptions, RotatedSource
from vqllm.quantization.job import QuantizeJob
from vqllm.quantization.pipeline import Surroundings
from vqllm.quantization.presets import QuantizeConfig
from vqllm.runtime.executors.support import refuse_beyond
from vqllm.runtime.executors.torch import TorchExecutor
from vqllm.sources import PlainSource, WeightSource, as_float32, source_logits

WINDOWS = np.random.default_rng(0).integers(0, VOCAB_SIZE, (4, 24)).astype(np.int64)
TOKENS = np.random.default_rng(5).integers(0, VOCAB_SIZE, (2, 24))
# Sizes whose 8-bit codes fill whole words, and few experts.
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "head_dim": 16,
    "num_hidden_layers": 2,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 2,
    "num_experts_per_tok": 2,
}


def quantized(source: Checkpoint, target: Path, preprocess: str) -> Checkpoint:
    config = QuantizeConfig(method="gptq", bits=8, group_size=16, preprocess=preprocess)
    job = QuantizeJob(source, config, WINDOWS, "random tokens")
    recipe = job.recipe()
    job.write(target, job.run(recipe, Surroundings()), recipe, {})
    return Checkpoint(target)


@pytest.mark.parametrize(
    "family", ["llama-biases", "mistral", "qwen2", "deepseek-v2", "deepseek-v3"]
)
@pytest.mark.parametrize("preprocess", ["quarot", "smoothquant"])
def test_a_preprocessed_8_bit_folder_keeps_the_logits(
    tmp_path: Path, family: str, preprocess: str
) -> None:
    sizes = {name: size for name, size in SIZES.items() if name in CONFIGS[family]}
    source = Checkpoint(write_tiny_model(tmp_path / "model", family, **sizes))
    folder = quantized(source, tmp_path / "quantized", preprocess)
    assert folder.transform.is_online == (preprocess == "quarot")
    expected = TorchExecutor(source, 24, 1).score_windows(TOKENS)
    found = TorchExecutor(folder, 24, 1).score_windows(TOKENS)
    # Rounding may send a token to another expert, so the median counts.
    assert np.median(np.abs(found - expected)) < 0.02 * np.abs(expected).mean()


def write_source(source: WeightSource, config: dict[str, Any], folder: Path) -> None:
    """The full-precision weights of a source as a plain folder."""
    tensors = {name: as_float32(values) for name, values in source.other_tensors().items()}
    for layer in range(source.config.num_layers):
        for part, weight in source.block(layer).linears.items():
            tensors[f"model.layers.{layer}.{part}.weight"] = weight
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**config, **source.config_changes}))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("family", "module", "architecture"),
    [
        ("llama-tied", "llama", "LlamaForCausalLM"),
        ("qwen2", "qwen2", "Qwen2ForCausalLM"),
        ("deepseek-v3", "deepseek_v3", "DeepseekV3ForCausalLM"),
    ],
)
def test_transformers_runs_a_portable_rotated_folder(
    tmp_path: Path, family: str, module: str, architecture: str
) -> None:
    source = PlainSource(Checkpoint(write_tiny_model(tmp_path / "model", family)))
    rotated = RotatedSource(source, QuarotOptions(seed=3, portable=True))
    write_source(rotated, CONFIGS[family], tmp_path / "rotated")
    code = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
    model = getattr(code, architecture).from_pretrained(tmp_path / "rotated", dtype=torch.float32)
    with torch.inference_mode():
        found = model(torch.from_numpy(TOKENS)).logits
    expected = source_logits(source, torch.from_numpy(TOKENS))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_an_executor_names_what_it_does_not_compute(tmp_path: Path) -> None:
    sizes = {name: size for name, size in SIZES.items() if name in CONFIGS["qwen2"]}
    source = Checkpoint(write_tiny_model(tmp_path / "model", "qwen2", **sizes))
    folder = quantized(source, tmp_path / "quantized", "quarot")
    with pytest.raises(
        UnsupportedModel, match=r"a rotated residual stream, biases, rotated down projections"
    ):
        refuse_beyond(folder, "some")
    rotations = frozenset({"a rotated residual stream", "rotated down projections"})
    refuse_beyond(folder, "some", rotations | {"biases"})
