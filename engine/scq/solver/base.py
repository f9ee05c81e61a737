"""What every SCQ solver takes and returns, and the certificate that judges them all.

The problem, one latent z at a time (Gautam et al., L4DC 2024, the exact form): with codes c_k,
e_j the one-hot of the code nearest to z, and p on the probability simplex,

    minimise  |z - sum_k p_k c_k|^2 + lam |p - e_j|^2      objective "nearest", the paper's
    minimise  |z - sum_k p_k c_k|^2 + lam |p|^2            objective "ridge"

"ridge" has no pull towards the nearest code: as lam grows it tends to the mean of all codes,
where "nearest" tends to plain vector quantization.

Nothing here knows how a solver works, or about images, grids and bytes.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from scq.errors import InvalidCodebook, InvalidLatents
from scq.solver.assignment import SparseAssignment

DTYPES = (torch.float32, torch.float64)

Objective = Literal["nearest", "ridge"]
Projection = Literal["sweeps", "sort"]


@dataclass(frozen=True)
class SolverConfig:
    """lam: weight of the pull towards the nearest code (or of the ridge), >= 0.

    tolerance: largest accepted KKT residual relative to the gradient's own scale (see
    `gradient_scale`). max_iterations: small linear solves per latent before the fallback.
    objective: "nearest" or "ridge", see the module. projection and sweeps: how the solver
    "relaxed" reaches the simplex. num_threads: of the solver "native"; results do not depend
    on it.
    """

    lam: float = 0.1
    tolerance: float = 1e-9
    max_iterations: int = 200
    objective: Objective = "nearest"
    projection: Projection = "sweeps"
    sweeps: int = 20
    num_threads: int = 1

    def __post_init__(self) -> None:
        if not (math.isfinite(self.lam) and self.lam >= 0):
            raise InvalidCodebook(f"lam is {self.lam}, it must be finite and >= 0")
        if not 0 < self.tolerance < 1:
            raise InvalidCodebook(f"tolerance is {self.tolerance}, it must lie in (0, 1)")
        for name in ("max_iterations", "sweeps", "num_threads"):
            if getattr(self, name) < 1:
                raise InvalidCodebook(f"{name} is {getattr(self, name)}, it must be >= 1")
        for name, choices in (("objective", Objective), ("projection", Projection)):
            if getattr(self, name) not in get_args(choices):
                raise InvalidCodebook(
                    f"{name} is {getattr(self, name)!r}, it must be one of {get_args(choices)}"
                )

    @property
    def bonus(self) -> float:
        """What the nearest code gains in the linear term: lam, or 0 for "ridge"."""
        return self.lam if self.objective == "nearest" else 0.0


@dataclass(frozen=True)
class SolveResult:
    """One solve of N latents over K codes.

    quantized (N, F): the convex combinations, in the latents' dtype, differentiable.
    sparse: the weights in sparse form, differentiable; `assignment` is the same, dense.
    support_size (N,) int64: weights above zero. iterations (N,) int64.
    kkt_residual (N,) float64: the certificate of `kkt_residual`, taken from the float64 solution
    before it is rounded to the latents' dtype. fallback_count: latents the fast path gave up on.
    """

    quantized: Tensor
    sparse: SparseAssignment
    support_size: Tensor
    iterations: Tensor
    kkt_residual: Tensor
    fallback_count: int

    @functools.cached_property
    def assignment(self) -> Tensor:
        """(N, K) rows on the simplex, differentiable. Made on first use: costs N * K numbers."""
        return self.sparse.dense()


class Solver(Protocol):
    """A method for the problem above: data in, `SolveResult` out, no state of its own.

    initial (N, W) int64: codes to start from, e.g. the previous frame's `support()`; negative
    entries are unused slots, a row without codes starts from its nearest code. The answer does
    not depend on it; methods that do not iterate ignore it.
    """

    def __call__(
        self,
        latents: Tensor,
        codebook: Tensor,
        config: SolverConfig,
        initial: Tensor | None = None,
    ) -> SolveResult: ...


def check_problem(latents: Tensor, codebook: Tensor, initial: Tensor | None = None) -> None:
    """Refuse shapes, dtypes and values that no solver can work with.

    Raises InvalidCodebook or InvalidLatents naming the value that is wrong.
    """
    if codebook.ndim != 2 or 0 in codebook.shape:
        raise InvalidCodebook(
            f"codebook has shape {tuple(codebook.shape)}, it must be (num_codes, code_dim)"
        )
    if latents.ndim != 2 or latents.shape[0] == 0 or latents.shape[1] != codebook.shape[1]:
        raise InvalidLatents(
            f"latents have shape {tuple(latents.shape)}, "
            f"they must be (N, {codebook.shape[1]}) with N >= 1"
        )
    if latents.dtype not in DTYPES or latents.dtype != codebook.dtype:
        raise InvalidLatents(
            f"latents are {latents.dtype} and the codebook {codebook.dtype}, "
            "both must be torch.float32 or both torch.float64"
        )
    if latents.device != codebook.device:
        raise InvalidLatents(
            f"latents are on {latents.device} and the codebook on {codebook.device}; "
            "move one of them"
        )
    _check_finite(latents, codebook)
    if initial is not None:
        _check_initial(initial, len(latents), len(codebook))


def _check_finite(latents: Tensor, codebook: Tensor) -> None:
    # Squared norms, so that values whose products would overflow are refused here as well.
    if not bool(torch.isfinite(codebook.detach().double().square().sum())):
        raise InvalidCodebook("the codebook holds NaN, infinite or overflowing values")
    norms = latents.detach().double().square().sum(1)
    bad = (~torch.isfinite(norms)).nonzero()
    if bad.numel():
        raise InvalidLatents(
            f"{bad.shape[0]} of {latents.shape[0]} latents hold NaN, infinite or overflowing "
            f"values, the first is latent {int(bad[0])}"
        )


def _check_initial(initial: Tensor, num_latents: int, num_codes: int) -> None:
    if initial.ndim != 2 or len(initial) != num_latents or initial.dtype != torch.int64:
        raise InvalidLatents(
            f"initial is {initial.dtype} of shape {tuple(initial.shape)}, "
            f"it must be torch.int64 of shape ({num_latents}, W)"
        )
    if initial.numel() and int(initial.max()) >= num_codes:
        raise InvalidLatents(
            f"initial names code {int(initial.max())}, the codebook has {num_codes}; "
            "start without it after a change of codebook"
        )


def nearest_code(latents: Tensor, codebook: Tensor) -> Tensor:
    """(N, F), (K, F) -> (N,) int64, the L2-nearest code, the lower index in a tie."""
    half_distance = 0.5 * codebook.square().sum(1) - latents @ codebook.T
    return half_distance.argmin(1)


def half_gradient(
    latents: Tensor, codebook: Tensor, assignment: Tensor, config: SolverConfig
) -> Tensor:
    """(N, K) gradient of half the objective: -C(z - C^T p) + lam (p - e_j)."""
    gradient = -(latents - assignment @ codebook) @ codebook.T
    if config.lam > 0:
        gradient += config.lam * assignment
    if config.bonus > 0:
        nearest = nearest_code(latents, codebook)[:, None]
        gradient.scatter_add_(1, nearest, gradient.new_full(nearest.shape, -config.bonus))
    return gradient


def kkt_residual(
    latents: Tensor,
    codebook: Tensor,
    assignment: Tensor,
    lam: float,
    *,
    objective: Objective = "nearest",
) -> Tensor:
    """How far each row of `assignment` is from optimal: (N,) in the gradient's units.

    Frank-Wolfe gap of half the objective, p.g - min_k g_k with g the half gradient. It is zero
    exactly at a KKT point, and the objective exceeds its minimum by at most twice this value.
    Infeasible rows add |g|_inf (|1 - sum p| + sum of negative parts). Units: squared latents.
    """
    config = SolverConfig(lam=lam, objective=objective)
    gradient = half_gradient(latents, codebook, assignment, config)
    gap = (assignment * gradient).sum(1) - gradient.amin(1)
    infeasible = (1 - assignment.sum(1)).abs() + assignment.clamp(max=0).sum(1).abs()
    return gap.clamp(min=0) + gradient.abs().amax(1) * infeasible


def gradient_scale(latents: Tensor, codebook: Tensor, lam: float) -> Tensor:
    """(N,) bound on the spread of the half gradient over the simplex: R (|z| + R) + lam.

    R is the largest code norm. Latents and codes should share an origin near the codes' mean.
    """
    radius = codebook.square().sum(1).amax().sqrt()
    return radius * (latents.square().sum(1).sqrt() + radius) + lam
