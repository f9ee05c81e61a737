"""What every folder format offers a reader, and the checks that all of them share.

Knows names, shapes and tensors; knows no model and no quantization algorithm.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from vqllm.errors import CorruptCheckpoint
from vqllm.quantization.base import QuantizedLinear
from vqllm.tensor_store import TensorStore

Shape = tuple[int, int]

# Fields of a `ModelTransform` that a runner of the folder has to compute.
ONLINE_SEEDS = frozenset({"residual_seed", "down_seed"})


class FolderFormat(ABC):
    """The `quantization_config` of one folder, and how to read its linears.

    Attributes:
        quant_method: as config.json spells the format.
    """

    quant_method: ClassVar[str]

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """The `quantization_config` to write."""

    @abstractmethod
    def read(self, name: str, shape: Shape, store: TensorStore) -> QuantizedLinear | None:
        """The linear `name` of shape (out, in), or None where it is stored as plain weights.

        Raises:
            CorruptCheckpoint: config.json and the tensors contradict each other, or a value is
                impossible; names file, tensor and field.
        """

    @abstractmethod
    def marker(self, name: str) -> str:
        """A tensor that exists exactly when the linear `name` is stored quantized."""

    @property
    def transform(self) -> dict[str, Any]:
        """Fields of the transform that a reader has to compute; empty for none."""
        return {}

    @property
    def is_online(self) -> bool:
        """Whether a runner has rotations to compute."""
        return bool(ONLINE_SEEDS & self.transform.keys())

    @property
    def meta(self) -> dict[str, Any]:
        """What the writer noted of its recipe."""
        return {}

    @property
    def embedding_bits(self) -> int:
        """Bits per weight of the embedding's codes; 0 where it is stored as plain floats."""
        return 0


def stored_part(store: TensorStore, name: str, dtype: type[np.generic]) -> NDArray[Any]:
    """A tensor of the kind that the format asks for.

    Raises:
        CorruptCheckpoint: it is missing or of another dtype.
    """
    values = store.raw(name)
    if values.dtype != np.dtype(dtype):
        raise CorruptCheckpoint(
            f"{store.path_of(name)}: {name} is {store.dtype(name)}, "
            f"the format has {np.dtype(dtype).name}"
        )
    return values


def finite_part(store: TensorStore, name: str, shape: tuple[int, ...]) -> NDArray[np.float16]:
    """A float tensor of known shape as float16, the precision that is stored.

    Raises:
        CorruptCheckpoint: missing, misshapen, or not finite as float16.
    """
    values = store.float32(name)
    if values.shape != shape:
        raise CorruptCheckpoint(
            f"{store.path_of(name)}: {name} has shape {values.shape}, expected {shape}"
        )
    with np.errstate(over="ignore"):
        halves = values.astype(np.float16)
    if not np.isfinite(halves).all():
        raise CorruptCheckpoint(f"{store.path_of(name)}: {name} exceeds the range of float16")
    return halves


def field(entry: dict[str, Any], key: str, kind: type, where: str) -> Any:
    """`entry[key]`, checked to be a `kind`.

    Raises:
        CorruptCheckpoint: it is absent or of another type; `where` names the object.
    """
    value = entry.get(key)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise CorruptCheckpoint(
            f"config.json: {where}.{key} is {value!r}, expected {kind.__name__}"
        )
    return value
