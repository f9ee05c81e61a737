"""Weighted k-means of short vectors, the same centroids for the same seed on every run.

Lloyd's algorithm from a k-means++ start (Arthur and Vassilvitskii, 2007), with a weight per vector.
Knows vectors and weights, nothing of layers.
"""

from __future__ import annotations

import torch
from torch import Tensor

VECTORS_PER_CENTROID = 64
MIN_SAMPLES, MAX_SAMPLES = 16_384, 262_144
_BLOCK_SCORES = 1 << 18  # a megabyte, which stays in the cache of a core
_ROUNDS_OF_START = 256


def kmeans(
    vectors: Tensor, weights: Tensor, num_centroids: int, seed: int = 0, num_steps: int = 12
) -> Tensor:
    """Centroids (k, v) float32 that make sum of weight * squared distance small.

    `vectors` are (n, v) float32, `weights` (n,) not negative. Many vectors are thinned out to
    VECTORS_PER_CENTROID for each centroid. A centroid that lost its vectors moves to the vector
    that is served worst.
    """
    generator = torch.Generator().manual_seed(seed)
    vectors, weights = _sample(vectors, weights, num_centroids, generator)
    centroids = _start(vectors, weights, num_centroids, generator)
    for _ in range(num_steps):
        nearest, distances = assign(vectors, centroids)
        centroids = _means(vectors, weights, nearest, distances, centroids)
    return centroids


def assign(vectors: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Index (n,) int64 of the nearest centroid of each vector, and the squared distances (n,)."""
    norms = centroids.square().sum(1)
    step = max(1, _BLOCK_SCORES // len(centroids))
    scores, indices = [], []
    for start in range(0, len(vectors), step):
        block = vectors[start : start + step]
        found = torch.addmm(norms, block, centroids.T, alpha=-2)
        indices.append(lowest(found))
        scores.append(found.gather(1, indices[-1][:, None])[:, 0])
    distances = torch.cat(scores) + vectors.square().sum(1)
    return torch.cat(indices), distances.clamp_(min=0)


def lowest(scores: Tensor) -> Tensor:
    """Column (n,) int64 of the least entry of every row (n, k), the first among equals.

    numpy compares a register at a time where torch goes entry by entry: a tenth of the time.
    """
    if scores.device.type == "cpu":
        return torch.from_numpy(scores.numpy().argmin(1))
    return scores.argmin(1)


def _sample(
    vectors: Tensor, weights: Tensor, num_centroids: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    wanted = min(max(VECTORS_PER_CENTROID * num_centroids, MIN_SAMPLES), MAX_SAMPLES)
    if len(vectors) <= wanted:
        return vectors, weights
    chosen = torch.randperm(len(vectors), generator=generator)[:wanted].sort().values
    chosen = chosen.to(vectors.device)
    return vectors[chosen], weights[chosen]


def _start(
    vectors: Tensor, weights: Tensor, num_centroids: int, generator: torch.Generator
) -> Tensor:
    """Centroids drawn with probability weight * squared distance to those drawn before.

    Large codebooks draw a few at a time; that costs little quality and saves most of the passes.
    """
    per_round = max(1, num_centroids // _ROUNDS_OF_START)
    rows, chosen = vectors.T.contiguous(), [_draw(weights, 1, generator)]
    distances = (rows - rows[:, chosen[0]]).square_().sum(0)
    while len(chosen) < num_centroids:
        count = min(per_round, num_centroids - len(chosen))
        for index in _draw(weights * distances, count, generator)[:, None]:
            chosen.append(index)
            torch.minimum(distances, (rows - rows[:, index]).square_().sum(0), out=distances)
    return vectors[torch.cat(chosen)]


def _draw(odds: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Indices drawn with the given odds; uniformly where all are zero."""
    total = odds.double().cumsum(0)
    if float(total[-1]) <= 0:
        total = torch.arange(1, len(odds) + 1, dtype=torch.float64, device=odds.device)
    points = torch.rand(count, generator=generator, dtype=torch.float64).to(total.device)
    return torch.searchsorted(total, points * total[-1]).clamp_(max=len(odds) - 1)


def _means(
    vectors: Tensor, weights: Tensor, nearest: Tensor, distances: Tensor, old: Tensor
) -> Tensor:
    """Weighted means of the vectors of each centroid."""
    sums = torch.zeros(old.shape, dtype=torch.float64, device=old.device)
    sums.index_add_(0, nearest, (vectors * weights[:, None]).double())
    mass = torch.zeros(len(old), dtype=torch.float64, device=old.device)
    mass.index_add_(0, nearest, weights.double())
    centroids = (sums / mass.clamp(min=1e-300)[:, None]).float()
    empty = (mass <= 0).nonzero()[:, 0]
    if len(empty):
        count = min(len(empty), len(vectors))
        worst = torch.topk(weights * distances, count).indices
        centroids[empty[:count]] = vectors[worst]
        centroids[empty[count:]] = old[empty[count:]]
    return centroids
