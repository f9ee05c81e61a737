"""The gated MLP, dense or one expert."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from vqllm.decoder.config import mlp_groups
from vqllm.decoder.trace import Tap, Trace
from vqllm.decoder.weights import BlockWeights


def gate(normed: Tensor, weights: BlockWeights, prefix: str = "mlp") -> Tensor:
    """The gated activation between the up and the down projection: (..., intermediate)."""
    gates = F.silu(weights.project(f"{prefix}.gate_proj", normed))
    return gates * weights.project(f"{prefix}.up_proj", normed)


def trace_mlp(
    normed: Tensor,
    weights: BlockWeights,
    prefix: str = "mlp",
    rows: Tensor | None = None,
    every_token: Callable[[], Tensor] | None = None,
) -> Trace:
    """A gated MLP (..., d) to (..., d); `rows` and `every_token` go into its taps (see `Tap`)."""
    first, last = mlp_groups(prefix)
    yield Tap(first, normed, rows, every_token)
    gated = weights.rotate_down(gate(normed, weights, prefix))
    yield Tap(last, gated, rows, _gated(every_token, weights, prefix))
    return weights.project(last[0], gated)


def _gated(
    every_token: Callable[[], Tensor] | None, weights: BlockWeights, prefix: str
) -> Callable[[], Tensor] | None:
    if every_token is None:
        return None
    inputs = every_token
    return lambda: weights.rotate_down(gate(inputs(), weights, prefix))
