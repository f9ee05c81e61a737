"""Native search of sparse convex codes: the best few codes and k/n weights of every latent.

Checks arrays by name, then makes one native call with the GIL released, on the calling thread.
Knows numpy only and nothing of models; `scq.lattice` holds the torch version beside it.
"""

from __future__ import annotations

import ctypes
import weakref
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from vqkernels.errors import DtypeError, ShapeError
from vqkernels.loader import check_status, load_library

MAX_CODES: Final = 65536
MAX_SUPPORT: Final = 4
MAX_DENOMINATOR: Final = 16
MAX_STATES: Final = 256

Floats = npt.NDArray[np.float32]
Longs = npt.NDArray[np.int64]


class LatticeJobStruct(ctypes.Structure):
    """``vq_lattice_job`` of vqkernels.h."""

    _fields_ = (
        ("latents", ctypes.c_void_p),
        ("codebook", ctypes.c_void_p),
        ("num_latents", ctypes.c_int32),
        ("num_features", ctypes.c_int32),
        ("num_codes", ctypes.c_int32),
        ("max_support", ctypes.c_int32),
        ("denominator", ctypes.c_int32),
        ("heavy", ctypes.c_int32),
        ("beam", ctypes.c_int32),
        ("count", ctypes.c_int32),
        ("exact", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("errors", ctypes.c_void_p),
        ("indices", ctypes.c_void_p),
        ("numerators", ctypes.c_void_p),
    )


@dataclass(frozen=True)
class LatticeEffort:
    """How hard to search and how many states to return.

    heavy: pairs of equal weights are scanned for this many nearest codes, other pairs for fewer:
    half as many at a weight of 5/8, 1/8 at 3/4, 1/32 at 7/8. exact: scan all pairs. beam: supports
    kept while growing to 3 and 4 codes. count: states returned per latent, 1..256.
    """

    heavy: int = 256
    beam: int = 8
    count: int = 1
    exact: bool = False


@dataclass(frozen=True, eq=False)
class LatticeStates:
    """The `count` best states of every latent, best first.

    errors: (N, B) float32 squared distances, +inf where fewer than B states were found. indices,
    numerators: (N, B, s) int64, heaviest code first, ties by lower index; unused slots have
    numerator 0 and repeat slot 0's index.
    """

    errors: Floats
    indices: Longs
    numerators: Longs


def lattice_search(
    latents: Floats,
    codebook: Floats,
    max_support: int,
    denominator: int,
    effort: LatticeEffort | None = None,
) -> LatticeStates:
    """The best states of latents (N, F) over a codebook (K, F); see ``vq_lattice_search``.

    Every tier gives the same bits.

    Raises:
        ShapeError, DtypeError: the arrays do not fit together, or a size is out of range.
        NonFiniteError: latents or codebook hold NaN or infinity.
        NativeUnavailableError: there is no native library.
    """
    effort = effort or LatticeEffort()
    _check_matrix("codebook", codebook)
    codebook = np.ascontiguousarray(codebook)
    call = _Call(latents, codebook.shape, max_support, denominator, effort)
    call.job.codebook = codebook.ctypes.data
    call.finish(load_library().vq_lattice_search(ctypes.byref(call.job)))
    return call.states


class PreparedCodebook:
    """A codebook (K, F) ready for many searches with one denominator; it keeps a copy.

    Searches give the bits of `lattice_search` and save what that makes of the codes every time:
    a table of 6 K^2 bytes, for up to 4096 codes. Threads may share it. Raises as `lattice_search`.
    """

    def __init__(self, codebook: Floats, denominator: int) -> None:
        _check_matrix("codebook", codebook)
        codebook = np.ascontiguousarray(codebook)
        self._shape, self._denominator = codebook.shape, denominator
        self._library = load_library()
        handle = ctypes.c_void_p()
        status = self._library.vq_lattice_open(
            codebook.ctypes.data, *codebook.shape, denominator, ctypes.byref(handle)
        )
        if status:
            check_status(status, f"lattice codebook {codebook.shape}, denominator {denominator}")
        self._handle = handle
        weakref.finalize(self, self._library.vq_lattice_close, handle)

    def search(
        self, latents: Floats, max_support: int, effort: LatticeEffort | None = None
    ) -> LatticeStates:
        """As `lattice_search` of latents (N, F)."""
        call = _Call(
            latents, self._shape, max_support, self._denominator, effort or LatticeEffort()
        )
        call.finish(self._library.vq_lattice_search_in(self._handle, ctypes.byref(call.job)))
        return call.states


class _Call:
    """One native call: the job, what it writes to, and the arrays that it points into."""

    def __init__(
        self,
        latents: Floats,
        codebook_shape: tuple[int, ...],
        max_support: int,
        denominator: int,
        effort: LatticeEffort,
    ) -> None:
        _check_matrix("latents", latents)
        if latents.shape[1] != codebook_shape[1]:
            raise ShapeError(f"latents are {latents.shape}, the codebook {codebook_shape}")
        self._latents = np.ascontiguousarray(latents)
        self._title = f"lattice_search of {latents.shape} over {codebook_shape}, {effort}"
        self.states = _empty_states(len(latents), effort.count, max_support)
        self.job = LatticeJobStruct(
            self._latents.ctypes.data,
            None,
            *latents.shape,
            codebook_shape[0],
            max_support,
            denominator,
            min(effort.heavy, MAX_CODES),
            effort.beam,
            effort.count,
            int(effort.exact),
            0,
            self.states.errors.ctypes.data,
            self.states.indices.ctypes.data,
            self.states.numerators.ctypes.data,
        )

    def finish(self, status: int) -> None:
        """Raise the error of a status that is not zero."""
        if status:
            check_status(status, self._title)


def _check_matrix(name: str, array: npt.NDArray[Any]) -> None:
    if array.dtype != np.float32:
        raise DtypeError(f"{name} has dtype {array.dtype}, must be float32")
    if array.ndim != 2:
        raise ShapeError(f"{name} has shape {array.shape}, must have two dimensions")


def _empty_states(num_latents: int, count: int, max_support: int) -> LatticeStates:
    if not (1 <= count <= MAX_STATES and 1 <= max_support <= MAX_SUPPORT):
        raise ShapeError(
            f"count {count} must lie in 1..{MAX_STATES}, max_support {max_support} in "
            f"1..{MAX_SUPPORT}"
        )
    shape = (num_latents, count, max_support)
    return LatticeStates(
        np.empty(shape[:2], np.float32), np.empty(shape, np.int64), np.empty(shape, np.int64)
    )
