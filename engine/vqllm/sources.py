"""Where a model's full-precision weights come from, block by block, transformed or not.

A source is what the quantization pipeline walks through: it never loads a model whole. Knows no
quantization method.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vqllm.checkpoint import FINAL_NORM, Checkpoint
from vqllm.decoder.config import DecoderConfig
from vqllm.decoder.norm import rms_norm
from vqllm.decoder.weights import BlockWeights, load_block
from vqllm.errors import UnsupportedModel
from vqllm.outlier.transform import ModelTransform

Tensors = dict[str, NDArray[Any]]


class WeightSource(Protocol):
    """The weights of one decoder, in full precision."""

    @property
    def config(self) -> DecoderConfig:
        """Shape of the model."""
        ...

    @property
    def transform(self) -> ModelTransform:
        """What a reader of the stored tensors has to compute besides the plain model."""
        ...

    def embed(self, token_ids: Tensor) -> Tensor:
        """First hidden states (..., d) float32 of int64 token ids (...), R1 applied."""
        ...

    def block(self, layer: int) -> BlockWeights:
        """Float32 weights of one block, transformed."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., vocab) float32 of the last hidden states (..., d), final norm included."""
        ...

    def linear_names(self) -> list[str]:
        """Full names of the linears to quantize, in execution order."""
        ...

    def other_tensors(self) -> Tensors:
        """Every other tensor that is stored, by its name in the file.

        Unchanged ones come in the dtype of the source, bfloat16 as uint16 halves (as
        `TensorFileWriter.put` takes them), changed ones as float32.
        """
        ...


class PlainSource:
    """The weights of an unquantized folder as they are."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Raises UnsupportedModel: the folder is quantized already."""
        if checkpoint.quantization is not None:
            raise UnsupportedModel(
                f"{checkpoint.folder} is quantized already; quantize the original"
            )
        self.checkpoint = checkpoint

    @property
    def config(self) -> DecoderConfig:
        return self.checkpoint.config

    @property
    def transform(self) -> ModelTransform:
        return ModelTransform()

    def embed(self, token_ids: Tensor) -> Tensor:
        return self._embedding[token_ids]

    def block(self, layer: int) -> BlockWeights:
        """Raises CorruptCheckpoint: a tensor is missing, misshapen or not finite."""
        return load_block(self.checkpoint, layer)

    def logits(self, hidden: Tensor) -> Tensor:
        normed = rms_norm(hidden, self._final_norm, self.config.rms_norm_eps)
        return F.linear(normed, self._head)

    def linear_names(self) -> list[str]:
        return self.checkpoint.linear_names()

    def other_tensors(self) -> Tensors:
        store = self.checkpoint.store
        linears = {f"{name}.weight" for name in self.linear_names()}
        return {name: store.raw(name) for name in store.names if name not in linears}

    @cached_property
    def _embedding(self) -> Tensor:
        return torch.from_numpy(self.checkpoint.embedding())

    @cached_property
    def _head(self) -> Tensor:
        if self.config.tie_word_embeddings:
            return self._embedding
        return torch.from_numpy(self.checkpoint.head())

    @cached_property
    def _final_norm(self) -> Tensor:
        return torch.from_numpy(self.checkpoint.norm(FINAL_NORM))
