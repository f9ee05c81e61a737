"""ctypes side of the packed matrices: structs and typed functions of vqkernels.h.

Only this module and the loader speak ctypes signatures.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any, Final

from vqkernels.loader import Signatures, declare, load_library
from vqkernels.matrix_weights import (
    DenseWeights,
    GridWeights,
    LayeredWeights,
    TcqWeights,
    Transform,
    VqColumns,
    VqWeights,
    Weights,
)

KIND_GRID: Final = 0
KIND_DENSE: Final = 1
KIND_TCQ: Final = 2
KIND_VQ: Final = 3
KIND_LAYERED: Final = 4

_I32 = ctypes.c_int32
_PTR = ctypes.c_void_p
_SIGNATURES: Final[Signatures] = {
    "vq_matrix_get_size": (_I32, (_PTR, _I32, _PTR)),
    "vq_matrix_create": (_I32, (_PTR, _I32, _PTR, _PTR, _I32, _PTR)),
    "vq_matrix_free": (None, (_PTR,)),
    "vq_matrix_multiply": (_I32, (_PTR, _PTR, _I32, _PTR, _I32, _PTR)),
    "vq_matrix_read_rows": (_I32, (_PTR, _PTR, _I32, _PTR)),
}


class PartStruct(ctypes.Structure):
    """``vq_matrix_part`` of vqkernels.h."""

    _fields_ = (
        ("kind", _I32),
        ("in_features", _I32),
        ("out_features", _I32),
        ("bits", _I32),
        ("group_size", _I32),
        ("extends_columns", _I32),
        ("codes_are_bytes", _I32),
        ("weights_are_half", _I32),
        ("trellis_bits", _I32),
        ("multiplier", _I32),
        ("vector_length", _I32),
        ("num_stages", _I32),
        ("num_codes", _I32 * 2),
        ("codes", _PTR),
        ("zeros", _PTR),
        ("scales", _PTR),
        ("table", _PTR),
        ("indices", _PTR * 2),
        ("codebooks", _PTR * 2),
    )


class TransformStruct(ctypes.Structure):
    """``vq_matrix_transform`` of vqkernels.h."""

    _fields_ = (
        ("permutation", _PTR),
        ("column_scales", _PTR),
        ("column_bias", _PTR),
        ("row_bias", _PTR),
    )


@functools.cache
def matrix_library() -> ctypes.CDLL:
    """The native library with the matrix functions typed.

    Raises:
        NativeUnavailableError: there is none, or it was built before it had them.
    """
    library = load_library()
    declare(library, _SIGNATURES)
    return library


class Arrays:
    """Keeps arrays alive while their addresses are in use."""

    def __init__(self) -> None:
        self._kept: list[Any] = []

    def address(self, array: Any, dtype: str | None = None) -> int | None:
        """Address of the array as C-contiguous ``dtype`` (its own by default); None for None."""
        if array is None:
            return None
        import numpy as np

        contiguous = np.ascontiguousarray(array, dtype=dtype)
        self._kept.append(contiguous)
        return int(contiguous.ctypes.data)


def part_structs(weights: Weights, arrays: Arrays) -> list[PartStruct]:
    """The structs of the weights; ``arrays`` owns what they point to."""
    if not isinstance(weights, VqColumns):
        return [_part_struct(weights, arrays)]
    parts = [_part_struct(part, arrays) for part in weights.parts]
    for part in parts[1:]:
        part.extends_columns = 1
    return parts


def _part_struct(
    weights: GridWeights | DenseWeights | LayeredWeights | TcqWeights | VqWeights, arrays: Arrays
) -> PartStruct:
    part = PartStruct(out_features=weights.out_features, in_features=weights.in_features)
    if isinstance(weights, GridWeights):
        _fill_grid(part, weights, arrays)
    elif isinstance(weights, DenseWeights):
        part.kind = KIND_DENSE
        part.group_size = weights.group_size
        part.weights_are_half = int(weights.weight.dtype.itemsize == 2)
        part.codes = arrays.address(weights.weight)
    elif isinstance(weights, LayeredWeights):
        part.kind = KIND_LAYERED
        part.weights_are_half = int(weights.weight.dtype.itemsize == 2)
        part.codes_are_bytes = int(weights.weight.dtype.itemsize == 1)
        part.codes = arrays.address(weights.weight)
        part.scales = arrays.address(weights.scales)
    elif isinstance(weights, TcqWeights):
        _fill_tcq(part, weights, arrays)
    else:
        _fill_vq(part, weights, arrays)
    return part


def transform_struct(transform: Transform, arrays: Arrays) -> TransformStruct:
    """The struct of a transform."""
    return TransformStruct(
        arrays.address(transform.permutation, "int32"),
        arrays.address(transform.column_scales, "float32"),
        arrays.address(transform.column_bias, "float32"),
        arrays.address(transform.row_bias, "float32"),
    )


def _fill_grid(part: PartStruct, weights: GridWeights, arrays: Arrays) -> None:
    part.kind = KIND_GRID
    part.bits = weights.bits
    part.group_size = weights.group_size
    zeros = weights.zeros
    if zeros is not None and (zeros == 1 << (weights.bits - 1)).all():
        zeros = None  # symmetric: less to read
    part.codes_are_bytes = int(weights.codes.dtype.itemsize == 1)
    part.codes = arrays.address(weights.codes)
    part.zeros = arrays.address(zeros)
    part.scales = arrays.address(weights.scales)


def _fill_tcq(part: PartStruct, weights: TcqWeights, arrays: Arrays) -> None:
    part.kind = KIND_TCQ
    part.bits = weights.bits
    part.group_size = weights.group_size
    part.trellis_bits = weights.trellis_bits
    part.multiplier = weights.multiplier
    part.codes = arrays.address(weights.codes)
    part.scales = arrays.address(weights.scales)
    part.table = arrays.address(weights.table)


def _fill_vq(part: PartStruct, weights: VqWeights, arrays: Arrays) -> None:
    part.kind = KIND_VQ
    part.vector_length = weights.vector_length
    part.num_stages = len(weights.indices)
    for stage, (index, codebook) in enumerate(zip(weights.indices, weights.codebooks, strict=True)):
        part.num_codes[stage] = codebook.shape[0]
        part.indices[stage] = arrays.address(index)
        part.codebooks[stage] = arrays.address(codebook)
