"""What every quantization method returns, and how to turn it back into weights.

Knows no file format and no method.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vqllm.errors import InvalidConfig

SUPPORTED_BITS = (2, 3, 4, 8)


@dataclass(frozen=True)
class GroupedSpec:
    """A uniform grid per group of input columns.

    Attributes:
        bits: width of a code.
        group_size: consecutive input columns that share scale and zero point; a power of two
            from 16 on, because ONNX Runtime's MatMulNBits has no others.

    Raises:
        InvalidConfig: a value is outside its range.
    """

    bits: int = 4
    group_size: int = 128

    def __post_init__(self) -> None:
        if self.bits not in SUPPORTED_BITS:
            raise InvalidConfig("bits", self.bits, f"one of {SUPPORTED_BITS}")
        if self.group_size < 16 or self.group_size & (self.group_size - 1):
            raise InvalidConfig("group_size", self.group_size, "a power of two from 16 on")

    @property
    def max_code(self) -> int:
        return (1 << self.bits) - 1

    @property
    def symmetric_zero(self) -> int:
        return 1 << (self.bits - 1)

    def num_groups(self, in_features: int) -> int:
        return -(-in_features // self.group_size)


@dataclass(frozen=True)
class GroupedLinear:
    """A linear layer on per-group uniform grids: W[k, n] = (code - zero) * scale.

    Attributes:
        codes: uint8 (in_features, out_features).
        scales: float16 (groups, out_features).
        zeros: uint8 (groups, out_features), the code of weight 0.
        group_index: int32 (in_features,), the group of every input column.
        spec: width and group size.
    """

    codes: NDArray[np.uint8]
    scales: NDArray[np.float16]
    zeros: NDArray[np.uint8]
    group_index: NDArray[np.int32]
    spec: GroupedSpec

    @property
    def in_features(self) -> int:
        return int(self.codes.shape[0])

    @property
    def out_features(self) -> int:
        return int(self.codes.shape[1])

    @property
    def has_contiguous_groups(self) -> bool:
        """Whether group g is exactly columns g * group_size to (g + 1) * group_size."""
        return bool(
            np.array_equal(self.group_index, contiguous_groups(self.in_features, self.spec))
        )

    @property
    def is_symmetric(self) -> bool:
        return bool((self.zeros == self.spec.symmetric_zero).all())

    def output_slice(self, start: int, stop: int) -> GroupedLinear:
        """The outputs from `start` to `stop` as a layer of their own."""
        return GroupedLinear(
            codes=np.ascontiguousarray(self.codes[:, start:stop]),
            scales=np.ascontiguousarray(self.scales[:, start:stop]),
            zeros=np.ascontiguousarray(self.zeros[:, start:stop]),
            group_index=self.group_index,
            spec=self.spec,
        )

    def dequantize(self) -> NDArray[np.float32]:
        """Weights in the usual orientation, float32 (out_features, in_features)."""
        steps = self.codes.astype(np.float32) - self.zeros[self.group_index]
        return np.ascontiguousarray((steps * self.scales.astype(np.float32)[self.group_index]).T)


def contiguous_groups(in_features: int, spec: GroupedSpec) -> NDArray[np.int32]:
    """Group of every input column when groups are runs of `group_size` columns."""
    return (np.arange(in_features) // spec.group_size).astype(np.int32)
