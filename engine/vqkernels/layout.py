"""Weights as GPTQ checkpoints store them, checked by name at construction.

Knows the file layout only; the packed layout of the kernels is described in vqkernels.h.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from vqkernels.errors import DtypeError, LayoutError, NonFiniteError, ShapeError

CheckpointFormat = Literal["gptq", "gptq_v2"]
CODES_PER_WORD = 8
SYMMETRIC_ZERO = 8
MAX_GROUP_SIZE = 65536
ZERO_OFFSET: dict[str, int] = {"gptq": 1, "gptq_v2": 0}


@dataclass(frozen=True, eq=False)
class GptqTensors:
    """One 4-bit linear layer of a GPTQ checkpoint, with in_features = 8 * qweight.shape[0].

    Attributes:
        qweight: int32 [in_features / 8, out_features]; nibble i of a word is column 8*row + i.
        scales: float16 or float32 [num_groups, out_features], num_groups = ceil(in / group).
        qzeros: int32 [num_groups, ceil(out_features / 8)], or None for zero point 8 everywhere.
        group_size: input columns per scale, a multiple of 8; the last group may be shorter.
        checkpoint_format: "gptq" stores zero points minus one (modulo 16), "gptq_v2" as they are.

    Raises:
        ShapeError, DtypeError, NonFiniteError, LayoutError: naming the array and the value.
    """

    qweight: npt.NDArray[np.int32]
    scales: npt.NDArray[np.floating[Any]]
    qzeros: npt.NDArray[np.int32] | None = None
    group_size: int = 128
    checkpoint_format: CheckpointFormat = "gptq"

    def __post_init__(self) -> None:
        if self.checkpoint_format not in ZERO_OFFSET:
            raise LayoutError(
                f"checkpoint_format is {self.checkpoint_format!r}, must be 'gptq' or 'gptq_v2'"
            )
        if not 0 < self.group_size <= MAX_GROUP_SIZE or self.group_size % CODES_PER_WORD:
            raise ShapeError(
                f"group_size is {self.group_size}, must be a multiple of 8 in 8..{MAX_GROUP_SIZE}; "
                "for one group per column pass in_features"
            )
        _check_array("qweight", self.qweight, (np.int32,))
        self._check_scales()
        if self.qzeros is not None:
            _check_array("qzeros", self.qzeros, (np.int32,))
            words = -(-self.out_features // CODES_PER_WORD)
            _check_shape("qzeros", self.qzeros, (self.num_groups, words))

    @property
    def in_features(self) -> int:
        return int(self.qweight.shape[0]) * CODES_PER_WORD

    @property
    def out_features(self) -> int:
        return int(self.qweight.shape[1])

    @property
    def num_groups(self) -> int:
        return -(-self.in_features // self.group_size)

    @property
    def zero_offset(self) -> int:
        """What to add to a stored zero point, modulo 16."""
        return ZERO_OFFSET[self.checkpoint_format]

    def _check_scales(self) -> None:
        _check_array("scales", self.scales, (np.float16, np.float32))
        _check_shape("scales", self.scales, (self.num_groups, self.out_features))
        if not np.isfinite(self.scales).all():
            raise NonFiniteError("scales holds NaN or infinity; the checkpoint is damaged")


def check_static_groups(group_index: npt.NDArray[np.integer[Any]], group_size: int) -> None:
    """Accept a checkpoint's ``g_idx`` [in_features] only if column k is in group k // group_size.

    Raises:
        LayoutError: columns are reordered (act-order without static groups).
    """
    expected = np.arange(group_index.size) // group_size
    wrong = np.flatnonzero(group_index != expected)
    if wrong.size:
        k = int(wrong[0])
        raise LayoutError(
            f"g_idx[{k}] is {int(group_index[k])}, expected {int(expected[k])}: act-order without "
            "static groups is not supported; quantize with static groups or use another executor"
        )


def _check_array(name: str, array: object, dtypes: tuple[type[np.generic], ...]) -> None:
    if not isinstance(array, np.ndarray):
        raise DtypeError(f"{name} is a {type(array).__name__}, must be a numpy array")
    if array.dtype not in [np.dtype(dtype) for dtype in dtypes]:
        wanted = " or ".join(dtype.__name__ for dtype in dtypes)
        raise DtypeError(f"{name} has dtype {array.dtype}, must be {wanted}")
    if array.ndim != 2 or 0 in array.shape:
        raise ShapeError(f"{name} has shape {array.shape}, must be two-dimensional and not empty")


def _check_shape(name: str, array: npt.NDArray[Any], shape: tuple[int, int]) -> None:
    if array.shape != shape:
        raise ShapeError(f"{name} has shape {array.shape}, must be {shape}")
