"""Packed matrices of every weight format behind one product.

Checks arrays by name, then makes one native call with the GIL released. Knows numpy only. The plain
version beside it is :mod:`vqkernels.matrix_reference`.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from vqkernels.errors import DtypeError, ShapeError
from vqkernels.loader import check_status
from vqkernels.matrix_abi import Arrays, PartStruct, matrix_library, part_structs, transform_struct
from vqkernels.matrix_weights import Transform, Weights
from vqkernels.pool import ThreadPool

ALIGNMENT = 64

Floats = npt.NDArray[np.float32]


class Matrix:
    """Weights packed for :func:`matmul`: one or more parts whose rows follow each other.

    Parts may differ in format, but share ``in_features`` and the transform (q, k and v;
    gate and up). The arrays given are copied into the packed form and not kept.

    Attributes:
        in_features, out_features: of the whole matrix.
        nbytes: packed size; about what one product reads.
    """

    def __init__(
        self,
        parts: Weights | Sequence[Weights],
        transform: Transform | None = None,
        memory: npt.NDArray[np.uint8] | None = None,
        is_packed: bool = False,
    ) -> None:
        """``memory``: where to pack, :func:`packed_size` bytes, 64-byte aligned; else allocated.
        With ``is_packed`` it already holds what the same parts packed there (a cache on disk, a
        copy); codes and scales are not read then.

        Raises:
            ShapeError, LayoutError: parts, transform and memory do not fit together.
            NativeUnavailableError: there is no native library.
        """
        weights = _as_list(parts)
        self.in_features = weights[0].in_features
        self.out_features = sum(part.out_features for part in weights)
        transform = transform or Transform()
        transform.check(self.in_features, self.out_features)
        arrays = Arrays()
        structs = _structs(weights, arrays)
        size = _size(structs)
        if memory is None:
            if is_packed:
                raise ShapeError("is_packed needs the memory that holds the packed weights")
            memory = aligned_empty(size)
        _check_memory(memory, size)
        handle = ctypes.c_void_p()
        status = matrix_library().vq_matrix_create(
            ctypes.byref(structs),
            len(structs),
            ctypes.byref(transform_struct(transform, arrays)),
            memory.ctypes.data,
            int(is_packed),
            ctypes.byref(handle),
        )
        check_status(status, f"packing {self.out_features}x{self.in_features}")
        self.nbytes = size
        self._memory = memory
        assert handle.value is not None
        self._handle = handle.value
        weakref.finalize(self, matrix_library().vq_matrix_free, self._handle)

    @property
    def memory(self) -> npt.NDArray[np.uint8]:
        """The packed form, uint8 (nbytes,); do not write to it."""
        return self._memory

    @property
    def handle(self) -> int:
        """Address of the ``vq_matrix``, valid as long as this object lives."""
        return self._handle

    def read_rows(self, rows: npt.NDArray[np.integer[Any]]) -> Floats:
        """Rows of the weight, float32 (len(rows), in_features): an embedding look-up.

        Raises:
            ShapeError: ``rows`` is not one-dimensional or holds an index out of range.
        """
        if rows.ndim != 1:
            raise ShapeError(f"rows has shape {rows.shape}, must have one dimension")
        wanted = np.ascontiguousarray(rows, dtype=np.int32)
        result = np.empty((wanted.size, self.in_features), dtype=np.float32)
        status = matrix_library().vq_matrix_read_rows(
            self._handle, wanted.ctypes.data, wanted.size, result.ctypes.data
        )
        check_status(status, f"rows of {self.out_features}x{self.in_features}")
        return result


def packed_size(parts: Weights | Sequence[Weights]) -> int:
    """Bytes that packing takes, a multiple of 64.

    Raises:
        ShapeError: the parts do not fit together.
    """
    return _size(_structs(_as_list(parts), Arrays()))


def matmul(
    matrix: Matrix,
    x: Floats,
    pool: ThreadPool | None = None,
    exact: bool = False,
    out: Floats | None = None,
) -> Floats:
    """y = x @ weight.T.

    By default activations become int8, one scale per 128 columns: on Gaussian rows the result is
    within about 0.6 % (RMS) of the float product. Every tier, batch and number of threads gives the
    same bits. ``exact`` computes in float32 with the weights as stored, about 50 times slower.

    Args:
        matrix: the packed weights.
        x: float32 (in_features,) or (batch, in_features).
        pool: threads to split the outputs over; None runs on the calling thread.
        exact: no int8 anywhere.
        out: result array of the result's shape, C-contiguous, not overlapping x.

    Raises:
        ShapeError, DtypeError: x or out does not fit the matrix.
        NonFiniteError: x holds NaN or infinity (not checked with ``exact``).
    """
    _check_x(matrix, x)
    x = np.ascontiguousarray(x)
    y = _result((*x.shape[:-1], matrix.out_features), out)
    status = matrix_library().vq_matrix_multiply(
        matrix.handle,
        x.ctypes.data,
        x.shape[0] if x.ndim == 2 else 1,
        y.ctypes.data,
        int(exact),
        None if pool is None else pool.handle,
    )
    if status:
        check_status(status, f"matmul of {matrix.out_features}x{matrix.in_features}")
    return y


def aligned_empty(num_bytes: int) -> npt.NDArray[np.uint8]:
    """Uninitialized bytes on a 64-byte border."""
    raw = np.empty(num_bytes + ALIGNMENT, dtype=np.uint8)
    offset = -raw.ctypes.data % ALIGNMENT
    return raw[offset : offset + num_bytes]


def _as_list(parts: Weights | Sequence[Weights]) -> list[Weights]:
    weights = list(parts) if isinstance(parts, Sequence) else [parts]
    if not weights:
        raise ShapeError("a matrix needs at least one part")
    widths = {part.in_features for part in weights}
    if len(widths) > 1:
        raise ShapeError(f"parts have different in_features: {sorted(widths)}")
    return weights


def _structs(weights: list[Weights], arrays: Arrays) -> ctypes.Array[PartStruct]:
    structs = [struct for part in weights for struct in part_structs(part, arrays)]
    return (PartStruct * len(structs))(*structs)


def _size(structs: ctypes.Array[PartStruct]) -> int:
    size = ctypes.c_int64()
    status = matrix_library().vq_matrix_get_size(
        ctypes.byref(structs), len(structs), ctypes.byref(size)
    )
    check_status(status, "size of a packed matrix")
    return size.value


def _check_memory(memory: npt.NDArray[np.uint8], size: int) -> None:
    if memory.dtype != np.uint8 or memory.shape != (size,) or not memory.flags.c_contiguous:
        raise ShapeError(f"memory has shape {memory.shape}, must be uint8 ({size},), contiguous")
    if memory.ctypes.data % ALIGNMENT or not memory.flags.writeable:
        raise ShapeError(f"memory must be writeable and aligned to {ALIGNMENT} bytes")


def _check_x(matrix: Matrix, x: Floats) -> None:
    if not isinstance(x, np.ndarray):
        raise DtypeError(f"x is a {type(x).__name__}, must be a numpy array")
    if x.dtype != np.float32:
        raise DtypeError(f"x has dtype {x.dtype}, must be float32")
    if x.ndim not in (1, 2) or x.shape[-1] != matrix.in_features or x.shape[0] == 0:
        raise ShapeError(
            f"x has shape {x.shape}, must be ({matrix.in_features},) or "
            f"(batch, {matrix.in_features}) with batch >= 1"
        )


def _result(shape: tuple[int, ...], out: Floats | None) -> Floats:
    if out is None:
        return np.empty(shape, dtype=np.float32)
    if out.dtype != np.float32:
        raise DtypeError(f"out has dtype {out.dtype}, must be float32")
    if out.shape != shape or not out.flags.c_contiguous or not out.flags.writeable:
        raise ShapeError(f"out has shape {out.shape}, must be {shape}, C-contiguous and writeable")
    return out
