"""Exact numbering of what a latent holds beside its heaviest code: RAW enhancement ranks.

Given heaviest index i, the others are t - 1 codes, u of them with lower indices than i. Ranks
run over t = 1..s, within t over u = 0..t - 1, and within (t, u)

    rank = (below * C(K-1-i, t-1-u) + above) * N(t, u) + composition

with below and above the colexicographic ranks of the u lower indices and of the t-1-u higher ones
less i + 1 (colex rank of x_1 < .. < x_m: sum of C(x_j, j)), and composition the number, in
lexicographic order, of the weights (heaviest, lower codes ascending, higher codes ascending)
among the N(t, u) compositions of n whose first part is > the next u and >= the rest. There are
R_i = sum C(i, u) C(K-1-i, t-1-u) N(t, u) ranks.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scq.bitstream.canonical import Latents, sort_slots
from scq.bitstream.weights import check_profile, key, led_compositions, led_numbers
from scq.lattice import LatticeCode
from scq.subsets import binomials, subset_ranks, subsets_of

Ints = NDArray[np.int64]
Case = tuple[int, int]


@dataclass(frozen=True)
class _Numbering:
    """cases: the (t, u) in order. first[i, c]: first rank of case c; the last column is R_i.

    choose[x, m] = C(x, m).
    """

    cases: tuple[Case, ...]
    first: Ints
    choose: Ints


@functools.lru_cache(maxsize=16)
def _numbering(code: LatticeCode) -> _Numbering:
    check_profile(code)
    choose = binomials(code.num_codes, code.max_support)
    cases = tuple((t, u) for t in range(1, code.max_support + 1) for u in range(t))
    below = np.arange(code.num_codes)
    above = below[::-1]
    counts = [
        choose[below, u] * choose[above, t - 1 - u] * len(led_compositions(code.denominator, t, u))
        for t, u in cases
    ]
    first = np.pad(np.stack(counts, 1).cumsum(1), ((0, 0), (1, 0)))
    return _Numbering(cases, first, choose)


def radices(heaviest: Ints, code: LatticeCode) -> Ints:
    """(N,) heaviest indices -> (N,) int64 R_i: how many ranks each latent has."""
    numbers: Ints = _numbering(code).first[heaviest, -1]
    return numbers


def rank_rest(latents: Latents, code: LatticeCode) -> Ints:
    """(N,) int64 ranks in [0, R_i) of canonical latents."""
    numbering = _numbering(code)
    sizes, heaviest = latents.sizes, latents.heaviest
    below = ((latents.indices < heaviest[:, None]) & (latents.numerators > 0)).sum(1)
    ranks = np.empty(len(latents), np.int64)
    for case, (t, u) in enumerate(numbering.cases):
        rows = np.flatnonzero((sizes == t) & (below == u))
        if rows.size:
            within = _rank_case(latents.take(rows), t, u, code)
            ranks[rows] = numbering.first[heaviest[rows], case] + within
    return ranks


def unrank_rest(heaviest: Ints, ranks: Ints, code: LatticeCode) -> Latents:
    """Canonical latents with these heaviest indices and ranks in [0, R_i)."""
    numbering = _numbering(code)
    cases = (numbering.first[heaviest, 1:] <= ranks[:, None]).sum(1)
    indices = np.repeat(heaviest[:, None], code.max_support, axis=1)
    numerators = np.zeros_like(indices)
    for case, (t, u) in enumerate(numbering.cases):
        rows = np.flatnonzero(cases == case)
        if rows.size:
            within = ranks[rows] - numbering.first[heaviest[rows], case]
            others, weights = _unrank_case(heaviest[rows], within, (t, u), code)
            indices[rows, 1:t] = others
            numerators[rows, :t] = weights
    return sort_slots(indices, numerators, code.num_codes)


def _rank_case(latents: Latents, t: int, u: int, code: LatticeCode) -> Ints:
    choose, leads = _numbering(code).choose, latents.heaviest
    order = np.argsort(latents.indices[:, 1:t], axis=1, kind="stable") + 1
    others = np.take_along_axis(latents.indices, order, 1)
    weights = np.take_along_axis(latents.numerators, np.pad(order, ((0, 0), (1, 0))), 1)
    below = subset_ranks(others[:, :u], choose)
    above = subset_ranks(others[:, u:] - leads[:, None] - 1, choose)
    number = led_numbers(code.denominator, t, u)[key(weights, code.denominator)]
    places = choose[code.num_codes - 1 - leads, t - 1 - u]
    rank: Ints = (below * places + above) * len(led_compositions(code.denominator, t, u)) + number
    return rank


def _unrank_case(leads: Ints, within: Ints, case: Case, code: LatticeCode) -> tuple[Ints, Ints]:
    """The other indices (N, t - 1), ascending, and the weights (N, t) of one case's ranks."""
    t, u = case
    choose = _numbering(code).choose
    weights = np.array(led_compositions(code.denominator, t, u), np.int64)
    subsets, number = np.divmod(within, len(weights))
    below, above = np.divmod(subsets, choose[code.num_codes - 1 - leads, t - 1 - u])
    higher = subsets_of(above, t - 1 - u, choose) + leads[:, None] + 1
    return np.hstack((subsets_of(below, u, choose), higher)), weights[number]
