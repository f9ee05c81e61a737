"""Tiny random models of every supported family, written as Hugging Face folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from vqllm.decoder.config import DecoderConfig
from vqllm.model_config import parse_config

VOCAB_SIZE = 96

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_LLAMA = {**_COMMON, "architectures": ["LlamaForCausalLM"], "model_type": "llama"}
_MISTRAL = {**_COMMON, "architectures": ["MistralForCausalLM"], "model_type": "mistral"}
_QWEN2 = {**_COMMON, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
_LATENT = {
    **_COMMON,
    "num_key_value_heads": 4,
    "num_hidden_layers": 3,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 12,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
    "norm_topk_prob": False,
    "topk_method": "greedy",
    "attention_bias": False,
}
_YARN = {
    "type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.7,
    "mscale_all_dim": 0.9,
}
_V2 = {**_LATENT, "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2"}
_V3 = {
    **_LATENT,
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "q_lora_rank": 20,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "num_nextn_predict_layers": 0,
}


def _scaled(rope: dict[str, Any]) -> dict[str, Any]:
    return {**_LLAMA, "rope_scaling": rope}


CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "llama-tied": {**_LLAMA, "tie_word_embeddings": True},
    "llama-biases": {**_LLAMA, "attention_bias": True, "mlp_bias": True},
    "llama-linear": _scaled({"rope_type": "linear", "factor": 2.5}),
    "llama-dynamic": _scaled({"rope_type": "dynamic", "factor": 2.0}),
    "llama-llama3": _scaled(
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    ),
    "llama-yarn": _scaled(
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    ),
    "llama-longrope": _scaled(
        {
            "rope_type": "longrope",
            "factor": 2.0,
            "original_max_position_embeddings": 32,
            "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
            "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 6.0],
        }
    ),
    "mistral": {**_MISTRAL, "sliding_window": 7, "head_dim": 16},
    "qwen2": {**_QWEN2, "tie_word_embeddings": True},
    "qwen2-window": {
        **_QWEN2,
        "use_sliding_window": True,
        "sliding_window": 7,
        "max_window_layers": 1,
    },
    "deepseek-v2-lite": {**_V2, "rope_scaling": _YARN},
    "deepseek-v2": {
        **_V2,
        "q_lora_rank": 20,
        "attention_bias": True,
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
    },
    "deepseek-v3": {**_V3, "rope_scaling": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0}},
    "deepseek-v3-halves": {**_V3, "rope_interleave": False, "first_k_dense_replace": 0},
}


def write_tiny_model(
    folder: Path, family: str, dtype: torch.dtype = torch.float32, **changes: Any
) -> Path:
    """A folder of config.json and random weights; activations stay of order one."""
    config = {**CONFIGS[family], **changes}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: t.to(dtype) for name, t in _random_tensors(parse_config(config)).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _random_tensors(config: DecoderConfig) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return scale * torch.randn(*shape, generator=generator)

    def norm(size: int) -> torch.Tensor:
        # Far from one, so that a norm left out of a fold shows.
        return normal(size, scale=0.4).exp()

    tensors = {"model.embed_tokens.weight": normal(config.vocab_size, config.hidden_size)}
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}"
        shapes = config.linear_shapes(layer)
        for part, (rows, columns) in shapes.items():
            tensors[f"{prefix}.{part}.weight"] = normal(rows, columns, scale=columns**-0.5)
        for part in config.bias_parts(layer):
            tensors[f"{prefix}.{part}.bias"] = normal(shapes[part][0], scale=0.3)
        for name, shape in config.inner_shapes(layer).items():
            tensors[f"{prefix}.{name}"] = norm(*shape) if "norm" in name else normal(*shape) / 5
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{name}.weight"] = norm(config.hidden_size)
    tensors["model.norm.weight"] = norm(config.hidden_size)
    if not config.tie_word_embeddings:
        tensors["lm_head.weight"] = normal(config.vocab_size, config.hidden_size, scale=0.3)
    return tensors
