"""The slow, careful active set for a single latent that the batched solver gave up on.

Numpy, dense, one code in at a time, least squares instead of Cholesky, so that dependent
codes and rounding cannot stop it. Must not be used for more than stray latents.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scq.solver.problem import Problem

Array = NDArray[np.float64]


class _Task(NamedTuple):
    """One latent's problem over codes (K, F): minimise |z - C^T p|^2 + lam |p|^2 - 2 bonus p_j."""

    codes: Array
    latent: Array
    lam: float
    bonus: float
    nearest: int

    def gradient(self, weights: Array) -> Array:
        used = np.flatnonzero(weights)
        error = weights[used] @ self.codes[used] - self.latent
        gradient: Array = self.codes @ error + self.lam * weights
        gradient[self.nearest] -= self.bonus
        return gradient

    def objective(self, weights: Array) -> float:
        used = np.flatnonzero(weights)
        error = weights[used] @ self.codes[used] - self.latent
        pull = 0.5 * self.lam * float(weights @ weights) - self.bonus * weights[self.nearest]
        return float(0.5 * (error @ error) + pull)


def solve_one(problem: Problem, latent: Tensor, nearest: int, threshold: float) -> Tensor:
    """The weights (K,) float64 of one latent (F,), from the vertex of its nearest code.

    Ends when no code's gradient lies more than `threshold` under the support's, or when a
    step no longer lowers the objective, i.e. at the precision of float64.
    """
    codes, point = problem.codes.cpu().numpy(), latent.cpu().numpy()
    task = _Task(codes, point, problem.diagonal, problem.bonus, nearest)
    return torch.from_numpy(_descend(task, threshold)).to(latent.device)


def _descend(task: _Task, threshold: float) -> Array:
    weights = np.zeros(len(task.codes))
    weights[task.nearest] = 1.0
    best = task.objective(weights)
    while True:
        gradient = task.gradient(weights)
        entering = int(np.argmin(np.where(weights > 0, np.inf, gradient)))
        if weights.all() or gradient[entering] >= weights @ gradient - threshold:
            return weights
        moved = _settle(task, weights, entering)
        value = task.objective(moved)
        if not value < best:
            return weights
        weights, best = moved, value


def _settle(task: _Task, weights: Array, entering: int) -> Array:
    """Optimum over a subset of the support plus `entering`; each pass drops a weight or ends."""
    weights = weights.copy()
    support = np.append(np.flatnonzero(weights), entering)
    while True:
        target = _equality_solution(task, support)
        current = weights[support]
        if (target > 0).all():
            weights[support] = target
            return weights
        blocking = target <= 0
        room = np.full(len(support), np.inf)
        room[blocking] = current[blocking] / np.maximum(current - target, 1e-300)[blocking]
        moved = np.maximum(current + room.min() * (target - current), 0.0)
        keep = room > room.min()
        weights[support] = np.where(keep, moved, 0.0)
        support = support[keep]


def _equality_solution(task: _Task, support: NDArray[np.int64]) -> Array:
    size = len(support)
    codes = task.codes[support]
    bordered = np.ones((size + 1, size + 1))
    bordered[:size, :size] = codes @ codes.T + task.lam * np.eye(size)
    bordered[size, size] = 0.0
    # Relative to one of the codes: the common part of C_S z only moves the multiplier.
    right = np.append((codes - codes[0]) @ task.latent, 1.0)
    right[:size] += task.bonus * (support == task.nearest)
    solution: Array = np.linalg.lstsq(bordered, right, rcond=None)[0]
    return solution[:size]
