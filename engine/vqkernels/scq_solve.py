"""The exact SCQ solver of the native library: supports, weights, certificates, derivatives.

Checks arrays by name, then makes one native call with the GIL released. Knows numpy only and
nothing of models or autograd; `scq.solver.exact` is the torch version beside it.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from vqkernels.errors import DtypeError, ShapeError
from vqkernels.loader import check_status, load_library
from vqkernels.pool import ThreadPool

OBJECTIVES: Final = ("nearest", "ridge")
MAX_FEATURES: Final = 1024
# As in csrc/cpu/scq_solve.cpp: supports beyond this are left unsolved.
_MAX_SUPPORT: Final = 320
_SPARE_SUPPORT: Final = 32

Floats = npt.NDArray[Any]
Doubles = npt.NDArray[np.float64]
Longs = npt.NDArray[np.int64]


class ScqProblemStruct(ctypes.Structure):
    """``vq_scq_problem`` of vqkernels.h."""

    _fields_ = (
        ("latents", ctypes.c_void_p),
        ("codebook", ctypes.c_void_p),
        ("initial", ctypes.c_void_p),
        ("num_latents", ctypes.c_int64),
        ("lam", ctypes.c_double),
        ("tolerance", ctypes.c_double),
        ("num_codes", ctypes.c_int32),
        ("num_features", ctypes.c_int32),
        ("is_double", ctypes.c_int32),
        ("objective", ctypes.c_int32),
        ("max_iterations", ctypes.c_int32),
        ("initial_width", ctypes.c_int32),
    )


class ScqSolutionStruct(ctypes.Structure):
    """``vq_scq_solution`` of vqkernels.h."""

    _fields_ = (
        ("indices", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("sizes", ctypes.c_void_p),
        ("nearest", ctypes.c_void_p),
        ("iterations", ctypes.c_void_p),
        ("kkt_residual", ctypes.c_void_p),
        ("quantized", ctypes.c_void_p),
        ("unsolved", ctypes.c_void_p),
        ("max_support", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    )


class ScqGradientStruct(ctypes.Structure):
    """``vq_scq_gradient`` of vqkernels.h."""

    _fields_ = (
        ("indices", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("sizes", ctypes.c_void_p),
        ("grad_weights", ctypes.c_void_p),
        ("grad_quantized", ctypes.c_void_p),
        ("grad_latents", ctypes.c_void_p),
        ("grad_codebook", ctypes.c_void_p),
        ("max_support", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    )


@dataclass(frozen=True, eq=False)
class ScqProblem:
    """N latents (N, F) over a codebook (K, F), both float32 or both float64, C-contiguous, finite.

    minimise |z - C^T p|^2 + lam |p - e_nearest|^2 ("nearest") or + lam |p|^2 ("ridge") over the
    simplex. tolerance: accepted p.g - min g relative to the gradient's scale. initial: (N, W)
    int64 codes to start from, negative ones are skipped.

    Raises:
        DtypeError, ShapeError: an array or number that the kernel cannot take.
    """

    latents: Floats
    codebook: Floats
    lam: float
    objective: str = "nearest"
    tolerance: float = 1e-9
    max_iterations: int = 200
    initial: Longs | None = None
    _struct: ScqProblemStruct = field(init=False, repr=False)

    def __post_init__(self) -> None:
        _check_pair(self.latents, self.codebook)
        if self.objective not in OBJECTIVES:
            raise ShapeError(f"objective is {self.objective!r}, must be one of {OBJECTIVES}")
        width = 0
        if self.initial is not None:
            width = _check_initial(self.initial, len(self.latents), len(self.codebook))
        struct = ScqProblemStruct(
            self.latents.ctypes.data,
            self.codebook.ctypes.data,
            self.initial.ctypes.data if self.initial is not None and width else None,
            len(self.latents),
            self.lam,
            self.tolerance,
            *self.codebook.shape,
            int(self.latents.dtype == np.float64),
            OBJECTIVES.index(self.objective),
            self.max_iterations,
            width,
        )
        object.__setattr__(self, "_struct", struct)

    @property
    def max_support(self) -> int:
        """Slots per latent that `solve` reserves; larger supports are left unsolved."""
        num_codes, features = (int(size) for size in self.codebook.shape)
        return min(features + _SPARE_SUPPORT, _MAX_SUPPORT, num_codes)


@dataclass(frozen=True, eq=False)
class ScqSolution:
    """Supports of N latents: the first sizes[i] of W slots count, the others are code 0, weight 0.

    indices (N, W) and nearest, sizes, iterations (N,) int64; weights (N, W), quantized (N, F) and
    kkt_residual (N,) float64. unsolved (N,) bool: rows without an answer (a support that grew too
    large or dependent, or too many iterations).
    """

    indices: Longs
    weights: Doubles
    sizes: Longs
    nearest: Longs
    iterations: Longs
    kkt_residual: Doubles
    quantized: Doubles
    unsolved: npt.NDArray[np.bool_]


def solve(problem: ScqProblem, *, pool: ThreadPool | None = None) -> ScqSolution:
    """Solve every latent; the result does not depend on the tier or the number of threads."""
    count, features = problem.latents.shape
    slots = problem.max_support
    solution = ScqSolution(
        indices=np.empty((count, slots), np.int64),
        weights=np.empty((count, slots)),
        sizes=np.empty(count, np.int64),
        nearest=np.empty(count, np.int64),
        iterations=np.empty(count, np.int64),
        kkt_residual=np.empty(count),
        quantized=np.empty((count, features)),
        unsolved=np.empty(count, np.bool_),
    )
    # The fields stand in the order of vq_scq_solution.
    addresses = [array.ctypes.data for array in vars(solution).values()]
    struct = ScqSolutionStruct(*addresses, slots, 0)
    _call("vq_scq_solve", problem, ctypes.byref(struct), pool)
    return solution


@dataclass(frozen=True, eq=False)
class ScqSlopes:
    """What arrives from above: dL/dp on the slots (N, W), dL/dz_q (N, F), float64 or None."""

    weights: Doubles | None
    quantized: Doubles | None


def differentiate(
    problem: ScqProblem,
    solution: ScqSolution,
    slopes: ScqSlopes,
    *,
    pool: ThreadPool | None = None,
) -> tuple[Doubles, Doubles]:
    """dL/dlatents (N, F) and dL/dcodebook (K, F) through the solution, float64.

    Of `solution`, indices, weights and sizes are used. The nearest code is a constant.
    """
    count, slots = solution.indices.shape
    _check_array("slopes.weights", slopes.weights, (count, slots))
    _check_array("slopes.quantized", slopes.quantized, problem.latents.shape)
    _check_array("solution.weights", solution.weights, (count, slots))
    grad_latents = np.empty(problem.latents.shape)
    grad_codebook = np.zeros(problem.codebook.shape)
    struct = ScqGradientStruct(
        solution.indices.ctypes.data,
        solution.weights.ctypes.data,
        solution.sizes.ctypes.data,
        None if slopes.weights is None else slopes.weights.ctypes.data,
        None if slopes.quantized is None else slopes.quantized.ctypes.data,
        grad_latents.ctypes.data,
        grad_codebook.ctypes.data,
        slots,
        0,
    )
    _call("vq_scq_differentiate", problem, ctypes.byref(struct), pool)
    return grad_latents, grad_codebook


def nearest(latents: Floats, codebook: Floats, *, pool: ThreadPool | None = None) -> Longs:
    """(N,) int64, the L2-nearest code of every latent, the lower index in a tie."""
    problem = ScqProblem(latents, codebook, lam=0.0)
    indices = np.empty(len(latents), np.int64)
    _call("vq_scq_nearest", problem, indices.ctypes.data, pool)
    return indices


def _call(name: str, problem: ScqProblem, output: Any, pool: ThreadPool | None) -> None:
    function = getattr(load_library(), name)
    handle = None if pool is None else pool.handle
    status = function(ctypes.byref(problem._struct), output, handle)
    check_status(status, f"{name} of {problem.latents.shape} over {problem.codebook.shape}")


def _check_pair(latents: Floats, codebook: Floats) -> None:
    for name, array in (("latents", latents), ("codebook", codebook)):
        if not isinstance(array, np.ndarray) or array.dtype not in (np.float32, np.float64):
            kind = getattr(array, "dtype", type(array).__name__)
            raise DtypeError(f"{name} is {kind}, must be a float32 or float64 numpy array")
        if array.ndim != 2 or 0 in array.shape or not array.flags.c_contiguous:
            raise ShapeError(f"{name} has shape {array.shape}, must be 2-D and C-contiguous")
    if latents.dtype != codebook.dtype:
        raise DtypeError(f"latents are {latents.dtype}, the codebook is {codebook.dtype}")
    if latents.shape[1] != codebook.shape[1] or latents.shape[1] > MAX_FEATURES:
        raise ShapeError(
            f"latents are {latents.shape} and the codebook {codebook.shape}; "
            f"both need the same number of features, at most {MAX_FEATURES}"
        )


def _check_initial(initial: Longs, count: int, num_codes: int) -> int:
    if initial.dtype != np.int64:
        raise DtypeError(f"initial is {initial.dtype}, must be int64")
    if initial.ndim != 2 or len(initial) != count or not initial.flags.c_contiguous:
        raise ShapeError(f"initial has shape {initial.shape}, must be ({count}, W), C-contiguous")
    if initial.size and int(initial.max()) >= num_codes:
        raise ShapeError(f"initial names code {int(initial.max())} of {num_codes}")
    return int(initial.shape[1])


def _check_array(name: str, array: Doubles | None, shape: tuple[int, ...]) -> None:
    if array is None:
        return
    if array.dtype != np.float64:
        raise DtypeError(f"{name} is {array.dtype}, must be float64")
    if array.shape != shape or not array.flags.c_contiguous:
        raise ShapeError(f"{name} has shape {array.shape}, must be {shape} and C-contiguous")
