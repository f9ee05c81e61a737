"""What every quantization method returns, and what the pipeline needs to know of its options.

Knows no file format and no method but the uniform grid that GPTQ and rounding to nearest share.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from vqllm.errors import InvalidConfig
from vqllm.packing import pack_columns, pack_rows

SUPPORTED_BITS = (2, 3, 4, 5, 6, 8)
WHOLE_ROW = -1

Arrays = dict[str, NDArray[Any]]


class QuantizedLinear(ABC):
    """The weights of one linear layer in packed form; a bias is not part of it.

    Attributes:
        method: name of the format, as `entry()` and config.json spell it.
    """

    method: ClassVar[str]

    @property
    @abstractmethod
    def in_features(self) -> int:
        """Columns of the weight matrix."""

    @property
    @abstractmethod
    def out_features(self) -> int:
        """Rows of the weight matrix."""

    @abstractmethod
    def dequantize(self) -> NDArray[np.float32]:
        """Weights (out_features, in_features) as any reader of the stored tensors gets them."""

    @abstractmethod
    def tensors(self) -> Arrays:
        """What lies in the file, by part: part `p` of linear `n` is the tensor `n.p`."""

    @abstractmethod
    def entry(self) -> dict[str, Any]:
        """Facts that reading `tensors()` needs, fit for JSON."""

    @abstractmethod
    def parameters(self) -> Arrays:
        """Scales and codebooks, float: what tuning may change without touching an index."""

    @abstractmethod
    def with_parameters(self, parameters: Arrays) -> Self:
        """The same codes with other parameters, rounded to the stored precision.

        Raises:
            KeyError, ValueError: an unknown name, or a shape that differs.
        """

    @property
    def num_bytes(self) -> int:
        """Bytes in the file: codes, scales, zero points, codebooks, permutations."""
        return sum(array.nbytes for array in self.tensors().values())


class MethodOptions(Protocol):
    """What the pipeline and the bit budget need of a method's options."""

    @property
    def method(self) -> str:
        """Key of the method's table."""
        ...

    def bits_of(self, out_features: int, in_features: int) -> float:
        """Bits in the file for a linear of this shape, all overhead counted."""
        ...


@dataclass(frozen=True)
class GroupedSpec:
    """A uniform grid per group of input columns.

    Attributes:
        bits: width of a code.
        group_size: consecutive input columns that share scale and zero point; a multiple of 8,
            or -1 for all of them. ONNX Runtime runs powers of two from 16 on only.

    Raises:
        InvalidConfig: a value is outside its range.
    """

    bits: int = 4
    group_size: int = 128

    def __post_init__(self) -> None:
        if self.bits not in SUPPORTED_BITS:
            raise InvalidConfig("bits", self.bits, f"one of {SUPPORTED_BITS}")
        if self.group_size != WHOLE_ROW and (self.group_size < 8 or self.group_size % 8):
            raise InvalidConfig("group_size", self.group_size, "a multiple of 8, or -1")

    @property
    def max_code(self) -> int:
        return (1 << self.bits) - 1

    @property
    def symmetric_zero(self) -> int:
        return 1 << (self.bits - 1)

    def num_groups(self, in_features: int) -> int:
        return -(-in_features // self.columns_per_group(in_features))

    def columns_per_group(self, in_features: int) -> int:
        """Columns of every group but a shorter last one."""
        return in_features if self.group_size == WHOLE_ROW else self.group_size


@dataclass(frozen=True)
class GroupedLinear(QuantizedLinear):
    """A linear layer on per-group uniform grids: W[k, n] = (code - zero) * scale.

    Stored in the layout of GPTQ checkpoints; symmetric ones keep zero points minus one ("gptq"),
    asymmetric ones as they are ("gptq_v2").

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

    method: ClassVar[str] = "gptq"

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

    def tensors(self) -> Arrays:
        stored = self.zeros - np.uint8(1) if self.is_symmetric else self.zeros
        return {
            "qweight": pack_rows(self.codes, self.spec.bits),
            "qzeros": pack_columns(stored, self.spec.bits),
            "scales": self.scales,
            "g_idx": self.group_index,
        }

    def entry(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "bits": self.spec.bits,
            "group_size": self.spec.group_size,
            "sym": self.is_symmetric,
        }

    def parameters(self) -> Arrays:
        return {"scales": self.scales}

    def with_parameters(self, parameters: Arrays) -> Self:
        scales = checked_parameters(self.parameters(), parameters)["scales"]
        return replace(self, scales=scales)


def checked_parameters(current: Arrays, new: Arrays) -> Arrays:
    """`new` cast to the dtypes of `current`.

    Raises:
        KeyError: a name is unknown or absent.
        ValueError: a shape differs.
    """
    if current.keys() != new.keys():
        raise KeyError(f"parameters are {sorted(current)}, given were {sorted(new)}")
    for name, values in new.items():
        if values.shape != current[name].shape:
            raise ValueError(f"{name} has shape {values.shape}, stored is {current[name].shape}")
    return {name: values.astype(current[name].dtype) for name, values in new.items()}


def contiguous_groups(in_features: int, spec: GroupedSpec) -> NDArray[np.int32]:
    """Group of every input column when groups are runs of `group_size` columns."""
    return (np.arange(in_features) // spec.columns_per_group(in_features)).astype(np.int32)
