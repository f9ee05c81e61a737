"""Reads a decoder's shape from a Hugging Face config.json, and says what it cannot compute.

Flat fields of transformers 4 and nested `rope_parameters` of transformers 5 mean the same here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from vqllm.decoder.config import ROPE_KINDS, DecoderConfig, MlaConfig, MoeConfig, RopeConfig
from vqllm.errors import CorruptCheckpoint, UnknownModel, UnsupportedModel

LlamaConfig = DecoderConfig

_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_LATENT = ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa")
_OUTPUT = ("self_attn.o_proj",)
_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_OLD_ROPE_NAMES = {"su": "longrope"}

Json = dict[str, Any]


def read_config(folder: Path) -> Json:
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


def parse_config(config: Json) -> DecoderConfig:
    """Shape from the content of a config.json.

    Raises:
        UnsupportedModel: an architecture or feature that the block code does not compute.
        CorruptCheckpoint: a field is missing or makes no sense; names it.
    """
    architecture = (config.get("architectures") or ["unknown"])[0]
    if architecture not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise UnsupportedModel(f"architecture {architecture!r} is not supported; known: {known}")
    _refuse_unless(config, hidden_act=("silu",), partial_rotary_factor=(1, 1.0))
    try:
        plain = _plain(config, architecture)
        return _checked(FAMILIES[architecture](config, plain))
    except KeyError as error:
        raise CorruptCheckpoint(f"config.json: field {error} is missing") from error
    except (TypeError, ZeroDivisionError) as error:
        raise CorruptCheckpoint(
            f"config.json: a size is null, zero or no number ({error})"
        ) from error


def _plain(config: Json, architecture: str) -> DecoderConfig:
    """What all families have, without biases, windows, latents and experts."""
    num_heads, hidden_size = int(config["num_attention_heads"]), int(config["hidden_size"])
    rope = _rope(config)
    return DecoderConfig(
        architecture=architecture,
        vocab_size=int(config["vocab_size"]),
        hidden_size=hidden_size,
        intermediate_size=int(config["intermediate_size"]),
        num_layers=int(config["num_hidden_layers"]),
        num_heads=num_heads,
        num_kv_heads=int(config.get("num_key_value_heads") or num_heads),
        head_dim=int(config.get("head_dim") or hidden_size // num_heads),
        context_length=int(config["max_position_embeddings"]),
        rms_norm_eps=float(config["rms_norm_eps"]),
        rope_theta=rope.theta,
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        rope=rope,
    )


def _llama(config: Json, plain: DecoderConfig) -> DecoderConfig:
    _refuse_unless(config, sliding_window=(None,))
    attention = (*_ATTENTION, *_OUTPUT) if config.get("attention_bias") else ()
    mlp = _MLP if config.get("mlp_bias") else ()
    return replace(plain, biases=(*attention, *mlp))


def _mistral(config: Json, plain: DecoderConfig) -> DecoderConfig:
    _refuse_unless(config, attention_bias=(None, False), mlp_bias=(None, False))
    return _with_window(plain, config.get("sliding_window"), range(plain.num_layers))


def _qwen2(config: Json, plain: DecoderConfig) -> DecoderConfig:
    plain = replace(plain, biases=_ATTENTION)
    if not config.get("use_sliding_window"):
        return plain
    kinds = config.get("layer_types")
    first = int(config.get("max_window_layers", 28))
    layers = [
        layer
        for layer in range(plain.num_layers)
        if (kinds[layer] == "sliding_attention" if kinds else layer >= first)
    ]
    return _with_window(plain, config.get("sliding_window", 4096), layers)


def _deepseek_v2(config: Json, plain: DecoderConfig) -> DecoderConfig:
    # Where scores would be normalized, DeepSeek's code and transformers' differ.
    _refuse_unless(
        config,
        mlp_bias=(None, False),
        norm_topk_prob=(None, False),
        scoring_func=(None, "softmax"),
        topk_method=(None, "greedy", "group_limited_greedy"),
    )
    is_limited = config.get("topk_method") == "group_limited_greedy"
    groups = (int(config["n_group"]), int(config["topk_group"])) if is_limited else (1, 1)
    return _with_latents(config, plain, True, _moe(config, plain, "softmax", groups))


def _deepseek_v3(config: Json, plain: DecoderConfig) -> DecoderConfig:
    _refuse_unless(
        config,
        scoring_func=(None, "sigmoid"),
        topk_method=(None, "noaux_tc"),
        mlp_bias=(None, False),
    )
    groups = (int(config.get("n_group") or 1), int(config.get("topk_group") or 1))
    moe = _moe(config, plain, "sigmoid", groups)
    return _with_latents(config, plain, bool(config.get("rope_interleave", True)), moe)


FAMILIES: dict[str, Callable[[Json, DecoderConfig], DecoderConfig]] = {
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _mistral,
    "Qwen2ForCausalLM": _qwen2,
    "DeepseekV2ForCausalLM": _deepseek_v2,
    "DeepseekV3ForCausalLM": _deepseek_v3,
}


def _with_window(
    plain: DecoderConfig, window: int | None, layers: range | list[int]
) -> DecoderConfig:
    if window is None:
        return plain
    return replace(plain, sliding_window=int(window), window_layers=frozenset(layers))


def _with_latents(
    config: Json, plain: DecoderConfig, interleaved: bool, moe: MoeConfig | None
) -> DecoderConfig:
    q_rank = config.get("q_lora_rank")
    mla = MlaConfig(
        q_rank=None if q_rank is None else int(q_rank),
        kv_rank=int(config["kv_lora_rank"]),
        nope_dim=int(config["qk_nope_head_dim"]),
        rope_dim=int(config["qk_rope_head_dim"]),
        value_dim=int(config["v_head_dim"]),
    )
    has_biases = bool(config.get("attention_bias"))
    return replace(
        plain,
        head_dim=mla.rope_dim,
        num_kv_heads=plain.num_heads,
        mla=mla,
        moe=moe,
        biases=(*_LATENT, *_OUTPUT) if has_biases else (),
        rope=replace(plain.rope, interleaved=interleaved),
    )


def _moe(
    config: Json, plain: DecoderConfig, scoring: str, groups: tuple[int, int]
) -> MoeConfig | None:
    first = int(config.get("first_k_dense_replace") or 0)
    if not config.get("n_routed_experts") or first >= plain.num_layers:
        return None
    _refuse_unless(config, moe_layer_freq=(None, 1))
    width = int(config["moe_intermediate_size"])
    return MoeConfig(
        num_experts=int(config["n_routed_experts"]),
        top_k=int(config["num_experts_per_tok"]),
        intermediate_size=width,
        shared_size=width * int(config.get("n_shared_experts") or 0),
        first_layer=first,
        scoring=scoring,
        num_groups=groups[0],
        top_groups=groups[1],
        normalize=bool(config.get("norm_topk_prob", scoring == "sigmoid")),
        scale=float(config.get("routed_scaling_factor", 1.0)),
    )


def _rope(config: Json) -> RopeConfig:
    """Rotary parameters, from the nested form of transformers 5 or from the flat older one."""
    nested = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = nested.get("rope_type", nested.get("type", "default"))
    kind = _OLD_ROPE_NAMES.get(kind, kind)
    if kind not in ROPE_KINDS:
        raise UnsupportedModel(f"rope type is {kind!r}; known are {', '.join(ROPE_KINDS)}")
    _refuse_unless(nested, partial_rotary_factor=(1, 1.0))
    theta = float(nested.get("rope_theta") or config.get("rope_theta") or 10_000.0)
    if kind == "default":
        return RopeConfig(theta=theta)
    length = float(config["max_position_embeddings"])
    original = float(
        nested.get("original_max_position_embeddings")
        or config.get("original_max_position_embeddings")
        or length
    )
    factor: Any = nested.get("factor")
    if factor is None:
        if kind not in ("yarn", "longrope"):
            raise CorruptCheckpoint(f"config.json: rope type {kind!r} has no factor")
        factor = length / original
    return RopeConfig(
        kind=kind,
        theta=theta,
        factor=float(factor),
        original_length=int(original),
        short_factor=tuple(map(float, nested.get("short_factor") or ())),
        long_factor=tuple(map(float, nested.get("long_factor") or ())),
        truncate=bool(nested.get("truncate", True)),
        **_given(
            nested,
            "low_freq_factor",
            "high_freq_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "attention_factor",
        ),
    )


def _given(nested: Json, *names: str) -> dict[str, Any]:
    return {name: float(nested[name]) for name in names if nested.get(name) is not None}


def _checked(config: DecoderConfig) -> DecoderConfig:
    """Raises CorruptCheckpoint where sizes contradict each other."""
    rope, moe, half = config.rope, config.moe, config.rotary_dim // 2
    claims = {
        f"num_attention_heads {config.num_heads} is no multiple of num_key_value_heads "
        f"{config.num_kv_heads}": config.num_heads % config.num_kv_heads == 0,
        f"the rotary part of a head, {config.rotary_dim}, is odd": config.rotary_dim % 2 == 0,
        f"rope factor {rope.factor} is below 1": rope.factor >= 1,
        f"longrope needs {half} short_factor and long_factor values": rope.kind != "longrope"
        or len(rope.short_factor) == len(rope.long_factor) == half,
        "experts do not fill their groups, or top_k or topk_group is too large": moe is None
        or (
            moe.num_experts % moe.num_groups == 0
            and moe.top_groups <= moe.num_groups
            and moe.top_k <= moe.num_experts // moe.num_groups * moe.top_groups
        ),
    }
    for complaint, holds in claims.items():
        if not holds:
            raise CorruptCheckpoint(f"config.json: {complaint}")
    return config


def _refuse_unless(config: Json, **allowed: tuple[Any, ...]) -> None:
    """Raise UnsupportedModel where a field that is there has another than an allowed value."""
    for name, values in allowed.items():
        if name in config and config[name] not in values:
            wanted = " or ".join(repr(value) for value in values)
            raise UnsupportedModel(f"{name} is {config[name]!r}; only {wanted} is implemented")
