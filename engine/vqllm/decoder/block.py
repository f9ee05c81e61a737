"""The forward pass of one decoder block, whole or stopping at each linear's input.

No module classes, no hidden state: weights and caches come in as arguments. The reference of every
executor, and what calibration walks through. Shapes: b sequences, t tokens, d hidden.
"""

from __future__ import annotations

from torch import Tensor

from vqllm.decoder.attention import KvCache, WholeTexts, trace_attention
from vqllm.decoder.config import DecoderConfig
from vqllm.decoder.mla import trace_latent_attention
from vqllm.decoder.mlp import trace_mlp
from vqllm.decoder.moe import trace_experts
from vqllm.decoder.norm import rms_norm
from vqllm.decoder.rope import RotaryTable
from vqllm.decoder.trace import Tap, Trace, finish
from vqllm.decoder.weights import BlockWeights


def trace_block(
    hidden: Tensor,
    weights: BlockWeights,
    config: DecoderConfig,
    rotary: RotaryTable,
    cache: KvCache | None = None,
) -> Trace:
    """One block on (b, t, d), returning (b, t, d) and appending to `cache` where one is given.

    Without a cache the tokens are whole texts. The first t positions of `rotary` are the tokens'.
    Yields a `Tap` before each group of `config.linear_groups(layer)`, in that order for every
    batch. Looks weights up in `weights` after each yield; does not change `hidden` in place.
    """
    cache = cache or WholeTexts()
    normed = rms_norm(hidden, weights.input_norm, config.rms_norm_eps)
    attend = trace_attention if config.mla is None else trace_latent_attention
    context = yield from attend(normed, weights, config, rotary, cache)
    del normed
    yield Tap(("self_attn.o_proj",), context)
    hidden = hidden + weights.project("self_attn.o_proj", context)
    del context
    normed = rms_norm(hidden, weights.post_attention_norm, config.rms_norm_eps)
    if config.has_experts(weights.layer):
        return hidden + (yield from trace_experts(normed, weights, config))
    return hidden + (yield from trace_mlp(normed, weights))


def forward_block(
    hidden: Tensor,
    weights: BlockWeights,
    config: DecoderConfig,
    rotary: RotaryTable,
    cache: KvCache | None = None,
) -> Tensor:
    """One whole block, (b, t, d) to (b, t, d); appends to `cache` when one is given."""
    return finish(trace_block(hidden, weights, config, rotary, cache))
