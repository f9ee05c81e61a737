"""Native SCQ1 codec: sparse convex codes to frames and back, byte for byte as docs/scq1.md says.

Works on numpy arrays and a model's numbers; knows nothing of pictures or networks. The reference
implementation is `scq.bitstream`, whose errors say more than the reasons given here.
"""

from __future__ import annotations

import ctypes
import enum
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from vqkernels.errors import KernelError, ShapeError
from vqkernels.loader import check_status, load_library

Longs = npt.NDArray[np.int64]
Shorts = npt.NDArray[np.uint16]

_ENTROPY: Final = {"auto": 0, "raw": 1, "rans": 2}
_TABLES: Final = ("base", "support", "mode", "new", "swap", "other")
_SIZED_TABLES: Final = ("partition", "slot", "reweight", "swap_weights")
_HEADER_BYTES: Final = 32
_BYTES_PER_LATENT: Final = 32
_BYTES_PER_TILE: Final = 24


class Scq1Reason(enum.IntEnum):
    """``vq_scq1_reason``: why bytes are no frame, or codes cannot be packed."""

    GOOD = 0
    HEADER = 1
    CHECK = 2
    LENGTH = 3
    TABLES = 4
    REFERENCE = 5
    STREAM = 6
    RANK = 7
    STATE = 8
    ASSIGNMENT = 9


class Scq1Error(KernelError, ValueError):
    """Bytes that are no frame of the model, or codes that it cannot hold; `reason` says why."""

    def __init__(self, reason: Scq1Reason) -> None:
        super().__init__(f"SCQ1: {reason.name.lower()}")
        self.reason = reason


class _ProfileStruct(ctypes.Structure):
    _fields_ = (
        ("num_codes", ctypes.c_int32),
        ("max_support", ctypes.c_int32),
        ("denominator", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("base_cluster", ctypes.c_void_p),
        ("other_cluster", ctypes.c_void_p),
        ("frequencies", ctypes.c_void_p),
        ("num_frequencies", ctypes.c_int64),
    )


class _FrameStruct(ctypes.Structure):
    _fields_ = (
        ("codes", ctypes.c_char_p),
        ("num_bytes", ctypes.c_int64),
        ("rows", ctypes.c_int32),
        ("columns", ctypes.c_int32),
        ("reference_indices", ctypes.c_void_p),
        ("reference_numerators", ctypes.c_void_p),
        ("indices", ctypes.c_void_p),
        ("numerators", ctypes.c_void_p),
        ("state", ctypes.c_void_p),
        ("allow_partial", ctypes.c_int32),
    )


class _RequestStruct(ctypes.Structure):
    _fields_ = (
        ("indices", ctypes.c_void_p),
        ("numerators", ctypes.c_void_p),
        ("reference_indices", ctypes.c_void_p),
        ("reference_numerators", ctypes.c_void_p),
        ("rows", ctypes.c_int32),
        ("columns", ctypes.c_int32),
        ("width", ctypes.c_int32),
        ("height", ctypes.c_int32),
        ("letterboxed", ctypes.c_int32),
        ("tile", ctypes.c_int32),
        ("entropy", ctypes.c_int32),
        ("model_hash", ctypes.c_uint8 * 4),
        ("codes", ctypes.c_void_p),
        ("capacity", ctypes.c_int64),
        ("state", ctypes.c_void_p),
    )


@dataclass(frozen=True, eq=False)
class Scq1Codes:
    """Codes of a grid: indices and numerators (rows * columns, s) int64, raster order."""

    indices: Longs
    numerators: Longs


@dataclass(frozen=True, eq=False)
class Scq1Tables:
    """Entropy tables: cluster maps (K,) uint16, frequencies (rows, alphabet) uint16 by name."""

    base_cluster: Shorts
    other_cluster: Shorts
    frequencies: Mapping[str, Shorts]


@dataclass(frozen=True)
class Scq1Options:
    """How to pack. width, height: the picture in pixels, for key frames. tile: side, 0 for none."""

    model_hash: bytes
    width: int = 0
    height: int = 0
    letterboxed: bool = False
    tile: int = 0
    entropy: str = "auto"


@dataclass(frozen=True)
class Scq1Frame:
    """A packed frame. base_bytes: its shortest prefix that shows the base layer. modes: latents
    that took SKIP, REWEIGHT, SWAP1, NEW in a delta frame."""

    codes: bytes
    base_bytes: int
    is_rans: bool
    modes: tuple[int, int, int, int]


class Scq1Model:
    """One model's numbers, ready to pack and unpack. Safe to share between threads.

    Raises:
        ShapeError: SCQ1 has no profile for the sizes, or the tables do not belong to them.
        NativeUnavailableError: there is no native library.
    """

    def __init__(
        self,
        num_codes: int,
        max_support: int,
        denominator: int,
        tables: Scq1Tables | None = None,
    ) -> None:
        self.max_support = max_support
        self._library = load_library()
        profile = _ProfileStruct(num_codes, max_support, denominator)
        kept = [] if tables is None else _flat_tables(tables, num_codes, max_support)
        if kept:
            addresses = [array.ctypes.data for array in kept]
            profile.base_cluster, profile.other_cluster, profile.frequencies = addresses
            profile.num_frequencies = kept[2].size
        handle = ctypes.c_void_p()
        status = self._library.vq_scq1_open(ctypes.byref(profile), ctypes.byref(handle))
        check_status(status, f"SCQ1 model K={num_codes} s={max_support} n={denominator}")
        self._handle = handle.value
        weakref.finalize(self, self._library.vq_scq1_close, handle.value)

    def unpack(
        self,
        codes: bytes,
        grid: tuple[int, int],
        *,
        reference: Scq1Codes | None = None,
        allow_partial: bool = False,
    ) -> tuple[Scq1Codes, bool]:
        """The codes of a frame on a (rows, columns) grid, and whether it was complete.

        Raises Scq1Error for bytes that are no such frame, ShapeError for arrays that do not fit.
        """
        found = self._empty(grid)
        state, reason = np.zeros(1, np.int32), ctypes.c_int32()
        before = self._checked(reference, grid)
        frame = _FrameStruct(
            codes,
            len(codes),
            *grid,
            *_addresses(before),
            found.indices.ctypes.data,
            found.numerators.ctypes.data,
            state.ctypes.data,
            int(allow_partial),
        )
        status = self._library.vq_scq1_unpack(
            self._handle, ctypes.byref(frame), ctypes.byref(reason)
        )
        check_status(status, f"SCQ1 frame on a {grid[0]}x{grid[1]} grid")
        if reason.value:
            raise Scq1Error(Scq1Reason(reason.value))
        return found, bool(state[0])

    def pack(
        self,
        codes: Scq1Codes,
        grid: tuple[int, int],
        options: Scq1Options,
        reference: Scq1Codes | None = None,
    ) -> Scq1Frame:
        """A key frame, or with a reference a delta frame.

        Raises Scq1Error for codes that the model cannot hold or tables that are missing,
        ShapeError for arrays or options that do not fit.
        """
        now, before = self._checked(codes, grid), self._checked(reference, grid)
        num_latents = grid[0] * grid[1]
        num_tiles = num_latents if options.tile else 1
        out = np.empty(
            _HEADER_BYTES + _BYTES_PER_LATENT * num_latents + _BYTES_PER_TILE * num_tiles, np.uint8
        )
        state, reason = np.zeros(7, np.int32), ctypes.c_int32()
        request = _RequestStruct(
            *_addresses(now),
            *_addresses(before),
            *grid,
            options.width,
            options.height,
            int(options.letterboxed),
            options.tile,
            _ENTROPY[options.entropy],
            (ctypes.c_uint8 * 4)(*options.model_hash),
            out.ctypes.data,
            out.size,
            state.ctypes.data,
        )
        status = self._library.vq_scq1_pack(
            self._handle, ctypes.byref(request), ctypes.byref(reason)
        )
        check_status(status, f"SCQ1 pack on a {grid[0]}x{grid[1]} grid with {options}")
        if reason.value:
            raise Scq1Error(Scq1Reason(reason.value))
        size, base, is_rans, skips, reweights, swaps, news = state.tolist()
        modes = (skips, reweights, swaps, news)
        return Scq1Frame(out[:size].tobytes(), base, bool(is_rans), modes)

    def _empty(self, grid: tuple[int, int]) -> Scq1Codes:
        shape = (grid[0] * grid[1], self.max_support)
        return Scq1Codes(np.empty(shape, np.int64), np.empty(shape, np.int64))

    def _checked(self, codes: Scq1Codes | None, grid: tuple[int, int]) -> Scq1Codes | None:
        if codes is None:
            return None
        shape = (grid[0] * grid[1], self.max_support)
        for array in (codes.indices, codes.numerators):
            if array.shape != shape:
                raise ShapeError(f"codes are {array.shape}, a {grid[0]}x{grid[1]} grid is {shape}")
        return Scq1Codes(_as_longs(codes.indices), _as_longs(codes.numerators))


def _as_longs(array: npt.NDArray[Any]) -> Longs:
    return np.ascontiguousarray(array, np.int64)


def _addresses(codes: Scq1Codes | None) -> tuple[int | None, int | None]:
    if codes is None:
        return None, None
    return codes.indices.ctypes.data, codes.numerators.ctypes.data


def _flat_tables(tables: Scq1Tables, num_codes: int, max_support: int) -> list[Shorts]:
    names = list(_TABLES)
    for size in range(2, max_support + 1):
        names += [f"{name}{size}" for name in _SIZED_TABLES]
    present = [name for name in names if name in tables.frequencies]
    unknown = sorted(set(tables.frequencies) - set(present))
    if unknown:
        raise ShapeError(f"unknown entropy tables: {', '.join(unknown)}")
    for clusters in (tables.base_cluster, tables.other_cluster):
        if clusters.shape != (num_codes,):
            raise ShapeError(f"a cluster map is {clusters.shape}, must be ({num_codes},)")
    flat = [np.ascontiguousarray(tables.frequencies[name], np.uint16).ravel() for name in present]
    return [
        np.ascontiguousarray(tables.base_cluster, np.uint16),
        np.ascontiguousarray(tables.other_cluster, np.uint16),
        np.concatenate(flat),
    ]
