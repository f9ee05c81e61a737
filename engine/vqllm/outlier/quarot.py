"""Rotating a model so that weights and activations lose their outliers (QuaRot, SpinQuant).

QuaRot (arXiv 2404.00456) and SpinQuant (arXiv 2405.16406), with RMS norms only, so no mean is
subtracted. All products are float64. What is rotated, row vectors x turning into x R:

- R1, hidden size: the residual stream, after the norm weights went into the next linears. The
  embedding stays as it is, and tied where it was: R1 is applied after the look-up and undone
  before the final norm, whose weight stays.
- R2, value head size: values of every head, undone in the output projection's columns. All heads
  share one, so grouped queries need no care.
- R4, intermediate size: the down projection's input, online.
- Latent attention: its latents (free, they only pass a norm) and the positionless part of every
  query and key head (a product of the two), with the seed of R2. Rotary parts cannot turn.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vqllm.decoder.config import DecoderConfig
from vqllm.decoder.norm import rms_norm
from vqllm.decoder.weights import BlockWeights
from vqllm.errors import UnsupportedModel
from vqllm.outlier.structure import BLOCK_NORMS, LATENT_NORMS, ROUTER, norm_before
from vqllm.outlier.transform import HadamardRotation, ModelTransform, rotation
from vqllm.sources import Tensors, WeightSource, as_float32, layer_of

EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"

_CHUNK_VALUES = 1 << 22


@dataclass(frozen=True)
class QuarotOptions:
    """Which rotations, and from which seed.

    Attributes:
        seed: of R1; R2 takes the next, R4 the one after.
        residual, heads, down: whether R1, R2 and R4 are used.
        portable: bake R1 into the embedding and an untied head and leave R4 out, so that any
            tool can run the folder.

    Raises:
        InvalidConfig: a seed does not fit 64 bits.
    """

    seed: int = 0
    residual: bool = True
    heads: bool = True
    down: bool = True
    portable: bool = False

    @property
    def seeds(self) -> ModelTransform:
        """Every rotation that takes place, online or not."""
        return ModelTransform(
            residual_seed=self.seed if self.residual else None,
            head_seed=self.seed + 1 if self.heads else None,
            down_seed=self.seed + 2 if self.down and not self.portable else None,
        )


@dataclass(frozen=True)
class _Span:
    """Rotation of elements start to stop of every run of `width` features."""

    turn: HadamardRotation
    width: int
    start: int = 0

    def apply(self, rows: Tensor) -> Tensor:
        """Rows (..., features), rotated along the features."""
        stop = self.start + self.turn.size
        runs = rows.reshape(*rows.shape[:-1], -1, self.width).clone()
        runs[..., self.start : stop] = self.turn.apply(runs[..., self.start : stop])
        return runs.reshape(rows.shape)


class BlockRotation:
    """How every tensor of one block changes; products are float64, results float32."""

    def __init__(
        self, config: DecoderConfig, seeds: ModelTransform, norms: dict[str, Tensor]
    ) -> None:
        """`norms` are the weights (n,) of the block's norms by name; they get folded."""
        self._config, self._seeds, self._norms = config, seeds, norms

    def weight(self, part: str, weight: Tensor) -> Tensor:
        """A linear's weight (out, in), or the router's."""
        norm_name = norm_before(part)
        norm = None if norm_name is None else self._norms[norm_name].double()
        turned = torch.empty(weight.shape)
        for rows in _chunks(weight):
            values = weight[rows].double()
            values = values if norm is None else values * norm
            for span in self._input_spans(part, weight.shape[1]):
                values = span.apply(values)
            turned[rows] = values.float()
        spans = tuple(self._output_spans(part))
        for columns in _chunks(turned.T) if spans else ():
            values = turned.T[columns].double()
            for span in spans:
                values = span.apply(values)
            turned.T[columns] = values.float()
        return turned

    def bias(self, part: str, bias: Tensor) -> Tensor:
        """A linear's bias (out,)."""
        values = bias.double()
        for span in self._output_spans(part):
            values = span.apply(values)
        return values.float()

    def other(self, name: str, values: Tensor) -> Tensor:
        """A norm's weight, the router, or a tensor that stays."""
        if name in self._norms:
            return torch.ones_like(values)
        if name == ROUTER:
            return self.weight(ROUTER, values)
        if name.endswith(".bias") and not name.startswith("mlp.gate."):
            return self.bias(name.removesuffix(".bias"), values)
        return values

    def _input_spans(self, part: str, in_features: int) -> Iterable[_Span]:
        if part.endswith("o_proj"):
            return self._spans("head", self._config.value_dim)
        if part.endswith("down_proj"):
            return self._spans("down", in_features)
        is_latent = norm_before(part) in LATENT_NORMS
        return self._spans("head" if is_latent else "residual", in_features)

    def _output_spans(self, part: str) -> Iterable[_Span]:
        config, mla = self._config, self._config.mla
        if part.endswith(("o_proj", "down_proj")):
            return self._spans("residual", config.hidden_size)
        if not part.startswith("self_attn."):
            return ()
        name = part.removeprefix("self_attn.")
        if mla is None:
            return self._spans("head", config.head_dim) if name == "v_proj" else ()
        if name == "q_a_proj":
            return self._spans("head", mla.q_rank or 0)
        if name == "kv_a_proj_with_mqa":
            return self._spans("head", mla.kv_rank, mla.kv_rank + mla.rope_dim)
        if name == "kv_b_proj":
            width = mla.nope_dim + mla.value_dim
            return (
                *self._spans("head", mla.nope_dim, width),
                *self._spans("head", mla.value_dim, width, mla.nope_dim),
            )
        return self._spans("head", mla.nope_dim, mla.query_dim)

    def _spans(self, which: str, size: int, width: int = 0, start: int = 0) -> tuple[_Span, ...]:
        seed = getattr(self._seeds, f"{which}_seed")
        return () if seed is None else (_Span(rotation(size, seed), width or size, start),)


class RotatedSource:
    """Another source's model, rotated; the function it computes stays the same."""

    def __init__(self, source: WeightSource, options: QuarotOptions) -> None:
        """Raises UnsupportedModel: the source is rotated already, or a size has no rotation."""
        if source.transform.to_dict():
            raise UnsupportedModel("the model is rotated already; rotate the original")
        self.source, self.options, self._seeds = source, options, options.seeds
        self._is_baked = options.portable and options.residual
        seed = self._seeds.residual_seed
        hidden_size = source.config.hidden_size
        self._residual = None if seed is None else rotation(hidden_size, seed)

    @property
    def config(self) -> DecoderConfig:
        config = self.source.config
        return replace(config, tie_word_embeddings=False) if self._is_baked else config

    @property
    def transform(self) -> ModelTransform:
        return replace(self._seeds, residual_seed=None) if self._is_baked else self._seeds

    @property
    def config_changes(self) -> dict[str, Any]:
        changes = self.source.config_changes
        return {**changes, "tie_word_embeddings": False} if self._is_baked else changes

    def embed(self, token_ids: Tensor) -> Tensor:
        if self._is_baked:
            return as_float32(self._tables[EMBEDDING][token_ids.numpy()])
        hidden = self.source.embed(token_ids)
        return hidden if self._residual is None else self._residual.apply(hidden)

    def block(self, layer: int) -> BlockWeights:
        """Raises CorruptCheckpoint: a tensor is missing, misshapen or not finite."""
        weights = self.source.block(layer)
        norms = dict(
            zip(BLOCK_NORMS, (weights.input_norm, weights.post_attention_norm), strict=True)
        )
        norms |= {name: weights.inner[name] for name in LATENT_NORMS if name in weights.inner}
        turn = BlockRotation(self.config, self._seeds, norms)
        return replace(
            weights,
            input_norm=torch.ones_like(weights.input_norm),
            post_attention_norm=torch.ones_like(weights.post_attention_norm),
            linears={part: turn.weight(part, w) for part, w in weights.linears.items()},
            biases={part: turn.bias(part, b) for part, b in weights.biases.items()},
            inner={name: turn.other(name, values) for name, values in weights.inner.items()},
            down_seed=self._seeds.down_seed,
        )

    def logits(self, hidden: Tensor) -> Tensor:
        if self._is_baked:
            normed = rms_norm(hidden, torch.ones(()), self.config.rms_norm_eps)
            return F.linear(normed, self._baked_head)
        return self.source.logits(
            hidden if self._residual is None else self._residual.invert(hidden)
        )

    def linear_names(self) -> list[str]:
        return self.source.linear_names()

    def other_tensors(self) -> Tensors:
        tensors = self.source.other_tensors()
        for layer in range(self.config.num_layers):
            tensors |= self._rotated_small(tensors, layer)
        if self._is_baked:
            ones = np.ones(self.config.hidden_size, np.float32)
            tensors |= {**self._tables, FINAL_NORM: ones}
        return tensors

    def _rotated_small(self, tensors: Tensors, layer: int) -> Tensors:
        """The norms, biases and the router of one block."""
        prefix = f"model.layers.{layer}."
        named = {n.removeprefix(prefix): n for n in tensors if layer_of(n) == layer}
        norms = {
            n: as_float32(tensors[named[n]]) for n in (*BLOCK_NORMS, *LATENT_NORMS) if n in named
        }
        turn = BlockRotation(self.config, self._seeds, norms)
        changed = {}
        for name, full in named.items():
            values = as_float32(tensors[full])
            rotated = turn.other(name, values)
            if rotated is not values:
                changed[full] = rotated.numpy()
        return changed

    @cached_property
    def _tables(self) -> Tensors:
        """Embedding and head with R1 in them, the head with the final norm's weight too."""
        stored = self.source.other_tensors()
        gamma = as_float32(stored[FINAL_NORM]).double()
        head = stored.get(HEAD, stored[EMBEDDING])
        return {
            EMBEDDING: self._baked(stored[EMBEDDING], torch.ones_like(gamma)),
            HEAD: self._baked(head, gamma),
        }

    @cached_property
    def _baked_head(self) -> Tensor:
        return as_float32(self._tables[HEAD])

    def _baked(self, table: Any, scale: Tensor) -> Any:
        if self._residual is None:
            raise ValueError("there is no R1 to bake in")
        dtype = np.float16 if table.dtype.itemsize == 2 else np.float32
        baked = np.empty(table.shape, dtype)
        for rows in _chunks(table):
            values = as_float32(table[rows]).double() * scale
            baked[rows] = self._residual.apply(values).numpy()
        return baked


def _chunks(matrix: Any) -> list[slice]:
    """Rows of a matrix, few enough at a time that float64 copies stay small."""
    num_rows = max(1, _CHUNK_VALUES // matrix.shape[1])
    return [slice(start, start + num_rows) for start in range(0, len(matrix), num_rows)]
