"""Folders whose linears are published in 8-bit floats, as DeepSeek-V3's are: `quant_method` "fp8".

float8 e4m3 `weight` (out, in) and float32 `weight_scale_inv`, one factor per block of
`weight_block_size` weights. For us they are originals to quantize, not results; only reading is
implemented.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from vqllm.errors import CorruptCheckpoint, UnsupportedModel
from vqllm.formats.base import FolderFormat, Shape
from vqllm.quantization.base import Arrays, QuantizedLinear, checked_parameters
from vqllm.tensor_store import TensorStore

_DTYPE = "F8_E4M3"


@dataclass(frozen=True)
class Fp8Linear(QuantizedLinear):
    """A linear in 8-bit floats.

    Attributes:
        codes: uint8 (out, in), the bits of e4m3 floats.
        factors: float32 (out / block rows, in / block columns), rounded up.
        block: rows and columns of weights that share a factor.
    """

    codes: NDArray[np.uint8]
    factors: NDArray[np.float32]
    block: tuple[int, int]

    method: ClassVar[str] = "fp8"

    @property
    def in_features(self) -> int:
        return int(self.codes.shape[1])

    @property
    def out_features(self) -> int:
        return int(self.codes.shape[0])

    def dequantize(self) -> NDArray[np.float32]:
        """Weights (out, in) float32: value times the factor of its block."""
        weights: NDArray[np.float32] = e4m3_values()[self.codes]
        rows, columns = self.block
        for index, factors in enumerate(self.factors):
            wide = np.repeat(factors, columns)[: self.in_features]
            weights[index * rows : (index + 1) * rows] *= wide
        return weights

    def tensors(self) -> Arrays:
        return {"weight": self.codes, "weight_scale_inv": self.factors}

    def entry(self) -> dict[str, Any]:
        return {"method": self.method, "weight_block_size": list(self.block)}

    def parameters(self) -> Arrays:
        return {"weight_scale_inv": self.factors}

    def with_parameters(self, parameters: Arrays) -> Self:
        factors = checked_parameters(self.parameters(), parameters)["weight_scale_inv"]
        return type(self)(self.codes, factors, self.block)


@dataclass(frozen=True)
class Fp8Format(FolderFormat):
    """The `quantization_config` of an fp8 folder."""

    block: tuple[int, int]

    quant_method: ClassVar[str] = "fp8"

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> Fp8Format:
        """Raises UnsupportedModel for another float than e4m3, or weights without blocks."""
        kind = config.get("fmt", "e4m3")
        block = config.get("weight_block_size")
        if kind != "e4m3":
            raise UnsupportedModel(f"fp8 with fmt {kind!r}; only 'e4m3' can be read")
        if not (isinstance(block, list) and len(block) == 2 and min(block) > 0):
            raise UnsupportedModel(f"fp8 with weight_block_size {block!r}; two sizes are needed")
        return cls((int(block[0]), int(block[1])))

    def to_dict(self) -> dict[str, Any]:
        return {
            "quant_method": self.quant_method,
            "fmt": "e4m3",
            "weight_block_size": list(self.block),
        }

    def read(self, name: str, shape: Shape, store: TensorStore) -> Fp8Linear | None:
        if self.marker(name) not in store:
            return None
        weight, factors = f"{name}.weight", store.float32(self.marker(name))
        if store.dtype(weight) != _DTYPE or store.shape(weight) != shape:
            raise CorruptCheckpoint(
                f"{store.path_of(weight)}: {weight} is {store.dtype(weight)} "
                f"{store.shape(weight)}, expected {_DTYPE} {shape}"
            )
        blocks = tuple(-(-size // step) for size, step in zip(shape, self.block, strict=True))
        if factors.shape != blocks:
            raise CorruptCheckpoint(
                f"{store.path_of(weight)}: {self.marker(name)} has shape {factors.shape}, "
                f"expected {blocks}"
            )
        codes = np.array(store.raw(weight))
        if ((codes & 0x7F) == 0x7F).any():
            raise CorruptCheckpoint(f"{store.path_of(weight)}: {weight} holds NaN")
        return Fp8Linear(codes, factors, self.block)

    def marker(self, name: str) -> str:
        return f"{name}.weight_scale_inv"


def e4m3_values() -> NDArray[np.float32]:
    """The value of every bit pattern, (256,): sign, 4 bits of exponent (bias 7), 3 of mantissa."""
    codes = np.arange(256)
    exponent, mantissa = codes >> 3 & 15, (codes & 7) / 8
    is_normal = exponent > 0
    size = np.where(is_normal, 1 + mantissa, mantissa) * 2.0 ** np.where(
        is_normal, exponent - 7, -6
    )
    size[(codes & 0x7F) == 0x7F] = np.nan
    return np.where(codes & 0x80, -size, size).astype(np.float32)
