"""From a dense assignment to a `SolveResult`: for the methods that do not work on supports."""

from __future__ import annotations

import torch
from torch import Tensor

from scq.solver.assignment import from_dense
from scq.solver.base import SolverConfig, SolveResult, kkt_residual

# Rows certified at a time are at most this many numbers: 128 MiB of float64.
CERTIFIED_NUMBERS = 1 << 24
# Weights a conic solver leaves on codes that are not in the support.
NOISE = 1e-7


def result_from_dense(
    latents: Tensor, codebook: Tensor, assignment: Tensor, config: SolverConfig, passes: int
) -> SolveResult:
    """Judge (N, K) weights, differentiable or not, and wrap them up; `passes` = iterations."""
    rounded = assignment.to(latents.dtype)
    size = (assignment.detach() > NOISE).sum(1)
    return SolveResult(
        quantized=rounded @ codebook,
        sparse=from_dense(rounded),
        support_size=size,
        iterations=torch.full_like(size, passes),
        kkt_residual=_residual(latents.detach(), codebook.detach(), assignment.detach(), config),
        fallback_count=0,
    )


def _residual(
    latents: Tensor, codebook: Tensor, assignment: Tensor, config: SolverConfig
) -> Tensor:
    rows = max(1, CERTIFIED_NUMBERS // len(codebook))
    centre = codebook.double().mean(0)
    codes = codebook.double() - centre
    parts = [
        kkt_residual(
            part.double() - centre, codes, weights.double(), config.lam, objective=config.objective
        )
        for part, weights in zip(
            torch.split(latents, rows), torch.split(assignment, rows), strict=True
        )
    ]
    return torch.cat(parts)
