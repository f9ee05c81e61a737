"""Native weight encoders: a block of columns on a uniform grid or by a trellis, with feedback.

Checks arrays by name, then makes one native call with the GIL released, on the calling thread.
Matrices lie transposed: a column of the weight is one input and a row of these arrays. Knows numpy
only, nothing of models, hessians or files.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from vqkernels.errors import DtypeError, ShapeError
from vqkernels.loader import check_status, load_library

MIN_STATE_BITS: Final = 10
MAX_STATE_BITS: Final = 16
MAX_BITS: Final = 5
TABLE_SIZE: Final = 256

Array = npt.NDArray[Any]
Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Levels = npt.NDArray[np.int8]
States = npt.NDArray[np.uint16]


class TrellisStruct(ctypes.Structure):
    """``vq_trellis`` of vqsweep.h."""

    _fields_ = (
        ("bits", ctypes.c_int32),
        ("state_bits", ctypes.c_int32),
        ("multiplier", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("table", ctypes.c_void_p),
    )


class SweepStruct(ctypes.Structure):
    """``vq_sweep`` of vqsweep.h."""

    _fields_ = (
        ("num_columns", ctypes.c_int32),
        ("num_rows", ctypes.c_int32),
        ("factor_stride", ctypes.c_int64),
        ("columns", ctypes.c_void_p),
        ("factor", ctypes.c_void_p),
        ("errors", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("groups", ctypes.c_void_p),
        ("column_scales", ctypes.c_void_p),
    )


@dataclass(frozen=True, eq=False)
class Trellis:
    """A bitshift trellis code; see ``vq_trellis``.

    Attributes:
        bits: per weight, 1..5.
        state_bits: of a state, 10..16.
        multiplier: odd, below 2**state_bits.
        table: int8 (256,).

    Raises:
        ShapeError, DtypeError: a value is out of range.
    """

    bits: int
    state_bits: int
    multiplier: int
    table: Levels

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= MAX_BITS:
            raise ShapeError(f"bits is {self.bits}, must be 1..{MAX_BITS}")
        if not MIN_STATE_BITS <= self.state_bits <= MAX_STATE_BITS:
            raise ShapeError(
                f"state_bits is {self.state_bits}, must be {MIN_STATE_BITS}..{MAX_STATE_BITS}"
            )
        if self.multiplier % 2 == 0 or not 0 < self.multiplier < 1 << self.state_bits:
            raise ShapeError(
                f"multiplier is {self.multiplier}, must be odd and below {1 << self.state_bits}"
            )
        _check("table", self.table, np.int8, (TABLE_SIZE,))

    def stream_bytes(self, num_rows: int) -> int:
        """Bytes of one column of `num_rows` weights."""
        return -(-num_rows * self.bits // 8)

    def struct(self) -> TrellisStruct:
        """For the native call; valid while this object lives."""
        return TrellisStruct(self.bits, self.state_bits, self.multiplier, 0, self.table.ctypes.data)


@dataclass(frozen=True, eq=False)
class Sweep:
    """A block of columns to quantize one after the other; see ``vq_sweep``.

    Attributes:
        columns: float32 (n, rows), contiguous, writable: left as they were when quantized.
        scales: float32 (groups, rows), positive.
        groups: int32 (n,), the row of `scales` of every column.
        factor: float32 (n, n) with contiguous rows, the diagonal block of U; None: no feedback.
        column_scales: float32 (n,), more factors.
    """

    columns: Floats
    scales: Floats
    groups: npt.NDArray[np.int32]
    factor: Floats | None = None
    column_scales: Floats | None = None

    def __post_init__(self) -> None:
        count, num_rows = self.columns.shape
        _check("columns", self.columns, np.float32, (count, num_rows))
        _check("scales", self.scales, np.float32, (len(self.scales), num_rows))
        _check("groups", self.groups, np.int32, (count,))
        if self.groups.size and not 0 <= self.groups.min() <= self.groups.max() < len(self.scales):
            raise ShapeError(f"groups must lie in 0..{len(self.scales) - 1}")
        if self.factor is not None and (
            self.factor.dtype != np.float32
            or self.factor.shape != (count, count)
            or self.factor.strides[1] != 4
        ):
            raise ShapeError(f"factor must be float32 ({count}, {count}) with contiguous rows")
        if self.column_scales is not None:
            _check("column_scales", self.column_scales, np.float32, (count,))


def sweep_trellis(sweep: Sweep, trellis: Trellis) -> tuple[Bytes, Floats]:
    """Codes (n, stream bytes) and errors (n, rows) of every column; see ``vq_sweep_trellis``.

    Errors are those of the weights, divided by U's diagonal where there is a factor.

    Raises:
        NonFiniteError: columns hold NaN or infinity.
        NativeUnavailableError: there is no native library.
    """
    count, num_rows = sweep.columns.shape
    codes = np.empty((count, trellis.stream_bytes(num_rows)), np.uint8)
    errors = np.empty_like(sweep.columns)
    block, code = _sweep_struct(sweep, errors), trellis.struct()
    status = load_library().vq_sweep_trellis(
        ctypes.byref(block), ctypes.byref(code), codes.ctypes.data
    )
    check_status(status, f"sweep_trellis of {count} columns of {num_rows} rows")
    return codes, errors


def sweep_grid(sweep: Sweep, zeros: Bytes, max_code: int) -> tuple[Bytes, Floats]:
    """Codes (n, rows) and errors (n, rows) of every column; see ``vq_sweep_grid``.

    zeros: uint8 (groups, rows), the code of weight 0.

    Raises:
        NonFiniteError: columns hold NaN or infinity.
        NativeUnavailableError: there is no native library.
    """
    _check("zeros", zeros, np.uint8, sweep.scales.shape)
    codes = np.empty(sweep.columns.shape, np.uint8)
    errors = np.empty_like(sweep.columns)
    block = _sweep_struct(sweep, errors)
    status = load_library().vq_sweep_grid(
        ctypes.byref(block), zeros.ctypes.data, max_code, codes.ctypes.data
    )
    check_status(status, f"sweep_grid of {sweep.columns.shape} with codes up to {max_code}")
    return codes, errors


def search_trellis(trellis: Trellis, targets: Floats, scales: Floats, starts: States) -> States:
    """States uint16 (n, length) of the best pieces of n streams; see ``vq_trellis_search``.

    targets, scales: float32 (n, length). starts: uint16 (n,), the states before the pieces.

    Raises:
        NonFiniteError: targets hold NaN or infinity.
        NativeUnavailableError: there is no native library.
    """
    count, length = targets.shape
    _check("targets", targets, np.float32, (count, length))
    _check("scales", scales, np.float32, (count, length))
    _check("starts", starts, np.uint16, (count,))
    states = np.empty((count, length), np.uint16)
    code = trellis.struct()
    status = load_library().vq_trellis_search(
        ctypes.byref(code),
        targets.ctypes.data,
        scales.ctypes.data,
        starts.ctypes.data,
        count,
        length,
        states.ctypes.data,
    )
    check_status(status, f"search_trellis of {count} streams of {length}")
    return states


def decode_trellis(trellis: Trellis, codes: Bytes, num_rows: int) -> Levels:
    """Levels int8 (n, num_rows) of codes (n, stream bytes); see ``vq_trellis_decode``.

    Raises:
        NativeUnavailableError: there is no native library.
    """
    count = codes.shape[0]
    _check("codes", codes, np.uint8, (count, trellis.stream_bytes(num_rows)))
    levels = np.empty((count, num_rows), np.int8)
    code = trellis.struct()
    status = load_library().vq_trellis_decode(
        ctypes.byref(code), codes.ctypes.data, count, num_rows, levels.ctypes.data
    )
    check_status(status, f"decode_trellis of {codes.shape} to {num_rows} rows")
    return levels


def _check(name: str, array: Array, dtype: type[Any], shape: tuple[int, ...]) -> None:
    if array.dtype != dtype:
        raise DtypeError(f"{name} has dtype {array.dtype}, must be {np.dtype(dtype)}")
    if array.shape != shape or not array.flags.c_contiguous:
        raise ShapeError(f"{name} has shape {array.shape}, must be {shape} and contiguous")


def _sweep_struct(sweep: Sweep, errors: Floats) -> SweepStruct:
    count, num_rows = sweep.columns.shape
    factor, column_scales = sweep.factor, sweep.column_scales
    return SweepStruct(
        count,
        num_rows,
        count if factor is None else factor.strides[0] // 4,
        sweep.columns.ctypes.data,
        None if factor is None else factor.ctypes.data,
        errors.ctypes.data,
        sweep.scales.ctypes.data,
        sweep.groups.ctypes.data,
        None if column_scales is None else column_scales.ctypes.data,
    )
