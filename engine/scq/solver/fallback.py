"""The slow, careful active set for a single latent that the batched solver gave up on.

Numpy, dense, one code in at a time, least squares instead of Cholesky, so that dependent
codes and rounding cannot stop it. Must not be used for more than stray latents.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]


def solve_one(gram: Tensor, linear: Tensor, start: int, threshold: float) -> Tensor:
    """Minimise p.G p / 2 - b.p over the simplex from the vertex `start`: (K,) float64.

    Ends when no code's gradient lies more than `threshold` under the support's, or when a
    step no longer lowers the objective, i.e. at the precision of float64.
    """
    weights = _descend(gram.cpu().numpy(), linear.cpu().numpy(), start, threshold)
    return torch.from_numpy(weights).to(gram.device)


def _descend(gram: Array, linear: Array, start: int, threshold: float) -> Array:
    weights = np.zeros(linear.shape[0])
    weights[start] = 1.0
    best = _objective(gram, linear, weights)
    while True:
        gradient = gram @ weights - linear
        entering = int(np.argmin(np.where(weights > 0, np.inf, gradient)))
        if weights.all() or gradient[entering] >= weights @ gradient - threshold:
            return weights
        moved = _settle(gram, linear, weights, entering)
        value = _objective(gram, linear, moved)
        if not value < best:
            return weights
        weights, best = moved, value


def _objective(gram: Array, linear: Array, weights: Array) -> float:
    return float(weights @ (0.5 * (gram @ weights) - linear))


def _settle(gram: Array, linear: Array, weights: Array, entering: int) -> Array:
    """Optimum over a subset of the support plus `entering`; each pass drops a weight or ends."""
    weights = weights.copy()
    support = np.append(np.flatnonzero(weights), entering)
    while True:
        target = _equality_solution(gram, linear, support)
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


def _equality_solution(gram: Array, linear: Array, support: NDArray[np.int64]) -> Array:
    size = len(support)
    bordered = np.ones((size + 1, size + 1))
    bordered[:size, :size] = gram[np.ix_(support, support)]
    bordered[size, size] = 0.0
    right = np.append(linear[support], 1.0)
    solution: Array = np.linalg.lstsq(bordered, right, rcond=None)[0]
    return solution[:size]
