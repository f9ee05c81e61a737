"""Where a model's weights come from, block by block, transformed or not.

A source is what the quantization pipeline walks through and what the reference executor loads: it
never holds a model whole. Knows no quantization method.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vqllm.checkpoint import EMBEDDING, FINAL_NORM, Checkpoint
from vqllm.decoder.block import forward_block
from vqllm.decoder.config import DecoderConfig
from vqllm.decoder.norm import rms_norm
from vqllm.decoder.rope import RotaryTable
from vqllm.decoder.weights import BlockWeights, load_block
from vqllm.errors import CorruptCheckpoint, UnsupportedModel
from vqllm.formats.fp8 import Fp8Format
from vqllm.outlier.transform import HadamardRotation, ModelTransform, rotation

Tensors = dict[str, NDArray[Any]]
FLOATS = ("F16", "BF16", "F32", "F64")


class WeightSource(Protocol):
    """The weights of one decoder."""

    @property
    def config(self) -> DecoderConfig:
        """Shape of the model."""
        ...

    @property
    def transform(self) -> ModelTransform:
        """What a reader of the stored tensors has to compute besides the plain model."""
        ...

    @property
    def config_changes(self) -> dict[str, Any]:
        """Fields of config.json that differ from the folder this came from."""
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
        `TensorFileWriter.put` takes them); changed ones are float32, or float16 where a whole
        table changed that the source keeps in 16 bits.
        """
        ...


class FolderSource:
    """The weights of any folder, dequantized where they are quantized."""

    config_changes: dict[str, Any]

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.config_changes = {}
        seed = checkpoint.transform.residual_seed
        self._residual: HadamardRotation | None = (
            None if seed is None else rotation(checkpoint.config.hidden_size, seed)
        )

    @property
    def config(self) -> DecoderConfig:
        return self.checkpoint.config

    @property
    def transform(self) -> ModelTransform:
        return self.checkpoint.transform

    def embed(self, token_ids: Tensor) -> Tensor:
        """Raises CorruptCheckpoint: the table is missing, misshapen or not finite."""
        hidden = self._look_up(token_ids)
        return hidden if self._residual is None else self._residual.apply(hidden)

    def _look_up(self, token_ids: Tensor) -> Tensor:
        """Rows of the embedding; only they are read where the table lies in the file as floats."""
        store, shape = self.checkpoint.store, (self.config.vocab_size, self.config.hidden_size)
        if "_embedding" in self.__dict__ or EMBEDDING not in store:
            return self._embedding[token_ids]
        if store.shape(EMBEDDING) != shape or store.dtype(EMBEDDING) not in FLOATS:
            raise CorruptCheckpoint(
                f"{store.path_of(EMBEDDING)}: {EMBEDDING} is {store.dtype(EMBEDDING)} "
                f"{store.shape(EMBEDDING)}, config.json implies floats {shape}"
            )
        rows = as_float32(store.raw(EMBEDDING)[token_ids.numpy()])
        if not torch.isfinite(rows).all():
            raise CorruptCheckpoint(f"{store.path_of(EMBEDDING)}: {EMBEDDING} is not finite")
        return rows

    def block(self, layer: int) -> BlockWeights:
        """Raises CorruptCheckpoint: a tensor is missing, misshapen or not finite."""
        weights = load_block(self.checkpoint, layer)
        weights.down_seed = self.transform.down_seed
        return weights

    def logits(self, hidden: Tensor) -> Tensor:
        if self._residual is not None:
            hidden = self._residual.invert(hidden)
        normed = rms_norm(hidden, self.final_norm, self.config.rms_norm_eps)
        return F.linear(normed, self.head)

    def linear_names(self) -> list[str]:
        return self.config.linear_names()

    def other_tensors(self) -> Tensors:
        """What lies in the folder besides the linears; extra prediction layers are left out."""
        store, num_layers = self.checkpoint.store, self.config.num_layers
        linears = set(self.linear_names())
        return {
            name: store.raw(name)
            for name in store.names
            if (name.rpartition(".")[0] not in linears or name.endswith(".bias"))
            and layer_of(name) < num_layers
        }

    @property
    def embedding(self) -> Tensor:
        """Table (vocab, d) as stored, float32."""
        return self._embedding

    @cached_property
    def head(self) -> Tensor:
        """Output projection (vocab, d), float32; the embedding where they are tied."""
        if self.config.tie_word_embeddings:
            return self._embedding
        return torch.from_numpy(self.checkpoint.head())

    @cached_property
    def final_norm(self) -> Tensor:
        """Weight (d,) of the last norm, float32."""
        return torch.from_numpy(self.checkpoint.norm(FINAL_NORM))

    @cached_property
    def _embedding(self) -> Tensor:
        return torch.from_numpy(self.checkpoint.embedding())


class PlainSource(FolderSource):
    """The weights of an original folder as they are, in 8-bit floats at the least."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Raises UnsupportedModel: the folder is quantized already."""
        form = checkpoint.quantization
        if form is not None and not isinstance(form, Fp8Format):
            raise UnsupportedModel(
                f"{checkpoint.folder} is quantized already; quantize the original"
            )
        super().__init__(checkpoint)


def source_logits(source: WeightSource, token_ids: Tensor) -> Tensor:
    """Logits (b, t, vocab) of windows (b, t) that start at position 0, one block in memory."""
    rotary = RotaryTable.build(source.config, token_ids.shape[1])
    with torch.inference_mode():
        hidden = source.embed(token_ids)
        for layer in range(source.config.num_layers):
            hidden = forward_block(hidden, source.block(layer), source.config, rotary)
        return source.logits(hidden)


def layer_of(name: str) -> int:
    """The block that a tensor belongs to by its name; -1 outside the blocks."""
    parts = name.split(".")
    return int(parts[2]) if parts[:2] == ["model", "layers"] else -1


def as_float32(values: NDArray[Any]) -> Tensor:
    """A tensor of a source as float32; uint16 stands for bfloat16."""
    if values.dtype == np.uint16:
        return torch.from_numpy((values.astype(np.uint32) << 16).view(np.float32))
    return torch.from_numpy(np.array(values, dtype=np.float32))
