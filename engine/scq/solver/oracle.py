"""SCQ through cvxpylayers (diffcp + SCS): slow, independent, for checking the exact solver.

Needs the optional packages cvxpy and cvxpylayers, imported on first use. Must never be on a
serving or training path: tens of milliseconds per latent.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from scq.errors import UnsupportedOperation
from scq.solver.base import SolverConfig, SolveResult, check_problem, nearest_code
from scq.solver.dense import result_from_dense

# mode="dense": diffcp's default lsqr derivative was off by 1-27 % of the gradient's scale.
SOLVER_ARGS: dict[str, Any] = {"eps": 1e-10, "mode": "dense"}


def solve(
    latents: Tensor, codebook: Tensor, config: SolverConfig, initial: Tensor | None = None
) -> SolveResult:
    """Same contract as `exact.solve`; tolerance, iterations and the start are SCS's own.

    Raises UnsupportedOperation when the optional packages are missing.
    """
    check_problem(latents, codebook, initial)
    return solve_with(latents, codebook, config, SOLVER_ARGS)


def solve_with(
    latents: Tensor, codebook: Tensor, config: SolverConfig, solver_args: Mapping[str, Any]
) -> SolveResult:
    """As `solve`, with other arguments for diffcp, e.g. solve_method="Clarabel"."""
    layer = _layer(*codebook.shape, config.lam)
    target = torch.zeros(len(latents), len(codebook), dtype=torch.float64)
    if config.bonus:
        nearest = nearest_code(latents.detach().double(), codebook.detach().double())
        target.scatter_(1, nearest.cpu()[:, None], 1.0)
    parameters = (latents.double().cpu(), codebook.double().cpu(), target)
    (raw,) = layer(*parameters, solver_args=_forward_args(parameters, solver_args))
    return result_from_dense(latents, codebook, raw.to(latents.device), config, 1)


def _forward_args(parameters: tuple[Tensor, ...], solver_args: Mapping[str, Any]) -> dict[str, Any]:
    """Without a gradient to come, diffcp hands every argument to the solver: none of its own."""
    differentiates = torch.is_grad_enabled() and any(p.requires_grad for p in parameters)
    return {key: value for key, value in solver_args.items() if differentiates or key != "mode"}


@functools.lru_cache(maxsize=8)
def _layer(num_codes: int, code_dim: int, lam: float) -> Any:
    # importlib: neither package is typed well enough to be imported under mypy --strict.
    try:
        cp = importlib.import_module("cvxpy")
        layers = importlib.import_module("cvxpylayers.torch")
    except ImportError as missing:
        raise UnsupportedOperation(
            f"solver 'cvxpy' needs the package {missing.name!r}: pip install 'vqstack[oracle]'"
        ) from missing
    assignment = cp.Variable(num_codes, nonneg=True)
    error = cp.Variable(code_dim)
    latent, target = cp.Parameter(code_dim), cp.Parameter(num_codes)
    codebook = cp.Parameter((num_codes, code_dim))
    # The residual as a variable keeps the canonical form small (0.01 s at K=64).
    objective = cp.sum_squares(error) + cp.sum_squares(math.sqrt(lam) * (assignment - target))
    constraints = [error == latent - codebook.T @ assignment, cp.sum(assignment) == 1]
    problem = cp.Problem(cp.Minimize(objective), constraints)
    return layers.CvxpyLayer(problem, parameters=[latent, codebook, target], variables=[assignment])
