"""Causal attention: the part all families share, and the grouped-query form.

Shapes: b sequences, t new tokens of each, d hidden, T positions that attention may see.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from vqllm.decoder.config import DecoderConfig
from vqllm.decoder.rope import RotaryTable, softmax_scale
from vqllm.decoder.trace import Tap, Trace
from vqllm.decoder.weights import BlockWeights


class KvCache(Protocol):
    """What one block's attention keeps of earlier tokens, and how new ones look at it.

    Keys and values are (b, heads, positions, width); keys are rotated. In latent attention the
    latents stand for keys and the rotated shared keys for values.
    """

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add the new tokens' (b, heads, t, width); return (b, heads, T, width) to look at."""
        ...

    def mix(
        self, queries: Tensor, keys: Tensor, values: Tensor, scale: float, window: int | None
    ) -> Tensor:
        """Softmax mixture of T values for each query (b, heads, t, n): (b, t, heads * width).

        A query sees its own position and earlier ones of its sequence, at most `window` in all.
        """
        ...


class WholeTexts:
    """The cache of tokens that are whole texts: nothing came before, and nothing is kept."""

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return keys, values

    def mix(
        self, queries: Tensor, keys: Tensor, values: Tensor, scale: float, window: int | None
    ) -> Tensor:
        num_tokens = keys.shape[2]
        if window is None or window >= num_tokens:
            return mix(queries, keys, values, scale, None)
        return mix(queries, keys, values, scale, _band(num_tokens, window, queries.device))


def trace_attention(
    normed: Tensor,
    weights: BlockWeights,
    config: DecoderConfig,
    rotary: RotaryTable,
    cache: KvCache,
) -> Trace:
    """Grouped-query attention without the output projection: (b, t, heads * head_dim).

    The first t positions of `rotary` are those of the new tokens.
    """
    yield Tap(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), normed)
    queries = split_heads(weights.project("self_attn.q_proj", normed), config.head_dim)
    keys = split_heads(weights.project("self_attn.k_proj", normed), config.head_dim)
    values = split_heads(weights.project("self_attn.v_proj", normed), config.head_dim)
    keys, values = cache.append(rotary.rotate(keys), values)
    queries = rotary.rotate(queries)
    return cache.mix(queries, keys, values, softmax_scale(config), config.window(weights.layer))


def mix(queries: Tensor, keys: Tensor, values: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """Softmax mixture of the values, heads side by side: (b, t, heads * value width).

    `mask` (t, T) is True where a query (b, heads, t, n) may look. None stands for whole texts,
    t = T, causally; or for one new token, t = 1, that sees all T.
    """
    context = F.scaled_dot_product_attention(
        queries,
        keys,
        values,
        attn_mask=mask,
        is_causal=mask is None and queries.shape[2] == keys.shape[2],
        scale=scale,
        enable_gqa=queries.shape[1] != keys.shape[1],
    )
    return context.transpose(1, 2).flatten(2)


def split_heads(projected: Tensor, width: int) -> Tensor:
    """(b, t, heads * width) to (b, heads, t, width)."""
    num_sequences, num_tokens, _ = projected.shape
    return projected.view(num_sequences, num_tokens, -1, width).transpose(1, 2)


def _band(num_tokens: int, window: int, device: torch.device) -> Tensor:
    """True where a query of a whole text may look: (t, t)."""
    return (
        torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=device).tril().triu(1 - window)
    )
