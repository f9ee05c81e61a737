"""The lattice search on torch tensors of any device and float dtype; the twin of vqkernels.lattice.

With weights that sum to one, |z - sum w_i c_i|^2 = sum w_i |z - c_i|^2 - sum_(i<j) w_i w_j
|c_i - c_j|^2: states are scored from K distances per latent and a K x K table of separations.
Knows tensors and sizes only; checks and canonical types are in `scq.lattice`.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vqkernels.lattice import LatticeEffort

# Scratch floats of one chunk of latents; 16 MiB stay close to a core and feed a GPU.
_SCRATCH_FLOATS = 1 << 22
_EXTENSIONS = 4


class States(NamedTuple):
    """Best first: errors (N, B), indices and numerators (N, B, s) int64, canonical."""

    errors: Tensor
    indices: Tensor
    numerators: Tensor


class _Supports(NamedTuple):
    """Supports of one size with their best weights: errors (N, B), others (N, B, t)."""

    errors: Tensor
    indices: Tensor
    numerators: Tensor


def search_states(
    latents: Tensor, codebook: Tensor, max_support: int, denominator: int, effort: LatticeEffort
) -> States:
    """The `effort.count` best states of latents (N, F) over a codebook (K, F), any float dtype.

    Half precision is searched in float32. Errors are +inf where fewer states were found.
    """
    dtype = torch.promote_types(latents.dtype, torch.float32)
    latents, codebook = latents.detach().to(dtype), codebook.detach().to(dtype)
    search = _Search(codebook, max_support, denominator, effort)
    width = search.num_heavy * len(codebook) * (1 + denominator // 2)
    chunk = max(1, _SCRATCH_FLOATS // width)
    parts = [search.states(part) for part in torch.split(latents, chunk)] if len(latents) else []
    if not parts:
        empty = torch.empty(0, effort.count, max_support, dtype=torch.int64, device=latents.device)
        return States(latents.new_empty(0, effort.count), empty, empty.clone())
    return States(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


@dataclass(frozen=True)
class Weights:
    """All compositions of n into t parts: numerators (C, t), coefficients (terms, C)."""

    numerators: Tensor
    coefficients: Tensor


class _Search:
    """One codebook, ready to search chunks of latents."""

    def __init__(
        self, codebook: Tensor, max_support: int, denominator: int, effort: LatticeEffort
    ) -> None:
        self.codebook, self.effort = codebook, effort
        self.max_support, self.denominator = max_support, denominator
        self.separation = _separations(codebook)
        self.weights = {
            size: make_weights(denominator, size, codebook) for size in range(2, max_support + 1)
        }
        self.num_heavy = len(codebook) if effort.exact else min(effort.heavy, len(codebook))
        light = torch.arange(1, denominator // 2 + 1, device=codebook.device)
        self.light = light
        self.add = light.to(codebook.dtype) / denominator
        self.keep = 1 - self.add

    def states(self, latents: Tensor) -> States:
        distances = torch.cdist(
            latents, self.codebook, compute_mode="donot_use_mm_for_euclid_dist"
        ).square()
        best, beam = self._singles(distances), None
        if self.max_support > 1:
            heavy = self._nearest(distances, self.num_heavy)
            errors = self._pair_errors(distances, heavy)
            best = self._keep_best(best, self._pairs(errors, heavy, self.effort.count))
            if self.max_support > 2:
                beam = self._pair_beam(errors, heavy)
        for size in range(3, self.max_support + 1):
            assert beam is not None
            found, beam = self._grow(distances, beam, size)
            best = self._keep_best(best, found)
        return best

    def _nearest(self, distances: Tensor, count: int) -> Tensor:
        count = min(count, distances.shape[1])
        return distances.sort(dim=1, stable=True).indices[:, :count]

    def _singles(self, distances: Tensor) -> States:
        order = self._nearest(distances, self.effort.count)
        indices = order.unsqueeze(2).expand(-1, -1, self.max_support)
        numerators = torch.zeros_like(indices)
        numerators[:, :, 0] = self.denominator
        return self._keep_best(None, States(distances.gather(1, order), indices, numerators))

    def _pair_errors(self, distances: Tensor, heavy: Tensor) -> Tensor:
        """(N, W, M, K): heavy code m, light code k with numerator light[w]."""
        keep, add = self.keep[:, None, None], self.add[:, None, None]
        rest = distances[:, None, None, :] - keep * self.separation[heavy][:, None]
        errors = keep * distances.gather(1, heavy)[:, None, :, None] + add * rest
        if self.denominator % 2 == 0:
            self._mask_twins(errors, heavy)
        return errors

    def _mask_twins(self, errors: Tensor, heavy: Tensor) -> None:
        """Equal weights: of (i, j) and (j, i), keep the one whose first code is nearer."""
        place = torch.full(
            (len(heavy), errors.shape[3]), heavy.shape[1], device=heavy.device
        ).scatter_(1, heavy, torch.arange(heavy.shape[1], device=heavy.device).expand_as(heavy))
        earlier = place[:, None, :] < torch.arange(heavy.shape[1], device=heavy.device)[:, None]
        errors[:, -1].masked_fill_(earlier, math.inf)

    def _pairs(self, errors: Tensor, heavy: Tensor, count: int) -> States:
        flat = errors.flatten(1)
        values, at = flat.topk(min(count, flat.shape[1]), dim=1, largest=False)
        indices, numerators = self._pair_states(at, heavy, errors.shape)
        return States(values, *canonical_slots(*self._widen(indices, numerators)))

    def _pair_beam(self, errors: Tensor, heavy: Tensor) -> _Supports:
        values, weight = errors.min(dim=1)
        flat = values.flatten(1)
        chosen, at = flat.topk(min(2 * self.effort.beam, flat.shape[1]), dim=1, largest=False)
        pairs = flat.shape[1]
        at = weight.flatten(1).gather(1, at) * pairs + at
        indices, numerators = self._pair_states(at, heavy, errors.shape)
        return self._distinct_supports(_Supports(chosen, indices, numerators))

    def _pair_states(self, at: Tensor, heavy: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
        _, _, rows, columns = shape
        weight, pair = at // (rows * columns), at % (rows * columns)
        first, second = heavy.gather(1, pair // columns), pair % columns
        light = self.light[weight]
        return (
            torch.stack((first, second), dim=2),
            torch.stack((self.denominator - light, light), dim=2),
        )

    def _grow(self, distances: Tensor, beam: _Supports, size: int) -> tuple[States, _Supports]:
        indices = self._extended(distances, beam)
        weights = self.weights[size]
        errors = self._values(distances, indices) @ weights.coefficients
        errors = errors.nan_to_num(nan=math.inf, posinf=math.inf)
        found = self._best_weights(errors, indices, weights)
        values, at = errors.min(dim=2)
        grown = _Supports(values, indices, weights.numerators[at])
        return found, self._distinct_supports(grown)

    def _extended(self, distances: Tensor, beam: _Supports) -> Tensor:
        """(N, B * E, t + 1): every support of the beam with the codes that help it most."""
        shares = beam.numerators.to(distances.dtype) / self.denominator
        point = (shares.unsqueeze(3) * self.separation[beam.indices]).sum(dim=2)
        size = beam.indices.shape[2]
        for a, b in itertools.combinations(range(size), 2):
            between = self.separation[beam.indices[:, :, a], beam.indices[:, :, b]]
            point = point - (shares[:, :, a] * shares[:, :, b] * between).unsqueeze(2)
        errors = torch.full_like(point, math.inf)
        for keep, add in zip(self.keep.tolist(), self.add.tolist(), strict=True):
            rest = distances.unsqueeze(1) - keep * point
            errors = torch.minimum(errors, keep * beam.errors.unsqueeze(2) + add * rest)
        count = min(_EXTENSIONS, errors.shape[2])
        added = errors.nan_to_num(nan=math.inf).topk(count, dim=2, largest=False).indices
        kept = beam.indices.unsqueeze(2).expand(-1, -1, count, -1)
        return torch.cat((kept, added.unsqueeze(3)), dim=3).flatten(1, 2)

    def _values(self, distances: Tensor, indices: Tensor) -> Tensor:
        """(N, B, terms): distances of the codes, then separations of their pairs."""
        size = indices.shape[2]
        terms = [distances.gather(1, indices[:, :, a]) for a in range(size)]
        for b in range(1, size):
            terms += [self.separation[indices[:, :, a], indices[:, :, b]] for a in range(b)]
        return torch.stack(terms, dim=2)

    def _best_weights(self, errors: Tensor, indices: Tensor, weights: Weights) -> States:
        flat = errors.flatten(1)
        # The same support may come from several supports of the beam.
        count = min(self.effort.count * indices.shape[2], flat.shape[1])
        values, at = flat.topk(count, dim=1, largest=False)
        support, weight = at // errors.shape[2], at % errors.shape[2]
        codes = indices.gather(1, support.unsqueeze(2).expand(-1, -1, indices.shape[2]))
        return States(values, *canonical_slots(*self._widen(codes, weights.numerators[weight])))

    def _widen(self, indices: Tensor, numerators: Tensor) -> tuple[Tensor, Tensor]:
        missing = self.max_support - indices.shape[2]
        if missing == 0:
            return indices, numerators
        repeated = indices[:, :, :1].expand(-1, -1, missing)
        zeros = torch.zeros_like(repeated)
        return torch.cat((indices, repeated), dim=2), torch.cat((numerators, zeros), dim=2)

    def _keep_best(self, old: States | None, new: States) -> States:
        """The best distinct states of both, padded to `count` with infinite errors."""
        if old is not None:
            new = States(*(torch.cat(pair, dim=1) for pair in zip(old, new, strict=True)))
        key = torch.cat((new.indices, new.numerators), dim=2)
        errors = new.errors.masked_fill(repeats(key, new.errors), math.inf)
        order = errors.sort(dim=1, stable=True).indices[:, : self.effort.count]
        missing = self.effort.count - order.shape[1]
        errors = torch.nn.functional.pad(errors.gather(1, order), (0, missing), value=math.inf)
        order = torch.nn.functional.pad(order, (0, missing))
        order = torch.where(errors < math.inf, order, order[:, :1])
        wide = order.unsqueeze(2).expand(-1, -1, self.max_support)
        return States(
            errors.clamp_min(0), new.indices.gather(1, wide), new.numerators.gather(1, wide)
        )

    def _distinct_supports(self, supports: _Supports) -> _Supports:
        key = supports.indices.sort(dim=2).values
        errors = supports.errors.masked_fill(repeats(key, supports.errors), math.inf)
        order = errors.sort(dim=1, stable=True).indices[:, : self.effort.beam]
        wide = order.unsqueeze(2).expand(-1, -1, key.shape[2])
        return _Supports(
            errors.gather(1, order),
            supports.indices.gather(1, wide),
            supports.numerators.gather(1, wide),
        )


def _separations(codebook: Tensor) -> Tensor:
    """(K, K) squared distances; -inf on the diagonal and between copies, which never pair."""
    table = torch.cdist(codebook, codebook, compute_mode="donot_use_mm_for_euclid_dist").square()
    return table.masked_fill(table <= 0, -math.inf)


def make_weights(denominator: int, size: int, like: Tensor) -> Weights:
    """All weights of `size` codes, on the device and in the dtype of `like`."""
    parts = [
        (*head, denominator - sum(head))
        for head in itertools.product(range(1, denominator), repeat=size - 1)
        if sum(head) < denominator
    ]
    numerators = torch.tensor(parts, dtype=torch.int64, device=like.device)
    shares = numerators.to(like.dtype) / denominator
    rows = [shares[:, a] for a in range(size)]
    for b in range(1, size):
        rows += [-shares[:, a] * shares[:, b] for a in range(b)]
    return Weights(numerators, torch.stack(rows))


def canonical_slots(indices: Tensor, numerators: Tensor) -> tuple[Tensor, Tensor]:
    """Heaviest code first, ties by lower index; unused slots stay last."""
    used = numerators > 0
    order = torch.where(used, indices, indices.max() + 1).argsort(dim=2, stable=True)
    indices, numerators = indices.gather(2, order), numerators.gather(2, order)
    order = numerators.argsort(dim=2, descending=True, stable=True)
    indices, numerators = indices.gather(2, order), numerators.gather(2, order)
    return torch.where(numerators > 0, indices, indices[:, :, :1]), numerators


def repeats(keys: Tensor, errors: Tensor) -> Tensor:
    """(N, B) bool: an equal key (N, B, t) stands before it, or has a smaller error."""
    equal = (keys.unsqueeze(1) == keys.unsqueeze(2)).all(dim=3)
    place = torch.arange(keys.shape[1], device=keys.device)
    error, other = errors.unsqueeze(2), errors.unsqueeze(1)
    before = (other < error) | ((other == error) & (place[None, :] < place[:, None]))
    return (equal & before).any(dim=2)
