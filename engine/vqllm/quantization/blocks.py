"""One decoder block as the core loop sees it: linears to replace, and a trace through their inputs.

The trace (`vqllm.decoder.trace`) stops before every group of linears that read the same input and
goes on with the weights it finds then, so no architecture appears in the loop.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from vqllm.decoder.block import trace_block
from vqllm.decoder.rope import RotaryTable
from vqllm.decoder.trace import Trace
from vqllm.decoder.weights import BlockWeights
from vqllm.sources import WeightSource


@dataclass(frozen=True)
class Block:
    """One block of a source for windows that start at position 0."""

    source: WeightSource
    weights: BlockWeights
    rotary: RotaryTable

    @classmethod
    def open(cls, source: WeightSource, layer: int, num_tokens: int) -> Block:
        """Read block `layer` for windows of `num_tokens`."""
        return cls(source, source.block(layer), RotaryTable.build(source.config, num_tokens))

    @property
    def linears(self) -> dict[str, Tensor]:
        """Weights (out, in) by name within the block; the loop replaces them."""
        return self.weights.linears

    def fork(self) -> Block:
        """The same tensors behind a `linears` of its own."""
        return replace(self, weights=replace(self.weights, linears=dict(self.linears)))

    def trace(self, hidden: Tensor) -> Trace:
        """Run on (b, t, d), returning (b, t, d); yields a Tap before each group is used."""
        return trace_block(hidden, self.weights, self.source.config, self.rotary)


def part_name(layer: int, part: str) -> str:
    """Full name of a linear of a block."""
    return f"model.layers.{layer}.{part}"
