"""The paper's scalable relaxation: a ridge solve without constraints, then the simplex.

1. minimise |z - C^T p|^2 + lam |p - e_j|^2 over all real p. With G = C^T C + lam I (F x F) the
   minimiser is p = e_j + C G^-1 (z - c_j), Woodbury's form without its division by lam; for
   objective "ridge" it is p = C G^-1 z.
2. Bring every row to the simplex: "sweeps" of clipping at 0 and shifting the sum back to 1, the
   paper's choice as far as it is known (the number of sweeps is not; 20 here), or "sort", the
   Euclidean projection. Sweeps end on the shift and leave weights slightly below 0.

Not a minimiser of the SCQ problem: its certificate says by how much it misses. Autograd goes
through both steps. Costs N * K numbers. Must not be taken for `exact`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scq.errors import UnsupportedOperation
from scq.solver.base import SolverConfig, SolveResult, check_problem, nearest_code
from scq.solver.dense import result_from_dense


def solve(
    latents: Tensor, codebook: Tensor, config: SolverConfig, initial: Tensor | None = None
) -> SolveResult:
    """Same contract as `exact.solve`, but approximate, not scale-free, and blind to `initial`.

    Raises UnsupportedOperation for lam = 0, where the ridge solve has no unique answer.
    """
    check_problem(latents, codebook, initial)
    if config.lam == 0:
        raise UnsupportedOperation("solver 'relaxed' needs lam > 0; use 'exact' for lam = 0")
    free = ridge_weights(latents, codebook, config)
    if config.projection == "sort":
        assignment = project_by_sorting(free)
    else:
        assignment = project_by_sweeps(free, config.sweeps)
    passes = config.sweeps if config.projection == "sweeps" else 1
    return result_from_dense(latents, codebook, assignment, config, passes)


def ridge_weights(latents: Tensor, codebook: Tensor, config: SolverConfig) -> Tensor:
    """(N, K) minimisers of the objective without the simplex; the one-hot is a constant."""
    gram = codebook.T @ codebook
    gram = gram + config.lam * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    nearest = nearest_code(latents.detach(), codebook.detach())
    start = codebook[nearest] if config.bonus else torch.zeros_like(latents)
    weights: Tensor = torch.linalg.solve(gram, (latents - start).T).T @ codebook.T
    if not config.bonus:
        return weights
    return weights.scatter_add(1, nearest[:, None], torch.ones_like(weights[:, :1]))


def project_by_sweeps(weights: Tensor, sweeps: int) -> Tensor:
    """Alternate max(p, 0) with the shift onto sum 1; near the simplex, not the nearest point."""
    for _ in range(sweeps):
        weights = weights.clamp(min=0)
        weights = weights + (1 - weights.sum(1, keepdim=True)) / weights.shape[1]
    return weights


def project_by_sorting(weights: Tensor) -> Tensor:
    """The Euclidean projection of each row onto the simplex (Held, Wolfe and Crowder, 1974)."""
    ordered = weights.sort(1, descending=True).values
    counts = torch.arange(1, weights.shape[1] + 1, dtype=weights.dtype, device=weights.device)
    excess = (ordered.cumsum(1) - 1) / counts
    last = (ordered > excess).sum(1, keepdim=True) - 1
    return (weights - excess.gather(1, last)).clamp(min=0)
