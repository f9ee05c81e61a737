"""One decoder block as the core loop sees it: linears to replace, and a trace through their inputs.

The trace (`vqllm.decoder.trace`) stops before every group of linears that read the same input and
goes on with the weights it finds then, so no architecture appears in the loop.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from vqllm.decoder.block import trace_block
from vqllm.decoder.rope import RotaryTable
from vqllm.decoder.trace import Trace
from vqllm.decoder.weights import BlockWeights
from vqllm.quantization.products import multiply
from vqllm.quantization.spill import SpilledTensors
from vqllm.sources import WeightSource


@dataclass(frozen=True)
class Block:
    """One block of a source for windows that start at position 0."""

    source: WeightSource
    weights: BlockWeights
    rotary: RotaryTable

    @classmethod
    def open(
        cls, source: WeightSource, layer: int, num_tokens: int, spill: Path | None = None
    ) -> Block:
        """Read block `layer` for windows of `num_tokens`; its linears go to `spill` if given."""
        weights = source.block(layer)
        if spill is not None:
            weights = replace(weights, linears=SpilledTensors(spill, weights.linears))
        return cls(
            source, _QuickWeights(**vars(weights)), RotaryTable.build(source.config, num_tokens)
        )

    @property
    def linears(self) -> dict[str, Tensor]:
        """Weights (out, in) by name within the block; the loop replaces them."""
        return self.weights.linears

    def fork(self) -> Block:
        """The same tensors behind a `linears` of its own."""
        mine = self.linears
        linears = mine.fork() if isinstance(mine, SpilledTensors) else dict(mine)
        return replace(self, weights=replace(self.weights, linears=linears))

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """Linears by shared input, in the order of the trace."""
        return self.source.config.linear_groups(self.weights.layer)

    def trace(self, hidden: Tensor) -> Trace:
        """Run on (b, t, d), returning (b, t, d); yields a Tap before each group is used."""
        return trace_block(hidden, self.weights, self.source.config, self.rotary)


@dataclass
class _QuickWeights(BlockWeights):
    def project(self, part: str, inputs: Tensor) -> Tensor:
        """As BlockWeights does, by the faster product."""
        outputs = multiply(inputs, self.linears[part])
        return outputs + self.biases[part] if part in self.biases else outputs


def part_name(layer: int, part: str) -> str:
    """Full name of a linear of a block."""
    return f"model.layers.{layer}.{part}"
