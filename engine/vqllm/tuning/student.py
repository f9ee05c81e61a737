"""A quantized model that takes gradients for its scales, codebooks and norms.

The blocks are those of the reference decoder; only the products with quantized linears are
replaced. Knows no optimizer and no file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vqllm.checkpoint import FINAL_NORM
from vqllm.decoder.block import forward_block
from vqllm.decoder.rope import RotaryTable
from vqllm.decoder.weights import BlockWeights
from vqllm.errors import UnsupportedModel
from vqllm.output_head import OutputHead
from vqllm.quantization.base import QuantizedLinear
from vqllm.quantization.memory import trim_heap
from vqllm.quantization.workers import Workers
from vqllm.sources import WeightSource
from vqllm.tuning.linears import Tunable, TunableLinear

BLOCK_NORMS = ("input_layernorm", "post_attention_layernorm")

Linears = Mapping[str, QuantizedLinear]


@dataclass
class StudentBlock(BlockWeights):
    """A block whose quantized linears project with gradients for their parameters.

    Attributes:
        tunable: by name within the block.
    """

    tunable: dict[str, TunableLinear] = field(default_factory=dict, kw_only=True)

    def project(self, part: str, inputs: Tensor) -> Tensor:
        """Inputs (..., in) through the linear called `part`, bias included: (..., out)."""
        linear = self.tunable.get(part)
        if linear is None:
            return super().project(part, inputs)
        outputs = linear.project(inputs)
        bias = self.biases.get(part)
        return outputs if bias is None else outputs + bias


class Student:
    """The model of `source` with the linears of `linears` in place of its own."""

    def __init__(
        self,
        source: WeightSource,
        linears: Linears,
        head: OutputHead,
        recompute: bool,
        workers: Workers | None = None,
    ) -> None:
        """`recompute` keeps what enters a block only and computes the rest again going back.

        The student lies on the device of `head` and multiplies in the dtype of its table.

        Raises:
            UnsupportedModel: a linear is of a kind that tuning does not know.
        """
        self._source, self._head, self._recompute = source, head, recompute
        self._workers = workers or Workers()
        self._device, self._dtype = head.table.device, head.table.dtype
        self.norms: dict[str, Tunable] = {FINAL_NORM: Tunable(head.norm.cpu().numpy())}
        self.norms[FINAL_NORM].to(self._device)
        self.linears: dict[str, TunableLinear] = {}
        self._blocks = [self._block(layer, linears) for layer in range(source.config.num_layers)]

    def _block(self, layer: int, linears: Linears) -> StudentBlock:
        prefix = f"model.layers.{layer}"
        with torch.no_grad():
            weights = self._source.block(layer)
            tunable = {
                part: TunableLinear(linears[f"{prefix}.{part}"], self._dtype)
                for part in self._source.config.linear_shapes(layer)
                if f"{prefix}.{part}" in linears
            }
            kept = {part: w for part, w in weights.linears.items() if part not in tunable}
            block = StudentBlock(**{**vars(weights), "linears": kept}, tunable=tunable)
            block.to(self._device, self._dtype)
        for part, linear in tunable.items():
            linear.to(self._device)
            self.linears[f"{prefix}.{part}"] = linear
        for name in BLOCK_NORMS:
            norm = Tunable(_norm(block, name).cpu().numpy())
            norm.to(self._device)
            self.norms[f"{prefix}.{name}.weight"] = norm
        trim_heap()  # codes were unpacked into several times their size
        return block

    @property
    def tunables(self) -> list[Tunable]:
        """Everything that takes gradients."""
        inner = [t for linear in self.linears.values() for t in linear.tunables]
        return [*self.norms.values(), *inner]

    @property
    def final_norm(self) -> Tensor:
        """Weight (d,) of the final norm now, with gradients."""
        return self.norms[FINAL_NORM].value

    def hidden(self, token_ids: Tensor) -> Tensor:
        """Last hidden states (b, t, d) float32 of tokens (b, t), before the final norm."""
        config = self._source.config
        rotary = RotaryTable.build(config, token_ids.shape[1], self._device)
        hidden = self._source.embed(token_ids).to(self._device)
        for layer in range(len(self._blocks)):
            block = self._with_norms(layer)
            if self._recompute and torch.is_grad_enabled():
                hidden = checkpoint(
                    forward_block,
                    hidden,
                    block,
                    config,
                    rotary,
                    use_reentrant=False,
                    preserve_rng_state=False,  # there is nothing random in a block
                )
            else:
                hidden = forward_block(hidden, block, config, rotary)
        return hidden

    def _with_norms(self, layer: int) -> StudentBlock:
        """The block with its norms as they are now; each call has gradients of its own."""
        prefix = f"model.layers.{layer}"
        first, second = (self.norms[f"{prefix}.{name}.weight"].value for name in BLOCK_NORMS)
        return replace(self._blocks[layer], input_norm=first, post_attention_norm=second)

    @property
    def leaves(self) -> list[Tensor]:
        """What gradients are taken by, between `begin` and `finish`."""
        cores = [m for linear in self.linears.values() for m in linear.matrices]
        return [*(tunable.change for tunable in self.tunables), *cores]

    def begin(self) -> None:
        """Start a step: bring the linears up to date with their parameters."""
        with torch.no_grad():
            self._workers.run(TunableLinear.begin, self.linears.values())

    def finish(self) -> None:
        """Gather the gradients of a step at the parameters."""
        with torch.no_grad():
            self._workers.run(TunableLinear.finish, self.linears.values())

    def tuned_linears(self) -> dict[str, QuantizedLinear]:
        """Every linear with its parameters as they are now, in the stored precision."""
        return {name: linear.tuned() for name, linear in self.linears.items()}

    def tuned_norms(self) -> dict[str, NDArray[np.float32]]:
        """Every norm's weight (d,) as it is now, by its name in the file."""
        return {name: norm.numpy() for name, norm in self.norms.items()}


def check_tunable(linears: Iterable[str], source: WeightSource) -> None:
    """Raises UnsupportedModel: a quantized linear is none of the model's."""
    unknown = sorted(set(linears) - set(source.linear_names()))
    if unknown:
        raise UnsupportedModel(f"{unknown[0]} is no linear of this model")


def _norm(block: BlockWeights, name: str) -> Tensor:
    return block.input_norm if name == BLOCK_NORMS[0] else block.post_attention_norm
