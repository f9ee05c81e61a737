"""The weights of one block in memory, and how they come out of a model folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vqllm.decoder.config import DecoderConfig
from vqllm.outlier.transform import rotation
from vqllm.tensor_store import TensorStore


@dataclass
class BlockWeights:
    """Weights of one block, float32; a caller may cast the linears.

    Attributes:
        input_norm, post_attention_norm: (d,).
        linears: (out, in) by name within the block, such as `self_attn.q_proj`.
        biases: (out,) of the linears that have one.
        inner: the rest by name: norms of latents, router.
        layer: which block it is; decides window and experts.
        down_seed: rotation R4 of every down projection's input; None is none.
    """

    input_norm: Tensor
    post_attention_norm: Tensor
    linears: dict[str, Tensor]
    biases: dict[str, Tensor] = field(default_factory=dict, kw_only=True)
    inner: dict[str, Tensor] = field(default_factory=dict, kw_only=True)
    layer: int = field(default=0, kw_only=True)
    down_seed: int | None = field(default=None, kw_only=True)

    def project(self, part: str, inputs: Tensor) -> Tensor:
        """Inputs (..., in) through the linear called `part`, bias included: (..., out)."""
        return product(inputs, self.linears[part], self.biases.get(part))

    def rotate_down(self, gated: Tensor) -> Tensor:
        """What the down projection reads, from the gated activation (..., intermediate)."""
        if self.down_seed is None:
            return gated
        return rotation(gated.shape[-1], self.down_seed).apply(gated)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> None:
        """Move every tensor to a device, and cast the linears' weights, in place."""
        self.input_norm = self.input_norm.to(device)
        self.post_attention_norm = self.post_attention_norm.to(device)
        self.linears = {part: w.to(device, dtype) for part, w in self.linears.items()}
        self.biases = {part: b.to(device) for part, b in self.biases.items()}
        self.inner = {name: values.to(device) for name, values in self.inner.items()}


class TensorReader(Protocol):
    """What loading needs of a model folder; `Checkpoint` is one."""

    @property
    def config(self) -> DecoderConfig:
        """Shape of the model."""
        ...

    @property
    def store(self) -> TensorStore:
        """The tensors as they lie in the folder."""
        ...

    def dense(self, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """A float tensor of a known shape."""
        ...

    def dense_linear(self, name: str) -> NDArray[np.float32]:
        """A linear as weights (out, in), dequantized if need be."""
        ...


def product(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """inputs (..., in) times weight (out, in)', in the weight's dtype, back in the inputs'."""
    if weight.dtype == inputs.dtype:
        return F.linear(inputs, weight, bias)
    outputs = F.linear(inputs.to(weight.dtype), weight).to(inputs.dtype)
    return outputs if bias is None else outputs + bias


def load_block(reader: TensorReader, layer: int) -> BlockWeights:
    """Weights of one block, dequantized where they are quantized.

    A bias that the file has is used whether or not the architecture usually has one.

    Raises:
        CorruptCheckpoint: a tensor is missing, misshapen or not finite.
    """
    config, prefix = reader.config, f"model.layers.{layer}"
    linears = {
        part: torch.from_numpy(reader.dense_linear(f"{prefix}.{part}"))
        for part in config.linear_shapes(layer)
    }
    return block_around(reader, layer, linears)


def block_around(reader: TensorReader, layer: int, linears: dict[str, Tensor]) -> BlockWeights:
    """A block of the given linears with everything else from the folder.

    Raises:
        CorruptCheckpoint: a tensor is missing, misshapen or not finite.
    """
    config, prefix = reader.config, f"model.layers.{layer}"

    def read(name: str, shape: tuple[int, ...]) -> Tensor:
        return torch.from_numpy(reader.dense(f"{prefix}.{name}", shape))

    return BlockWeights(
        input_norm=read("input_layernorm.weight", (config.hidden_size,)),
        post_attention_norm=read("post_attention_layernorm.weight", (config.hidden_size,)),
        linears=linears,
        biases={
            part: read(f"{part}.bias", (rows,))
            for part, (rows, _) in config.linear_shapes(layer).items()
            if part in config.biases or f"{prefix}.{part}.bias" in reader.store
        },
        inner={name: read(name, shape) for name, shape in config.inner_shapes(layer).items()},
        layer=layer,
    )
