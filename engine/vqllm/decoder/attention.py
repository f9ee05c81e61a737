"""Causal attention: the part all families share, and the grouped-query form.

Shapes: b sequences, t tokens, d hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vqllm.decoder.config import DecoderConfig
from vqllm.decoder.rope import RotaryTable, softmax_scale
from vqllm.decoder.trace import Tap, Trace
from vqllm.decoder.weights import BlockWeights


@dataclass
class KvCache:
    """What one block keeps of the tokens so far, each (b, heads, t, width) or None.

    Keys (rotated) and values; in latent attention the latents and the rotated shared keys.
    """

    keys: Tensor | None = None
    values: Tensor | None = None

    @property
    def length(self) -> int:
        return 0 if self.keys is None else self.keys.shape[2]

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add new positions; return all of them."""
        if self.keys is not None and self.values is not None:
            keys = torch.cat([self.keys, keys], dim=2)
            values = torch.cat([self.values, values], dim=2)
        self.keys, self.values = keys, values
        return keys, values


def trace_attention(
    normed: Tensor,
    weights: BlockWeights,
    config: DecoderConfig,
    rotary: RotaryTable,
    cache: KvCache,
) -> Trace:
    """Grouped-query attention without the output projection: (b, t, heads * head_dim)."""
    yield Tap(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), normed)
    start = cache.length
    queries = split_heads(weights.project("self_attn.q_proj", normed), config.head_dim)
    keys = split_heads(weights.project("self_attn.k_proj", normed), config.head_dim)
    values = split_heads(weights.project("self_attn.v_proj", normed), config.head_dim)
    keys, values = cache.append(rotary.rotate(keys, start), values)
    return mix(
        rotary.rotate(queries, start),
        keys,
        values,
        softmax_scale(config),
        config.window(weights.layer),
    )


def mix(queries: Tensor, keys: Tensor, values: Tensor, scale: float, window: int | None) -> Tensor:
    """Softmax mixture of the values, heads side by side: (b, t, heads * value width).

    Queries (b, heads, t, n) are the last t of all positions of keys and values. With a window a
    query sees that many positions, its own included.
    """
    num_new, num_all = queries.shape[2], keys.shape[2]
    is_plain = num_new == num_all and (window is None or window >= num_all)
    mask = None if is_plain else _mask(num_new, num_all, window, queries.device)
    context = F.scaled_dot_product_attention(
        queries,
        keys,
        values,
        attn_mask=mask,
        is_causal=is_plain,
        scale=scale,
        enable_gqa=queries.shape[1] != keys.shape[1],
    )
    return context.transpose(1, 2).flatten(2)


def split_heads(projected: Tensor, width: int) -> Tensor:
    """(b, t, heads * width) to (b, heads, t, width)."""
    num_sequences, num_tokens, _ = projected.shape
    return projected.view(num_sequences, num_tokens, -1, width).transpose(1, 2)


def _mask(num_new: int, num_all: int, window: int | None, device: torch.device) -> Tensor:
    """True where a query may look."""
    seen = torch.ones(num_new, num_all, dtype=torch.bool, device=device)
    seen = seen.tril(num_all - num_new)
    return seen if window is None else seen.triu(num_all - num_new - window + 1)
