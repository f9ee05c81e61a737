"""Symbols chosen by error plus weighted bits under static tables, instead of by error alone.

A candidate's bits are those of the tables that code it; tables and choices are fitted to each
other in a few rounds on training latents. Works for quantizers that have several good answers per
latent to choose from: sparse convex codes and residual stages.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scq.lattice import LatticeAssignment, search_candidates
from scq.quantizers import Quantizer, SymbolTables
from scq.quantizers.rvq import ResidualQuantizer
from scq.quantizers.scq_sparse import SparseConvexQuantizer

_CANDIDATES = 16
_ROUNDS = 3
_CHUNK = 2048


def can_choose(quantizer: Quantizer) -> bool:
    """Whether the quantizer offers candidates."""
    return isinstance(quantizer, (SparseConvexQuantizer, ResidualQuantizer))


@torch.no_grad()
def fit_choice(quantizer: Quantizer, latents: Tensor, weight: float) -> SymbolTables:
    """Tables for choices at `weight` (squared latent error that a bit is worth)."""
    symbols, errors = propose(quantizer, latents)
    tables = quantizer.fit_tables(symbols[:, 0])
    for _ in range(_ROUNDS):
        tables = quantizer.fit_tables(_choose(quantizer, symbols, errors, (tables, weight)))
    return tables


@torch.no_grad()
def encode_with_rate(
    quantizer: Quantizer, latents: Tensor, tables: SymbolTables, weight: float
) -> Tensor:
    """(N, F) -> (N, S) symbols of least error + weight * bits among the nearest candidates."""
    symbols, errors = propose(quantizer, latents)
    return _choose(quantizer, symbols, errors, (tables, weight))


def propose(quantizer: Quantizer, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Candidate symbols (N, B, S), nearest first, and squared errors (N, B) of each latent."""
    method = _convex if isinstance(quantizer, SparseConvexQuantizer) else _residual
    parts = [method(quantizer, chunk) for chunk in torch.split(latents, _CHUNK)]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def _choose(
    quantizer: Quantizer, symbols: Tensor, errors: Tensor, price: tuple[SymbolTables, float]
) -> Tensor:
    tables, weight = price
    bits = quantizer.bits(symbols.flatten(0, 1), tables).reshape(errors.shape)
    best = (errors + weight * bits).argmin(dim=1)
    return symbols[torch.arange(len(symbols)), best]


def _convex(quantizer: Quantizer, latents: Tensor) -> tuple[Tensor, Tensor]:
    assert isinstance(quantizer, SparseConvexQuantizer)
    count = min(_CANDIDATES, quantizer.code.num_states)
    found = search_candidates(latents, quantizer.codebook.detach(), quantizer.code, count)
    flat = LatticeAssignment(found.indices.flatten(0, 1), found.numerators.flatten(0, 1))
    symbols = quantizer._symbols(flat).reshape(*found.errors.shape, -1)
    return symbols, found.errors


def _residual(quantizer: Quantizer, latents: Tensor) -> tuple[Tensor, Tensor]:
    """A beam over the stages: the best sums, not only the best one."""
    assert isinstance(quantizer, ResidualQuantizer)
    residuals = latents.unsqueeze(1)
    paths = torch.zeros(len(latents), 1, 0, dtype=torch.int64)
    rows = torch.arange(len(latents)).unsqueeze(1)
    for codebook in quantizer.codebooks:
        scores = codebook.square().sum(dim=1) - 2 * residuals @ codebook.T
        scores = (scores + residuals.square().sum(dim=2, keepdim=True)).flatten(1)
        count = min(_CANDIDATES, scores.shape[1])
        errors, chosen = scores.topk(count, dim=1, largest=False)
        parents, codes = chosen // len(codebook), chosen % len(codebook)
        paths = torch.cat([paths[rows, parents], codes.unsqueeze(2)], dim=2)
        residuals = residuals[rows, parents] - codebook[codes]
    return paths, errors
