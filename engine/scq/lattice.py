"""Sparse lattice codes: convex combinations of few codes with weights that are multiples of 1/n.

This is what SCQ transmits instead of real weights (ARCHITECTURE decision 2). A latent becomes at
most `max_support` code indices and integer numerators that sum to `denominator`; one code alone
is plain vector quantization. This module knows nothing of bytes, images or networks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from scq.errors import InvalidCodebook, InvalidLatents, UnsupportedOperation

# Scratch floats of the pair search: 16 latents x 256 x 256 pairs stay inside a core's L2 cache,
# where the search took 25 us a latent; 64 latents a chunk took 30 % longer.
_SCRATCH_FLOATS = 1 << 20


@dataclass(frozen=True)
class LatticeCode:
    """The set of transmittable assignments: supports up to `max_support`, weights k/`denominator`.

    Raises:
        InvalidCodebook: a field is not positive, or the support exceeds codes or denominator.
    """

    num_codes: int
    max_support: int = 2
    denominator: int = 4

    def __post_init__(self) -> None:
        for name in ("num_codes", "max_support", "denominator"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise InvalidCodebook(f"{name} must be a positive integer, got {value!r}")
        if self.max_support > min(self.num_codes, self.denominator):
            raise InvalidCodebook(
                f"max_support {self.max_support} exceeds num_codes {self.num_codes} or "
                f"denominator {self.denominator}; no weights are left for the last code"
            )

    @property
    def num_states(self) -> int:
        """Number of distinct assignments: sum over t of C(K, t) C(n-1, t-1)."""
        return sum(
            math.comb(self.num_codes, size) * math.comb(self.denominator - 1, size - 1)
            for size in range(1, self.max_support + 1)
        )

    @property
    def bits_per_latent(self) -> float:
        """log2 of `num_states`: the cost of one latent before packing overhead."""
        return math.log2(self.num_states)


@dataclass(frozen=True)
class LatticeAssignment:
    """Chosen codes of N latents.

    `indices` and `numerators` are (N, max_support) int64. The heaviest code stands in slot 0,
    ties put the lower index first; an unused slot has numerator 0 and repeats slot 0's index.
    Numerators of a row sum to the code's denominator.
    """

    indices: Tensor
    numerators: Tensor

    def __len__(self) -> int:
        return int(self.indices.shape[0])

    @property
    def support_sizes(self) -> Tensor:
        """(N,) int64: how many codes each latent uses."""
        return (self.numerators > 0).sum(dim=1)


def search(latents: Tensor, codebook: Tensor, code: LatticeCode) -> LatticeAssignment:
    """Best assignment of every latent: the exact minimum of the squared error over all states.

    Pairs are scanned through the Gram matrix: with weights a, b (a + b = 1),
    ||z - a c_i - b c_j||^2 - ||z||^2 = (a^2 G_ii - 2a z.c_i) + (b^2 G_jj - 2b z.c_j) + 2ab G_ij,
    a constant (K, K) table plus one row and one column vector per latent. Nothing is screened, so
    nothing can be missed: a mutually distant pair around the latent may beat its neighbours.

    Args:
        latents: (N, F) float32 or float64.
        codebook: (K, F), same dtype, K = `code.num_codes`.

    Raises:
        InvalidLatents, InvalidCodebook: wrong shape, NaN or infinity.
        UnsupportedOperation: `code.max_support` above 2, for which no exact search exists here.
    """
    _check_inputs(latents, codebook, code)
    with torch.no_grad():
        # Weights sum to one, so a common shift changes no error and saves float32 digits.
        center = codebook.mean(dim=0)
        codes = codebook.detach() - center
        gram = codes @ codes.T
        products = (latents.detach() - center) @ codes.T
        best = _nearest_single(gram, products, code)
        if code.max_support == 2:
            for light in range(1, code.denominator // 2 + 1):
                best = _improve_with_pairs(best, gram, products, light, code.denominator)
    return LatticeAssignment(best.indices, best.numerators)


def reconstruct(assignment: LatticeAssignment, codebook: Tensor) -> Tensor:
    """Convex combinations (N, F) of the codebook's rows; differentiable in `codebook` (K, F)."""
    denominators = assignment.numerators.sum(dim=1, keepdim=True)
    weights = assignment.numerators.to(codebook.dtype) / denominators.to(codebook.dtype)
    return (weights.unsqueeze(-1) * codebook[assignment.indices]).sum(dim=1)


@dataclass(frozen=True)
class _Candidate:
    """Best states so far and their squared errors less ||z||^2."""

    errors: Tensor
    indices: Tensor
    numerators: Tensor


def _nearest_single(gram: Tensor, products: Tensor, code: LatticeCode) -> _Candidate:
    errors, index = (gram.diagonal() - 2 * products).min(dim=1)
    indices = index.unsqueeze(1).repeat(1, code.max_support)
    numerators = torch.zeros_like(indices)
    numerators[:, 0] = code.denominator
    return _Candidate(errors, indices, numerators)


def _improve_with_pairs(
    best: _Candidate, gram: Tensor, products: Tensor, light: int, denominator: int
) -> _Candidate:
    """Replace states that a pair with numerators (denominator - light, light) beats strictly."""
    heavy_weight, light_weight = 1 - light / denominator, light / denominator
    diagonal = gram.diagonal()
    heavy_cost = heavy_weight**2 * diagonal - 2 * heavy_weight * products
    light_cost = light_weight**2 * diagonal - 2 * light_weight * products
    coupling = 2 * heavy_weight * light_weight * gram
    coupling.fill_diagonal_(math.inf)
    errors, pairs = _min_plus(heavy_cost, light_cost, coupling)
    if 2 * light == denominator:
        pairs = pairs.sort(dim=1).values
    better = errors < best.errors
    numerators = torch.tensor([denominator - light, light], device=pairs.device)
    return _Candidate(
        torch.where(better, errors, best.errors),
        torch.where(better.unsqueeze(1), pairs, best.indices),
        torch.where(better.unsqueeze(1), numerators, best.numerators),
    )


def _min_plus(rows: Tensor, columns: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Per latent, min and argmin over (i, j) of rows[i] + columns[j] + table[i, j]."""
    num_codes = table.shape[0]
    chunk = max(1, _SCRATCH_FLOATS // (num_codes * num_codes))
    scratch = table.new_empty(chunk, num_codes, num_codes)
    errors, pairs = [], []
    for start in range(0, rows.shape[0], chunk):
        row, column = rows[start : start + chunk], columns[start : start + chunk]
        sums = torch.add(table, column.unsqueeze(1), out=scratch[: row.shape[0]])
        best, first = (sums.amin(dim=2) + row).min(dim=1)
        # Recomputing one row is cheaper than tracking the argmin through the whole reduction.
        second = (table[first] + column).argmin(dim=1)
        errors.append(best)
        pairs.append(torch.stack((first, second), dim=1))
    if not errors:
        return rows.new_empty(0), torch.empty(0, 2, dtype=torch.int64, device=rows.device)
    return torch.cat(errors), torch.cat(pairs)


def _check_inputs(latents: Tensor, codebook: Tensor, code: LatticeCode) -> None:
    if code.max_support > 2:
        raise UnsupportedOperation(
            f"lattice search covers supports of 1 and 2 codes, got max_support {code.max_support}"
        )
    if codebook.ndim != 2 or codebook.shape[0] != code.num_codes:
        raise InvalidCodebook(
            f"codebook must be ({code.num_codes}, F), got {tuple(codebook.shape)}"
        )
    if latents.ndim != 2 or latents.shape[1] != codebook.shape[1]:
        raise InvalidLatents(
            f"latents must be (N, {codebook.shape[1]}), got {tuple(latents.shape)}"
        )
    if latents.dtype != codebook.dtype:
        raise InvalidLatents(f"latents are {latents.dtype}, the codebook is {codebook.dtype}")
    if not bool(torch.isfinite(codebook).all()):
        raise InvalidCodebook("codebook holds NaN or infinity")
    if not bool(torch.isfinite(latents).all()):
        raise InvalidLatents("latents hold NaN or infinity; check the image or the encoder")
