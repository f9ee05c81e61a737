"""A starting codebook for convex codes: k-means, then alternating search and least squares.

k-means alone puts codes at cluster means, which is right for one code a latent and too far inside
for convex pairs; alternating with the lattice search moves them outwards. Knows only latents.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scq.errors import InvalidLatents
from scq.lattice import LatticeCode, reconstruct, search

_RIDGE = 1e-2


def kmeans(latents: Tensor, num_codes: int, generator: torch.Generator, rounds: int = 15) -> Tensor:
    """Lloyd's algorithm from random latents: (N, F) -> (num_codes, F); empty clusters restart.

    Raises InvalidLatents when there are fewer latents than codes.
    """
    if latents.shape[0] < num_codes:
        raise InvalidLatents(f"{latents.shape[0]} latents cannot seed {num_codes} codes; add data")
    order = torch.randperm(latents.shape[0], generator=generator)
    codebook = latents[order[:num_codes]].clone()
    for _ in range(rounds):
        nearest = torch.cdist(latents, codebook).argmin(dim=1)
        counts = torch.bincount(nearest, minlength=num_codes)
        sums = torch.zeros_like(codebook).index_add_(0, nearest, latents)
        spare = latents[torch.randint(latents.shape[0], (num_codes,), generator=generator)]
        means = sums / counts.clamp(min=1).unsqueeze(1)
        codebook = torch.where((counts > 0).unsqueeze(1), means, spare)
    return codebook


def refine(latents: Tensor, codebook: Tensor, code: LatticeCode, rounds: int = 8) -> Tensor:
    """Alternate lattice search and the least-squares codebook for the weights it found.

    Minimises ||Z - W C||^2 + ridge ||C - C_old||^2 over C (K, F), W the (N, K) lattice weights;
    the ridge leaves unused codes where they were. Returns the round of smallest error, since
    least squares may put a code where the next search no longer uses it.
    """
    best, best_error = codebook, float("inf")
    for _ in range(rounds):
        assignment = search(latents, codebook, code)
        error = float((reconstruct(assignment, codebook) - latents).square().mean())
        if error < best_error:
            best, best_error = codebook, error
        weights = latents.new_zeros(latents.shape[0], code.num_codes)
        weights.scatter_add_(
            1, assignment.indices, assignment.numerators.to(latents.dtype) / code.denominator
        )
        normal = weights.T @ weights
        normal.diagonal().add_(_RIDGE)
        codebook = torch.linalg.solve(normal, weights.T @ latents + _RIDGE * codebook)
    return best
