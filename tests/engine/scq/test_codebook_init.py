"""The starting codebook: every code is used and pairs code better than k-means alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from scq.codebook_init import kmeans, refine
from scq.errors import InvalidLatents
from scq.lattice import LatticeCode, reconstruct, search

CODE = LatticeCode(24)


def clustered_latents() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(24, 6, generator=generator) * 3
    picks = torch.randint(24, (2000,), generator=generator)
    return centers[picks] + torch.randn(2000, 6, generator=generator)


def coded_error(latents: Tensor, codebook: Tensor) -> float:
    points = reconstruct(search(latents, codebook, CODE), codebook)
    return float((points - latents).square().mean())


def test_kmeans_uses_every_code_and_repeats() -> None:
    latents = clustered_latents()
    first, second = (kmeans(latents, 24, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, second)
    assert len(set(torch.cdist(latents, first).argmin(dim=1).tolist())) == 24


def test_least_squares_rounds_cut_the_coded_error() -> None:
    latents = clustered_latents()
    codebook = kmeans(latents, 24, torch.Generator().manual_seed(1))
    refined = refine(latents, codebook, CODE)
    assert coded_error(latents, refined) < 0.9 * coded_error(latents, codebook)


def test_refining_never_returns_a_worse_codebook() -> None:
    latents = clustered_latents()
    codebook = kmeans(latents, 24, torch.Generator().manual_seed(2))
    again = refine(latents, refine(latents, codebook, CODE), CODE, rounds=1)
    assert coded_error(latents, again) <= coded_error(latents, codebook)


def test_too_few_latents_are_refused() -> None:
    with pytest.raises(InvalidLatents, match="3 latents cannot seed 24 codes"):
        kmeans(torch.zeros(3, 6), 24, torch.Generator())
