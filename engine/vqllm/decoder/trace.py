"""How a block shows the inputs of its linears while it runs.

A traced forward pass is a generator: it stops before each group of linears that read the same
input, and goes on with the weights that it finds then. Quantization replaces weights meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Tap:
    """The input that a group of linears is about to read.

    Attributes:
        parts: names within the block, such as `self_attn.q_proj`, in the order of the checkpoint.
        inputs: (..., in).
        rows: which tokens of the batch, flattened over windows and positions, the rows of
            `inputs` belong to, (num_rows,) int64; None means all, in order. Routed experts set it.
        every_token: for routed experts, the inputs (tokens, in) as if every token of the batch
            had been routed here, computed when called: statistics for experts too few tokens
            choose. None elsewhere.
    """

    parts: tuple[str, ...]
    inputs: Tensor
    rows: Tensor | None = None
    every_token: Callable[[], Tensor] | None = None


Trace = Generator[Tap, None, Tensor]


def finish(trace: Trace) -> Tensor:
    """Run a traced forward pass to its end without looking at the inputs."""
    while True:
        try:
            next(trace)
        except StopIteration as stop:
            result: Tensor = stop.value
            return result
