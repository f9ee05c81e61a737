"""Seeded orthogonal rotations, and the record of which of them a model has been through.

A rotation is never stored: its seed and its size rebuild it. Knows no weights and no model.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vqllm.errors import CorruptCheckpoint, InvalidConfig
from vqllm.outlier.hadamard import hadamard_matrix, hadamard_size

_MAX_SEED = 2**64 - 1
_RADIX_BITS = 7


@dataclass(frozen=True, eq=False)
class HadamardRotation:
    """R = diag(signs) (I_blocks kron H_order kron H_2^power) / sqrt(order * 2^power).

    Index i of a vector is (block * order + a) * 2^power + b; a row vector x turns into x R.
    H_2^power is Sylvester's matrix, H_order is `hadamard_matrix(order)` (not always symmetric).

    Attributes:
        signs: int8 (n,), +-1.
        blocks: transforms side by side; 1 wherever the whole size has a Hadamard matrix.
    """

    order: int
    power: int
    signs: NDArray[np.int8]
    blocks: int = 1

    @property
    def size(self) -> int:
        return len(self.signs)

    def apply(self, rows: Tensor) -> Tensor:
        """rows R for rows of shape (..., n), in their floating dtype and device."""
        return self._transform(rows * self._signs(rows), inverse=False)

    def invert(self, rows: Tensor) -> Tensor:
        """rows R', the inverse of `apply`."""
        return self._transform(rows, inverse=True) * self._signs(rows)

    def matrix(self) -> Tensor:
        """R itself, float64 (n, n); for tests and small sizes."""
        return self.apply(torch.eye(self.size, dtype=torch.float64))

    def _signs(self, like: Tensor) -> Tensor:
        return torch.from_numpy(self.signs).to(like)

    def _transform(self, rows: Tensor, inverse: bool) -> Tensor:
        mixed = _walsh(rows.reshape(-1, 1 << self.power), self.power)
        if self.order > 1:
            base = torch.from_numpy(hadamard_matrix(self.order)).to(rows)
            mixed = torch.matmul(
                base if inverse else base.T, mixed.reshape(-1, self.order, 1 << self.power)
            )
        scale: float = (self.order * 2.0**self.power) ** -0.5
        return mixed.reshape(rows.shape) * scale


@cache
def rotation(n: int, seed: int) -> HadamardRotation:
    """The rotation of size n that `seed` stands for, the same on every machine.

    Sign i is -1 where bit i (least significant first) of SHAKE-256 over the seed's 8 little-endian
    bytes is set.

    Raises:
        InvalidConfig: the seed does not fit 64 bits.
        UnsupportedModel: n is odd.
    """
    if not 0 <= seed <= _MAX_SEED:
        raise InvalidConfig("seed", seed, f"0 to {_MAX_SEED}")
    size = hadamard_size(n)
    digest = hashlib.shake_256(seed.to_bytes(8, "little")).digest((n + 7) // 8)
    bits = np.unpackbits(np.frombuffer(digest, np.uint8), bitorder="little")[:n]
    signs = np.where(bits, -1, 1).astype(np.int8)
    return HadamardRotation(size.order, size.power, signs, size.blocks)


@dataclass(frozen=True)
class ModelTransform:
    """What a reader must undo online, and what was done offline; None is "not done".

    Attributes:
        residual_seed: R1 of the hidden size. The embedding is stored unrotated: R1 right after
            the look-up, R1' before the final norm.
        head_seed: R2 of a value head, in the weights already; recorded only.
        down_seed: R4 of the intermediate size: every down projection's input is rotated online.

    Raises:
        InvalidConfig: a seed does not fit 64 bits.
    """

    residual_seed: int | None = None
    head_seed: int | None = None
    down_seed: int | None = None

    def __post_init__(self) -> None:
        for name, seed in asdict(self).items():
            if seed is not None and not 0 <= seed <= _MAX_SEED:
                raise InvalidConfig(name, seed, f"0 to {_MAX_SEED}")

    @property
    def is_online(self) -> bool:
        """Whether a reader has anything to compute that the plain model has not."""
        return self.residual_seed is not None or self.down_seed is not None

    def to_dict(self) -> dict[str, Any]:
        """Only what was done, fit for JSON; empty for the identity."""
        return {name: seed for name, seed in asdict(self).items() if seed is not None}

    @classmethod
    def from_dict(cls, content: dict[str, Any] | None) -> ModelTransform:
        """Raises CorruptCheckpoint: an unknown field, or a seed that is none."""
        fields = content or {}
        unknown = fields.keys() - cls.__dataclass_fields__.keys()
        if unknown:
            raise CorruptCheckpoint(f"transform has the unknown fields {sorted(unknown)}")
        for name, seed in fields.items():
            if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed <= _MAX_SEED:
                raise CorruptCheckpoint(f"transform.{name} is {seed!r}, expected a 64-bit seed")
        return cls(**fields)


def _walsh(rows: Tensor, power: int) -> Tensor:
    """Sylvester's transform of rows (n, 2^power) without scale, by dense products.

    One large product costs more operations than butterflies and much less time.
    """
    shape, done = rows.shape, 0
    while done < power:
        step = min(_RADIX_BITS, power - done)
        matrix = _sylvester(step).to(rows)
        if done == 0:
            rows = rows.reshape(-1, 1 << step) @ matrix
        else:
            rows = torch.matmul(matrix, rows.reshape(-1, 1 << step, 1 << done))
        done += step
    return rows.reshape(shape)


@cache
@torch.inference_mode(False)  # kept for later callers, which autograd may follow
def _sylvester(power: int) -> Tensor:
    matrix = torch.ones(1, 1)
    for _ in range(power):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix
