"""Shapes of well-known models, so that a plan needs no download.

Numbers are those of the published config.json files. Knows no cost.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vqllm.decoder.config import DecoderConfig
from vqllm.errors import CorruptCheckpoint, UnknownModel
from vqllm.model_config import parse_config, read_config

Json = dict[str, Any]


def _llama(
    hidden: int, inner: int, layers: int, heads: tuple[int, int], vocab: int = 128_256
) -> Json:
    return {
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "vocab_size": vocab,
        "max_position_embeddings": 4096 if vocab == 32_000 else 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0 if vocab == 32_000 else 500_000.0,
        "tie_word_embeddings": False,
    }


def _qwen2(hidden: int, inner: int, layers: int, heads: tuple[int, int], vocab: int) -> Json:
    base = _llama(hidden, inner, layers, heads, vocab)
    return {**base, "architectures": ["Qwen2ForCausalLM"], "rope_theta": 1_000_000.0}


_DEEPSEEK_V3: Json = {
    **_llama(7168, 18_432, 61, (128, 128), 129_280),
    "architectures": ["DeepseekV3ForCausalLM"],
    "rope_theta": 10_000.0,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048,
    "n_shared_experts": 1,
    "first_k_dense_replace": 3,
    "moe_layer_freq": 1,
    "n_group": 8,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
}

_CONFIGS: dict[str, Json] = {
    "smollm2-135m": {
        **_llama(576, 1536, 30, (9, 3), 49_152),
        "tie_word_embeddings": True,
    },
    "llama-2-7b": _llama(4096, 11_008, 32, (32, 32), 32_000),
    "llama-2-13b": _llama(5120, 13_824, 40, (40, 40), 32_000),
    "llama-2-70b": _llama(8192, 28_672, 80, (64, 8), 32_000),
    "llama-3-8b": _llama(4096, 14_336, 32, (32, 8)),
    "llama-3-70b": _llama(8192, 28_672, 80, (64, 8)),
    "llama-3.1-405b": _llama(16_384, 53_248, 126, (128, 8)),
    "mistral-7b": {
        **_llama(4096, 14_336, 32, (32, 8), 32_000),
        "architectures": ["MistralForCausalLM"],
    },
    "qwen2-7b": _qwen2(3584, 18_944, 28, (28, 4), 152_064),
    "qwen2-72b": _qwen2(8192, 29_568, 80, (64, 8), 152_064),
    "deepseek-v3": _DEEPSEEK_V3,
}

NAMES = tuple(_CONFIGS)


def find_shape(model: str | Path) -> DecoderConfig:
    """Shape of a model given by a name of `NAMES`, a folder, or a config.json.

    Raises:
        UnknownModel: none of these.
        UnsupportedModel, CorruptCheckpoint: the config cannot be used.
    """
    if str(model) in _CONFIGS:
        return parse_config(_CONFIGS[str(model)])
    path = Path(model)
    if path.is_dir():
        return parse_config(read_config(path))
    if not path.is_file():
        raise UnknownModel(f"{model} is no folder, no config.json and none of {', '.join(NAMES)}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CorruptCheckpoint(f"{path}: {error}") from error
    return parse_config(content)
