"""States near a reference: what a delta frame says most cheaply about a latent.

For every latent: the reference's state itself, its codes with other weights, and its state with
one code replaced. Knows tensors and sizes only; checks and canonical types are in `scq.lattice`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from scq.lattice_torch import States, Weights, canonical_slots, make_weights

REWEIGHTS = 4
SWAPS = 4
# Scratch floats of the scan for replacements.
_SCRATCH_FLOATS = 1 << 21


def near_states(
    latents: Tensor, codebook: Tensor, indices: Tensor, numerators: Tensor, denominator: int
) -> States:
    """(N, B) states near the reference's (N, s) indices and numerators, canonical.

    B = 1 + REWEIGHTS + s * SWAPS: the reference first; errors are +inf where there is no such
    state. latents (N, F) and codebook (K, F) share a dtype of at least 32 bits.
    """
    width = indices.shape[1] * denominator * len(codebook)
    chunk = max(1, _SCRATCH_FLOATS // width)
    rows = torch.split(torch.arange(len(latents), device=latents.device), chunk)
    parts = [
        _near_chunk(latents[r], codebook, indices[r], numerators[r], denominator) for r in rows
    ]
    return States(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def _near_chunk(
    latents: Tensor, codebook: Tensor, indices: Tensor, numerators: Tensor, denominator: int
) -> States:
    count = 1 + REWEIGHTS + indices.shape[1] * SWAPS
    shape = (len(latents), count)
    errors = latents.new_full(shape, math.inf)
    all_indices = indices[:, None, :].expand(*shape, -1).clone()
    all_numerators = numerators[:, None, :].expand(*shape, -1).clone()
    sizes = (numerators > 0).sum(dim=1)
    for size in range(1, indices.shape[1] + 1):
        rows = (sizes == size).nonzero()[:, 0]
        if len(rows):
            near = _Near(latents[rows], codebook, indices[rows, :size], denominator)
            found = near.states(numerators[rows, :size])
            width = found.errors.shape[1]
            errors[rows, :width] = found.errors
            all_indices[rows, :width, :size] = found.indices
            all_indices[rows, :width, size:] = found.indices[:, :, :1]
            all_numerators[rows, :width, :size] = found.numerators
    return States(errors, *canonical_slots(all_indices, all_numerators))


class _Near:
    """Latents whose reference has the same number of codes t."""

    def __init__(self, latents: Tensor, codebook: Tensor, codes: Tensor, denominator: int) -> None:
        self.latents, self.codebook, self.codes = latents, codebook, codes
        self.denominator, self.size = denominator, codes.shape[1]
        self.weights = make_weights(denominator, self.size, codebook)

    def states(self, numerators: Tensor) -> States:
        keep = self._errors(self.codes[:, None, :], numerators[:, None, :])
        parts = [States(keep, self.codes[:, None, :], numerators[:, None, :])]
        if self.size > 1:
            parts.append(self._weigh(self.codes[:, None, :], REWEIGHTS))
        parts += [self._swap(slot, numerators) for slot in range(self.size)]
        return States(*(torch.cat(tensors, dim=1) for tensors in zip(*parts, strict=True)))

    def _errors(self, codes: Tensor, numerators: Tensor) -> Tensor:
        """(N, B) errors of codes (N, B, t) with these weights."""
        shares = numerators.to(self.latents.dtype) / self.denominator
        points = (shares.unsqueeze(3) * self.codebook[codes]).sum(dim=2)
        return (self.latents[:, None] - points).square().sum(dim=2)

    def _weigh(self, codes: Tensor, count: int) -> States:
        """The best `count` weights over the supports (N, B, t) together."""
        weights: Weights = self.weights
        shares = weights.numerators.to(self.latents.dtype) / self.denominator
        points = torch.einsum("ct,nbtf->nbcf", shares, self.codebook[codes])
        errors = (self.latents[:, None, None] - points).square().sum(dim=3)
        flat = errors.flatten(1)
        values, at = flat.topk(min(count, flat.shape[1]), dim=1, largest=False)
        support, weight = at // errors.shape[2], at % errors.shape[2]
        chosen = codes.gather(1, support.unsqueeze(2).expand(-1, -1, self.size))
        missing = count - values.shape[1]
        if missing:
            values = torch.nn.functional.pad(values, (0, missing), value=math.inf)
            chosen = torch.cat((chosen, chosen[:, :1].expand(-1, missing, -1)), dim=1)
            weight = torch.nn.functional.pad(weight, (0, missing))
        return States(values, chosen, weights.numerators[weight])

    def _swap(self, slot: int, numerators: Tensor) -> States:
        """Replace the code of one slot by those that suit the others' present proportions best,
        then take the best weights."""
        others = [a for a in range(self.size) if a != slot]
        left = numerators[:, others].to(self.latents.dtype)
        kept = self.codebook[self.codes[:, others]]
        point = (left.unsqueeze(2) * kept).sum(dim=1) / left.sum(dim=1, keepdim=True).clamp_min(1)
        shares = torch.arange(1, self.denominator + 1 - len(others), device=point.device)
        if not others:
            shares = shares[-1:]
        share = shares.to(point.dtype)[None, :, None] / self.denominator
        target = (self.latents[:, None] - (1 - share) * point[:, None]) / share
        distances = torch.cdist(target.flatten(0, 1), self.codebook).square()
        errors = (distances.view(len(point), len(shares), -1) * share.square()).amin(dim=1)
        errors.scatter_(1, self.codes, math.inf)
        count = min(SWAPS, len(self.codebook))
        added = errors.topk(count, dim=1, largest=False).indices
        codes = self.codes[:, None, :].repeat(1, count, 1)
        codes[:, :, slot] = added
        if not others:
            values = self._errors(codes, self.weights.numerators[None].expand(*codes.shape))
            found = States(values, codes, self.weights.numerators[None].expand(*codes.shape))
        else:
            found = self._weigh(codes, SWAPS)
        taken = (found.indices[:, :, slot, None] == self.codes[:, None, :]).any(dim=2)
        return found._replace(errors=found.errors.masked_fill(taken, math.inf))
