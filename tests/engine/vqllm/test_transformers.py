"""Folders of every format load in Hugging Face transformers and compute what we compute."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from support.tiny_models import CONFIGS, VOCAB_SIZE, write_tiny_model
from vqllm.checkpoint import Checkpoint
from vqllm.errors import UnsupportedModel
from vqllm.quantization.saving import CheckpointWriter, FolderPlan
from vqllm.runtime.executors.torch import TorchExecutor

if TYPE_CHECKING:
    from collections.abc import Callable

    from vqllm.quantization.base import QuantizedLinear

    MakeFolder = Callable[..., Path]

transformers = pytest.importorskip("transformers")

from transformers.quantizers import auto as hf_auto  # noqa: E402

import vqllm.integrations.transformers as integration  # noqa: E402
from vqllm.quantization.base import GroupedSpec  # noqa: E402
from vqllm.quantization.gptq import GptqOptions  # noqa: E402
from vqllm.quantization.hessian import factorize  # noqa: E402
from vqllm.quantization.methods import METHODS  # noqa: E402
from vqllm.quantization.tcq import TcqOptions  # noqa: E402
from vqllm.quantization.vptq import VptqOptions  # noqa: E402

TOKENS = [5, 80, 17, 200, 31, 7, 250, 99]
VPTQ = VptqOptions(num_centroids=16, kmeans_steps=2, num_rounds=0)
GPTQ = GptqOptions(GroupedSpec(4, 32))
TCQ = TcqOptions(bits=3)
ROTATED = {"residual_seed": 3, "down_seed": 5}


def quantized(weight: np.ndarray[Any, Any], options: Any) -> QuantizedLinear:
    """A linear quantized for white inputs."""
    factor = factorize(torch.eye(weight.shape[1], dtype=torch.float64), 0.01)
    linear: QuantizedLinear = METHODS[options.method].quantize(
        torch.from_numpy(weight), factor, options
    )
    return linear


def write(folder: Path, target: Path, options: Any, plan: FolderPlan) -> Path:
    source = Checkpoint(folder)
    with CheckpointWriter(source, target, plan) as writer:
        for name in source.linear_names():
            chosen = options(name) if callable(options) else options
            writer.add_linear(name, quantized(source.dense_linear(name), chosen))
    return target


def logits_of_transformers(folder: Path, tokens: list[int]) -> np.ndarray[Any, Any]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32)
    with torch.inference_mode():
        found = model(torch.tensor([tokens])).logits[0]
    return np.asarray(found.numpy())


def mixed(name: str) -> Any:
    return VPTQ if "mlp" in name else GPTQ


CASES: list[tuple[str, Any, FolderPlan]] = [
    ("gptq", GPTQ, FolderPlan()),
    ("vptq", VPTQ, FolderPlan()),
    ("vqstack", TCQ, FolderPlan(transform=ROTATED)),
    ("vqstack", mixed, FolderPlan(embedding_bits=8)),
]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("form", "options", "plan"), CASES)
@pytest.mark.filterwarnings("ignore:.*torch_dtype.*")
def test_logits_are_those_of_our_reference(
    make_folder: MakeFolder, tmp_path: Path, form: str, options: Any, plan: FolderPlan, tied: bool
) -> None:
    head = {} if tied else {"lm_head.weight": torch.randn(258, 64) / 8}
    source = make_folder("source", tie_word_embeddings=tied, tensors=head)
    target = write(source, tmp_path / "target", options, plan)
    assert Checkpoint(target).info().format == form
    expected = TorchExecutor(Checkpoint(target), 64).score(TOKENS)
    np.testing.assert_allclose(logits_of_transformers(target, TOKENS), expected, atol=1e-4)
    assert np.abs(expected).max() > 1


def test_peers_keep_their_formats_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    mapping: dict[str, Any] = {"gptq": object, "vptq": object}
    monkeypatch.setattr(hf_auto, "AUTO_QUANTIZER_MAPPING", mapping)
    monkeypatch.setattr(hf_auto, "AUTO_QUANTIZATION_CONFIG_MAPPING", dict(mapping))
    integration.register(replace=False)
    assert mapping["gptq"] is object
    assert mapping["vqstack"] is integration.VqllmQuantizer
    integration.register(replace=True)
    assert mapping["gptq"] is mapping["vptq"] is integration.VqllmQuantizer


FAMILIES = ("llama-biases", "mistral", "qwen2", "deepseek-v2-lite", "deepseek-v3")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loads_with_its_biases_experts_and_rotations(
    tmp_path: Path, family: str
) -> None:
    """Also experts that transformers 5 keeps in one tensor."""
    architecture = CONFIGS[family]["architectures"][0]
    if not hasattr(transformers, architecture):
        pytest.skip(f"transformers {transformers.__version__} has no {architecture}")
    source = write_tiny_model(tmp_path / "source", family)
    target = write(source, tmp_path / "q", VPTQ, FolderPlan(transform=ROTATED))
    tokens = [token % VOCAB_SIZE for token in TOKENS]
    expected = TorchExecutor(Checkpoint(target), 24).score(tokens)
    np.testing.assert_allclose(logits_of_transformers(target, tokens), expected, atol=1e-4)


def test_a_model_without_the_linear_is_refused_with_a_reason() -> None:
    model = torch.nn.ModuleDict({"layer": torch.nn.Identity()})
    with pytest.raises(UnsupportedModel, match=r"no linear layer other\.up_proj.*own executors"):
        integration._replaced(model, "other.up_proj")
