"""The shared data of one solve and the small linear systems on supports: batched, float64.

Must not know in which order supports change, nor how codes are searched.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from scq.solver.base import SolverConfig

# Keeps the small systems definite at lam = 0; relative to the largest squared code norm.
RIDGE = 1e-11
# Up to here C C^T (32 MiB) is made once and looked up; beyond, each system makes its own part.
SHARED_GRAM_CODES = 2048
# Doubles in the small systems solved at once: 32 MiB.
SYSTEM_BUDGET = 1 << 22


class Problem(NamedTuple):
    """Shared data in float64, moved so that the mean of the codes is the origin.

    codebook (K + 1, F) ends with a row of zeros, the pad code that fills unused support slots.
    gram (K + 1, K + 1), or None for many codes, is C C^T + max(lam, ridge) I + tau 1 1^T with zeros
    for the pad: on the simplex the tau term is a constant, but it makes any affinely independent
    support positive definite without help from lam. tau is the largest squared code norm.
    """

    codebook: Tensor
    gram: Tensor | None
    lam: float
    bonus: float
    tau: float

    @property
    def pad(self) -> int:
        return self.codebook.shape[0] - 1

    @property
    def codes(self) -> Tensor:
        return self.codebook[:-1]

    @property
    def diagonal(self) -> float:
        return max(self.lam, RIDGE * self.tau)


class Supports(NamedTuple):
    """Padded supports: the first size[i] slots of row i name codes, the rest the pad, weight 0."""

    indices: Tensor
    weights: Tensor
    size: Tensor

    def take(self, rows: Tensor) -> Supports:
        size = self.size[rows]
        width = int(size.max()) if size.numel() else 0
        return Supports(self.indices[rows, :width], self.weights[rows, :width], size)


def prepare(codebook: Tensor, config: SolverConfig) -> tuple[Problem, Tensor]:
    """The problem of a (K, F) codebook, and the origin (F,) that latents must be moved to."""
    codes = codebook.detach().double()
    centre = codes.mean(0)
    codes = codes - centre
    tau = float(codes.square().sum(1).amax()) or 1.0
    padded = torch.nn.functional.pad(codes, (0, 0, 0, 1))
    problem = Problem(padded, None, config.lam, config.bonus, tau)
    if len(codes) > SHARED_GRAM_CODES:
        return problem, centre
    gram = codes @ codes.T + tau
    gram.diagonal().add_(problem.diagonal)
    return problem._replace(gram=torch.nn.functional.pad(gram, (0, 1, 0, 1))), centre


def combine(weights: Tensor, codes: Tensor) -> Tensor:
    """(n, W), (n, W, F) -> (n, F) weighted sums."""
    return torch.bmm(weights[:, None], codes).squeeze(1)


def project(codes: Tensor, vectors: Tensor) -> Tensor:
    """(n, W, F), (n, F) -> (n, W) inner products."""
    return torch.bmm(codes, vectors[:, :, None]).squeeze(2)


def linear_term(problem: Problem, indices: Tensor, latents: Tensor, nearest: Tensor) -> Tensor:
    """(n, W) b = C_S z + bonus e_j on the support, 0 in pad slots."""
    linear = project(problem.codebook[indices], latents)
    # .double(): a float times a bool tensor would be rounded to float32.
    return linear + problem.bonus * (indices == nearest[:, None]).double()


def solve_bordered(problem: Problem, indices: Tensor, linear: Tensor, total: float) -> Tensor:
    """Solve A q + nu 1 = linear, 1^T q = total on every support: q (n, W).

    Pad slots get an identity row, so they come out as exact zeros. A common part of `linear`
    only moves nu; it is removed first because for latents far away it dwarfs the differences.
    Rows whose system is not positive definite to float64 come out as NaN.
    """
    used = (indices != problem.pad).double()
    linear = (linear - linear.sum(1, keepdim=True) / used.sum(1, keepdim=True)) * used
    rows = max(1, SYSTEM_BUDGET // max(1, indices.shape[1] ** 2))
    fields = (torch.split(field, rows) for field in (indices, linear, used))
    return torch.cat([_solve_part(problem, part, total) for part in zip(*fields, strict=True)])


def _solve_part(problem: Problem, part: tuple[Tensor, ...], total: float) -> Tensor:
    indices, linear, used = part
    system = _systems(problem, indices, used)
    system.diagonal(dim1=1, dim2=2).add_(1 - used)
    factor, failed = torch.linalg.cholesky_ex(system)
    both = torch.cholesky_solve(torch.stack((linear, used), 2), factor)
    free, ones = both.unbind(2)
    nu = (free.sum(1) - total) / ones.sum(1)
    return (free - nu[:, None] * ones).masked_fill(failed[:, None] != 0, torch.nan)


def _systems(problem: Problem, indices: Tensor, used: Tensor) -> Tensor:
    if problem.gram is not None:
        return problem.gram.take((indices * len(problem.gram))[:, :, None] + indices[:, None])
    codes = problem.codebook[indices]
    system = torch.bmm(codes, codes.mT) + problem.tau * (used[:, :, None] * used[:, None])
    system.diagonal(dim1=1, dim2=2).add_(problem.diagonal * used)
    return system
