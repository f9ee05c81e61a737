"""A tiny random llama with a byte-level tokenizer, made from scratch for every test run."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from vqkernels import native_status
from vqllm.cli import main
from vqllm.quantization.base import GroupedSpec
from vqllm.quantization.gptq import GptqOptions

MakeFolder = Callable[..., Path]
RunVqllm = Callable[..., tuple[int, str, str]]

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 160,
    "max_position_embeddings": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "vocab_size": 258,
}

TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}: {{ message['content'] }}</s>"
    "{% endfor %}{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


def random_tensors(config: dict[str, Any], seed: int) -> dict[str, torch.Tensor]:
    """Weights of a llama of the given config, scaled so that activations stay of order one."""
    generator = torch.Generator().manual_seed(seed)
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    shapes = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    tensors = {"model.embed_tokens.weight": torch.randn(258, hidden, generator=generator)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for part, (rows, columns) in shapes.items():
            weight = torch.randn(rows, columns, generator=generator)
            tensors[f"{prefix}.{part}.weight"] = weight / columns**0.5
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{norm}.weight"] = 1 + 0.1 * torch.randn(hidden, generator=generator)
    tensors["model.norm.weight"] = 1 + 0.1 * torch.randn(hidden, generator=generator)
    return tensors


def byte_tokenizer() -> Tokenizer:
    """One token per byte in byte order, then <s> (256) and </s> (257)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {byte: chr(byte) for byte in printable}
    alphabet |= {byte: chr(0x100 + index) for index, byte in enumerate(others)}
    tokenizer = Tokenizer(BPE({alphabet[byte]: byte for byte in range(256)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken("<s>", special=True), AddedToken("</s>", special=True)]
    )
    return tokenizer


@pytest.fixture
def make_folder(tmp_path: Path) -> MakeFolder:
    """Writes a model folder: `make_folder(name, seed=0, tensors={}, **config_changes)`.

    `tensors` replaces tensors by name, None removes one.
    """

    def make(
        name: str = "tiny",
        seed: int = 0,
        tensors: dict[str, torch.Tensor | None] | None = None,
        **changes: Any,
    ) -> Path:
        config = {**CONFIG, **changes}
        folder = tmp_path / name
        folder.mkdir()
        weights = {**random_tensors(config, seed), **(tensors or {})}
        kept = {key: tensor for key, tensor in weights.items() if tensor is not None}
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config))
        byte_tokenizer().save(str(folder / "tokenizer.json"))
        settings = {"chat_template": TEMPLATE, "eos_token": "</s>", "bos_token": "<s>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        return folder

    return make


@pytest.fixture
def tiny_folder(make_folder: MakeFolder) -> Path:
    return make_folder()


@pytest.fixture
def options() -> GptqOptions:
    return GptqOptions(GroupedSpec(bits=4, group_size=32))


@pytest.fixture
def windows() -> np.ndarray[Any, np.dtype[np.int64]]:
    """Calibration tokens, (8, 32)."""
    return np.random.default_rng(0).integers(0, 256, (8, 32)).astype(np.int64)


@pytest.fixture(scope="session")
def native_encoder() -> None:
    """Trellises are searched by native code; skip where nothing could be built."""
    status = native_status()
    if not status.available and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip(status.reason)


@pytest.fixture
def run_vqllm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> RunVqllm:
    """Runs `vqllm WORDS...`: exit code, standard output and standard error."""

    def run(*words: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["vqllm", *map(str, words)])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as done:
            main()
        captured = capsys.readouterr()
        return int(done.value.code or 0), captured.out, captured.err

    return run
