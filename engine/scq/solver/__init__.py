"""Solvers for the SCQ problem: one file per method, chosen by name from one table."""

from __future__ import annotations

from torch import Tensor

from scq.errors import InvalidCodebook
from scq.solver import automatic, exact, native, oracle, relaxed
from scq.solver.assignment import SparseAssignment
from scq.solver.base import Objective, Solver, SolverConfig, SolveResult, kkt_residual

SOLVERS: dict[str, Solver] = {
    "auto": automatic.solve,
    "exact": exact.solve,
    "native": native.solve,
    "relaxed": relaxed.solve,
    "cvxpy": oracle.solve,
}


def get_solver(name: str) -> Solver:
    """The solver of that name. Raises InvalidCodebook with the names that exist."""
    if name in SOLVERS:
        return SOLVERS[name]
    remedy = f"available: {sorted(SOLVERS)}"
    if name == "qpth":
        # qpth 0.0.18, the newest, pins numpy below 2; cvxpy, diffcp and this package need 2.
        remedy = "qpth needs numpy < 2 and cannot be installed beside this package; use 'cvxpy'"
    raise InvalidCodebook(f"unknown solver {name!r}; {remedy}")


def solve(
    latents: Tensor,
    codebook: Tensor,
    config: SolverConfig | None = None,
    *,
    solver: str = "auto",
    initial: Tensor | None = None,
) -> SolveResult:
    """Solve (N, F) latents over a (K, F) codebook, both float32 or both float64.

    initial (N, W) int64: supports to start from, see `base.Solver`.
    Raises InvalidLatents, InvalidCodebook, or UnsupportedOperation where the solver cannot run.
    """
    return get_solver(solver)(latents, codebook, config or SolverConfig(), initial)


__all__ = [
    "SOLVERS",
    "Objective",
    "SolveResult",
    "Solver",
    "SolverConfig",
    "SparseAssignment",
    "get_solver",
    "kkt_residual",
    "solve",
]
