"""Multi-head latent attention of DeepSeek-V2 and V3 (arXiv 2405.04434, section 2.1).

Keys and values of all heads grow out of one small latent; a rotary key part is shared by all
heads. The cache keeps latent and rotary key only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vqllm.decoder.attention import KvCache, split_heads
from vqllm.decoder.config import DecoderConfig, MlaConfig
from vqllm.decoder.norm import rms_norm
from vqllm.decoder.rope import RotaryTable, softmax_scale
from vqllm.decoder.trace import Tap, Trace
from vqllm.decoder.weights import BlockWeights

LATENT_EPS = 1e-6  # of both latent norms, in both versions, whatever rms_norm_eps says


def trace_latent_attention(
    normed: Tensor,
    weights: BlockWeights,
    config: DecoderConfig,
    rotary: RotaryTable,
    cache: KvCache,
) -> Trace:
    """Latent attention without the output projection: (b, t, heads * value_dim).

    The first t positions of `rotary` are those of the new tokens.
    """
    mla = _mla(config)
    first = "self_attn.q_proj" if mla.q_rank is None else "self_attn.q_a_proj"
    yield Tap((first, "self_attn.kv_a_proj_with_mqa"), normed)
    queries = yield from _trace_queries(normed, weights, mla)
    compressed = weights.project("self_attn.kv_a_proj_with_mqa", normed)
    latent, rotary_key = compressed[..., : mla.kv_rank], compressed[..., mla.kv_rank :]
    norm = weights.inner["self_attn.kv_a_layernorm.weight"]
    latent = rms_norm(latent, norm, LATENT_EPS)
    yield Tap(("self_attn.kv_b_proj",), latent)
    kept = cache.append(latent[:, None], rotary.rotate(rotary_key[:, None]))
    # A cache may keep fewer bits; what grows out of the latents is computed in those of the input.
    latents, rotary_keys = (part.to(normed.dtype) for part in kept)
    grown = split_heads(
        weights.project("self_attn.kv_b_proj", latents[:, 0]), mla.nope_dim + mla.value_dim
    )
    keys, values = grown[..., : mla.nope_dim], grown[..., mla.nope_dim :]
    keys = torch.cat([keys, rotary_keys.expand(-1, keys.shape[1], -1, -1)], dim=-1)
    plain, turning = queries[..., : mla.nope_dim], queries[..., mla.nope_dim :]
    queries = torch.cat([plain, rotary.rotate(turning)], dim=-1)
    return cache.mix(queries, keys, values, softmax_scale(config), None)


def _trace_queries(normed: Tensor, weights: BlockWeights, mla: MlaConfig) -> Trace:
    """Queries (b, heads, t, nope_dim + rope_dim), not rotated yet."""
    if mla.q_rank is None:
        return split_heads(weights.project("self_attn.q_proj", normed), mla.query_dim)
    latent = weights.project("self_attn.q_a_proj", normed)
    latent = rms_norm(latent, weights.inner["self_attn.q_a_layernorm.weight"], LATENT_EPS)
    yield Tap(("self_attn.q_b_proj",), latent)
    return split_heads(weights.project("self_attn.q_b_proj", latent), mla.query_dim)


def _mla(config: DecoderConfig) -> MlaConfig:
    if config.mla is None:
        raise ValueError(f"{config.architecture} has no latent attention")
    return config.mla
