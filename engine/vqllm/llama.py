"""The forward pass of one llama block in plain torch: the reference of every executor.

Calibration uses it phase by phase, the `torch` executor uses it whole. No module classes, no
hidden state: weights and caches come in as arguments. Shapes: b sequences, t tokens, d hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vqllm.checkpoint import Checkpoint
from vqllm.model_config import LlamaConfig


@dataclass
class BlockWeights:
    """Weights of one block: norms (d,), linears (out, in) by name, all float32."""

    input_norm: Tensor
    post_attention_norm: Tensor
    linears: dict[str, Tensor]

    def project(self, part: str, inputs: Tensor) -> Tensor:
        """Inputs (..., in) through the linear called `part`: (..., out)."""
        return F.linear(inputs, self.linears[part])


@dataclass(frozen=True)
class RotaryTable:
    """Cosines and sines of the rotary embedding, each (positions, head_dim / 2)."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def build(cls, config: LlamaConfig, num_positions: int) -> RotaryTable:
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
        angles = torch.outer(
            torch.arange(num_positions, dtype=torch.float64), config.rope_theta**-exponents
        )
        return cls(angles.cos().float(), angles.sin().float())

    def rotate(self, heads: Tensor, start: int = 0) -> Tensor:
        """Rotate (b, heads, t, head_dim) vectors that stand at positions start to start + t.

        Element i is paired with element i + head_dim / 2, as Hugging Face stores the weights.
        """
        stop = start + heads.shape[2]
        cos, sin = self.cos[start:stop], self.sin[start:stop]
        first, second = heads.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


@dataclass
class KvCache:
    """Keys (rotated) and values of one block so far, each (b, kv_heads, t, head_dim) or None."""

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


def load_block(checkpoint: Checkpoint, layer: int) -> BlockWeights:
    """Weights of one block, dequantized where they are quantized."""
    prefix = f"model.layers.{layer}"
    return BlockWeights(
        input_norm=torch.from_numpy(checkpoint.norm(f"{prefix}.input_layernorm.weight")),
        post_attention_norm=torch.from_numpy(
            checkpoint.norm(f"{prefix}.post_attention_layernorm.weight")
        ),
        linears={
            part: torch.from_numpy(checkpoint.dense_linear(f"{prefix}.{part}"))
            for part in checkpoint.config.linear_shapes()
        },
    )


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    return hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + eps) * weight


def attend(
    normed: Tensor,
    weights: BlockWeights,
    config: LlamaConfig,
    rotary: RotaryTable,
    cache: KvCache | None = None,
) -> Tensor:
    """Causal grouped-query attention without the output projection: (b, t, heads * head_dim)."""
    cache = cache or KvCache()
    start = cache.length
    queries = _heads(weights.project("self_attn.q_proj", normed), config.head_dim)
    keys = _heads(weights.project("self_attn.k_proj", normed), config.head_dim)
    values = _heads(weights.project("self_attn.v_proj", normed), config.head_dim)
    keys, values = cache.append(rotary.rotate(keys, start), values)
    num_new, num_all = queries.shape[2], keys.shape[2]
    mask = None
    if start > 0:  # torch's own causal mask aligns the first query with the first key
        mask = torch.ones(num_new, num_all, dtype=torch.bool).tril(num_all - num_new)
    context = F.scaled_dot_product_attention(
        rotary.rotate(queries, start),
        keys,
        values,
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=True,
    )
    return context.transpose(1, 2).flatten(2)


def gate(normed: Tensor, weights: BlockWeights) -> Tensor:
    """The gated activation between the up and the down projection: (b, t, intermediate)."""
    gates = F.silu(weights.project("mlp.gate_proj", normed))
    return gates * weights.project("mlp.up_proj", normed)


def forward_block(
    hidden: Tensor,
    weights: BlockWeights,
    config: LlamaConfig,
    rotary: RotaryTable,
    cache: KvCache | None = None,
) -> Tensor:
    """One whole block, (b, t, d) to (b, t, d); appends to `cache` when one is given."""
    normed = rms_norm(hidden, weights.input_norm, config.rms_norm_eps)
    context = attend(normed, weights, config, rotary, cache)
    hidden = hidden + weights.project("self_attn.o_proj", context)
    normed = rms_norm(hidden, weights.post_attention_norm, config.rms_norm_eps)
    return hidden + weights.project("mlp.down_proj", gate(normed, weights))


def _heads(projected: Tensor, head_dim: int) -> Tensor:
    num_sequences, num_tokens, width = projected.shape
    return projected.view(num_sequences, num_tokens, width // head_dim, head_dim).transpose(1, 2)
