"""Routed experts with shared ones beside them, as in DeepSeek-V2 and V3.

V2 (arXiv 2405.04434): softmax scores, the best groups by their best expert. V3 (arXiv 2412.19437,
section 2.1.2): sigmoid scores, a bias that takes part in the choice only, groups by the sum of
their two best.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vqllm.decoder.config import DecoderConfig, MoeConfig
from vqllm.decoder.mlp import trace_mlp
from vqllm.decoder.trace import Trace
from vqllm.decoder.weights import BlockWeights

_TINY = 1e-20  # of the sum that normalizes sigmoid scores


def trace_experts(normed: Tensor, weights: BlockWeights, config: DecoderConfig) -> Trace:
    """All experts of a block, (b, t, d) to (b, t, d): shared ones first, then each routed one.

    Experts without tokens are traced too, with no rows, so that every batch has the same taps.
    """
    moe, tokens = _moe(config), normed.flatten(0, -2)
    chosen, shares = route(tokens, weights, moe)
    output = torch.zeros_like(tokens)
    if moe.shared_size:
        output += yield from trace_mlp(tokens, weights, "mlp.shared_experts")
    for expert in range(moe.num_experts):
        rows, ranks = (chosen == expert).nonzero(as_tuple=True)
        result = yield from trace_mlp(
            tokens[rows], weights, f"mlp.experts.{expert}", rows, lambda: tokens
        )
        output.index_add_(0, rows, result * shares[rows, ranks, None])
    return output.view_as(normed)


def route(tokens: Tensor, weights: BlockWeights, moe: MoeConfig) -> tuple[Tensor, Tensor]:
    """Chosen experts (tokens, top_k) int64 and the factors of their outputs, same shape."""
    logits = F.linear(tokens.float(), weights.inner["mlp.gate.weight"].float())
    if moe.scoring == "sigmoid":
        scores = logits.sigmoid()
        ranking = scores + weights.inner["mlp.gate.e_score_correction_bias"].float()
    else:
        scores = ranking = logits.softmax(-1)
    chosen = _open_groups(ranking, moe).topk(moe.top_k, dim=-1).indices
    shares = scores.gather(1, chosen)
    if moe.normalize:
        shares = shares / (shares.sum(-1, keepdim=True) + _TINY)
    return chosen, (shares * moe.scale).to(tokens.dtype)


def _open_groups(ranking: Tensor, moe: MoeConfig) -> Tensor:
    """The ranking with minus infinity in the groups that are closed for a token."""
    if moe.top_groups >= moe.num_groups:
        return ranking
    grouped = ranking.view(len(ranking), moe.num_groups, -1)
    best = grouped.topk(2 if moe.scoring == "sigmoid" else 1, dim=-1).values.sum(-1)
    closed = torch.ones_like(best, dtype=torch.bool)
    closed.scatter_(1, best.topk(moe.top_groups, dim=-1).indices, False)
    return grouped.masked_fill(closed[..., None], -torch.inf).flatten(-2)


def _moe(config: DecoderConfig) -> MoeConfig:
    if config.moe is None:
        raise ValueError(f"{config.architecture} has no experts")
    return config.moe
