"""The names that the decoder had when it knew llama only; use `vqllm.decoder` in new code."""

from __future__ import annotations

from torch import Tensor

from vqllm.decoder.attention import KvCache, trace_attention
from vqllm.decoder.block import forward_block
from vqllm.decoder.config import DecoderConfig
from vqllm.decoder.mlp import gate
from vqllm.decoder.norm import rms_norm
from vqllm.decoder.rope import RotaryTable
from vqllm.decoder.trace import finish
from vqllm.decoder.weights import BlockWeights, load_block

__all__ = [
    "BlockWeights",
    "KvCache",
    "RotaryTable",
    "attend",
    "forward_block",
    "gate",
    "load_block",
    "rms_norm",
]


def attend(
    normed: Tensor,
    weights: BlockWeights,
    config: DecoderConfig,
    rotary: RotaryTable,
    cache: KvCache | None = None,
) -> Tensor:
    """Causal grouped-query attention without the output projection: (b, t, heads * head_dim)."""
    return finish(trace_attention(normed, weights, config, rotary, cache or KvCache()))
