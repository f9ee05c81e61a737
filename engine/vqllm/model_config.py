"""The shape of a llama-like decoder, read from a Hugging Face config.json."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vqllm.errors import CorruptCheckpoint, UnknownModel, UnsupportedModel

SUPPORTED_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes of the decoder; names as in Hugging Face configs, except `context_length`."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context_length: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """(out_features, in_features) of the linear layers of one block, by name."""
        query_size = self.num_heads * self.head_dim
        kv_size = self.num_kv_heads * self.head_dim
        return {
            "self_attn.q_proj": (query_size, self.hidden_size),
            "self_attn.k_proj": (kv_size, self.hidden_size),
            "self_attn.v_proj": (kv_size, self.hidden_size),
            "self_attn.o_proj": (self.hidden_size, query_size),
            "mlp.gate_proj": (self.intermediate_size, self.hidden_size),
            "mlp.up_proj": (self.intermediate_size, self.hidden_size),
            "mlp.down_proj": (self.hidden_size, self.intermediate_size),
        }

    @property
    def num_linear_parameters(self) -> int:
        """Weights of all decoder linears, without embedding, head and norms."""
        return self.num_layers * sum(rows * cols for rows, cols in self.linear_shapes().values())

    @property
    def num_parameters(self) -> int:
        """All weights; a tied head counts once."""
        tables = 1 if self.tie_word_embeddings else 2
        norms = (2 * self.num_layers + 1) * self.hidden_size
        return self.num_linear_parameters + tables * self.vocab_size * self.hidden_size + norms


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json as it is.

    Raises:
        UnknownModel: no such file.
        CorruptCheckpoint: not a JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UnknownModel(f"{folder} is not a model folder: it holds no config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CorruptCheckpoint(f"{path}: {error}") from error
    if not isinstance(config, dict):
        raise CorruptCheckpoint(f"{path}: expected an object, found {type(config).__name__}")
    return config


def parse_config(config: dict[str, Any]) -> LlamaConfig:
    """Shape from the content of a config.json.

    Raises:
        UnsupportedModel: an architecture or feature that the block code does not compute.
        CorruptCheckpoint: a field is missing; names it.
    """
    architecture = (config.get("architectures") or ["unknown"])[0]
    if architecture not in SUPPORTED_ARCHITECTURES:
        known = ", ".join(SUPPORTED_ARCHITECTURES)
        raise UnsupportedModel(f"architecture {architecture!r} is not supported; known: {known}")
    _check_features(config)
    try:
        return LlamaConfig(
            architecture=architecture,
            vocab_size=int(config["vocab_size"]),
            hidden_size=int(config["hidden_size"]),
            intermediate_size=int(config["intermediate_size"]),
            num_layers=int(config["num_hidden_layers"]),
            num_heads=int(config["num_attention_heads"]),
            num_kv_heads=int(config.get("num_key_value_heads") or config["num_attention_heads"]),
            head_dim=int(
                config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
            ),
            context_length=int(config["max_position_embeddings"]),
            rms_norm_eps=float(config["rms_norm_eps"]),
            rope_theta=float(_rope(config).get("rope_theta", 10_000.0)),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        )
    except KeyError as error:
        raise CorruptCheckpoint(f"config.json: field {error} is missing") from error


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """Rotary parameters, from the nested form of transformers 5 or from the flat older one."""
    nested = config.get("rope_parameters") or config.get("rope_scaling") or {}
    flat = {"rope_theta": config["rope_theta"]} if "rope_theta" in config else {}
    return {**flat, **nested}


def _check_features(config: dict[str, Any]) -> None:
    rope = _rope(config)
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    refused = {
        "rope type": (rope_type, "default"),
        "hidden_act": (config.get("hidden_act", "silu"), "silu"),
        "attention_bias": (bool(config.get("attention_bias")), False),
        "mlp_bias": (bool(config.get("mlp_bias")), False),
        "sliding_window": (config.get("sliding_window"), None),
    }
    for feature, (value, wanted) in refused.items():
        if value != wanted:
            raise UnsupportedModel(f"{feature} is {value!r}; only {wanted!r} is implemented")
