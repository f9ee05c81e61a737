"""Rotary position embedding with every scaling the supported families use.

Frequencies are those of transformers' `modeling_rope_utils`, computed in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vqllm.decoder.config import DecoderConfig, RopeConfig


@dataclass(frozen=True)
class RotaryTable:
    """Cosines and sines of the rotary embedding, each (positions, rotary elements / 2).

    Or (b, 1, positions, rotary elements / 2), where every sequence has positions of its own.

    Attributes:
        interleaved: whether elements 2 i and 2 i + 1 of a vector are a pair; rotated vectors come
            out with first elements before second ones either way, for queries and keys alike.
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool = False

    @classmethod
    def build(
        cls, config: DecoderConfig, num_positions: int, device: torch.device | str = "cpu"
    ) -> RotaryTable:
        """The table for positions 0 to `num_positions`.

        `dynamic` and `longrope` depend on the length of the text; here that is `num_positions`,
        once and for all, so that cached keys stay valid (transformers recomputes as text grows).
        """
        rope = config.rope
        frequencies = _frequencies(rope, config, num_positions)
        positions = torch.arange(num_positions, dtype=torch.float64)
        angles = torch.outer(positions, frequencies)
        scale = _magnitude(rope)
        cos, sin = (angles.cos() * scale).float(), (angles.sin() * scale).float()
        return cls(cos.to(device), sin.to(device), rope.interleaved)

    def at(self, positions: Tensor) -> RotaryTable:
        """The table whose i-th position is, for each sequence, positions[:, i] (b, t) of this."""
        return RotaryTable(
            self.cos[positions][:, None], self.sin[positions][:, None], self.interleaved
        )

    def rotate(self, heads: Tensor, start: int = 0) -> Tensor:
        """Rotate (b, heads, t, n) vectors that stand at positions start to start + t."""
        here = slice(start, start + heads.shape[2])
        cos = self.cos[..., here, :].to(heads.dtype)
        sin = self.sin[..., here, :].to(heads.dtype)
        if self.interleaved:
            first, second = heads[..., 0::2], heads[..., 1::2]
        else:
            first, second = heads.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def softmax_scale(config: DecoderConfig) -> float:
    """Factor of the attention scores; yarn's `mscale_all_dim` raises it in latent attention."""
    if config.mla is None:
        return 1 / math.sqrt(config.head_dim)
    rope, scale = config.rope, 1 / math.sqrt(config.mla.query_dim)
    if rope.kind == "default" or not rope.mscale_all_dim:
        return scale
    return scale * _yarn_magnitude(rope.factor, rope.mscale_all_dim) ** 2


def _frequencies(rope: RopeConfig, config: DecoderConfig, num_positions: int) -> Tensor:
    """Radians per position, (rotary elements / 2,) float64."""
    dim = config.rotary_dim
    exponents = torch.arange(0, dim, 2, dtype=torch.float64) / dim
    if rope.kind == "dynamic":
        theta = _dynamic_theta(rope, dim, config.context_length, num_positions)
        return torch.pow(theta, -exponents)
    plain = torch.pow(rope.theta, -exponents)
    if rope.kind == "linear":
        return plain / rope.factor
    if rope.kind == "llama3":
        return _llama3(rope, plain)
    if rope.kind == "yarn":
        return _yarn(rope, plain, dim)
    if rope.kind == "longrope":
        is_long = num_positions > rope.original_length
        return plain / torch.tensor(
            rope.long_factor if is_long else rope.short_factor, dtype=torch.float64
        )
    return plain


def _dynamic_theta(rope: RopeConfig, dim: int, context_length: int, num_positions: int) -> float:
    """NTK-aware base for texts longer than the model's context."""
    stretch = max(num_positions, context_length) / context_length
    base: float = rope.theta * (rope.factor * stretch - (rope.factor - 1)) ** (dim / (dim - 2))
    return base


def _llama3(rope: RopeConfig, plain: Tensor) -> Tensor:
    """Long waves are stretched by `factor`, short ones kept, those between are blended."""
    turns = rope.original_length * plain / (2 * math.pi)
    band = rope.high_freq_factor - rope.low_freq_factor
    keep = ((turns - rope.low_freq_factor) / band).clamp(0, 1)
    return plain * keep + plain / rope.factor * (1 - keep)


def _yarn(rope: RopeConfig, plain: Tensor, dim: int) -> Tensor:
    """YaRN (arXiv 2309.00071, section 3.2): blend along the dimensions between two bounds."""
    low = _yarn_dimension(rope, dim, rope.beta_fast)
    high = _yarn_dimension(rope, dim, rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low if high != low else 0.001
    stretch = ((torch.arange(dim // 2, dtype=torch.float64) - low) / width).clamp(0, 1)
    return plain / rope.factor * stretch + plain * (1 - stretch)


def _yarn_dimension(rope: RopeConfig, dim: int, num_turns: float) -> float:
    """The dimension whose wave turns `num_turns` times over the original length."""
    turns = rope.original_length / (num_turns * 2 * math.pi)
    return dim * math.log(turns) / (2 * math.log(rope.theta))


def _magnitude(rope: RopeConfig) -> float:
    """Factor of cosines and sines."""
    if rope.kind not in ("yarn", "longrope"):
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.kind == "longrope":
        return math.sqrt(1 + math.log(max(rope.factor, 1.0)) / math.log(rope.original_length))
    if rope.mscale and rope.mscale_all_dim:
        below = _yarn_magnitude(rope.factor, rope.mscale_all_dim)
        return _yarn_magnitude(rope.factor, rope.mscale) / below
    return _yarn_magnitude(rope.factor, 1.0)


def _yarn_magnitude(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
