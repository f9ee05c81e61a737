"""Solvers for the SCQ problem: one file per method, chosen by name from one table."""

from __future__ import annotations

from scq.solver import exact, oracle
from scq.solver.base import Solver, SolverConfig, SolveResult, kkt_residual

SOLVERS: dict[str, Solver] = {"exact": exact.solve, "cvxpy": oracle.solve}

__all__ = ["SOLVERS", "SolveResult", "Solver", "SolverConfig", "kkt_residual"]
