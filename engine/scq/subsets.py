"""Ranks of subsets in colexicographic order: the combinatorial number system (Lehmer, 1964).

Knows numbers only; what a subset stands for is its users' affair.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

Ints = NDArray[np.int64]
# int64, or Python integers in object arrays where ranks need more than 62 bits.
Ranks = NDArray[Any]


def binomials(largest: int, most: int, dtype: DTypeLike = np.int64) -> Ranks:
    """choose[x, m] = C(x, m) for x in 0..largest and m in 0..most."""
    choose: Ranks = np.zeros((largest + 1, most + 1), dtype)
    choose[:, 0] = 1
    for m in range(1, most + 1):
        # Pascal: C(x, m) = C(x-1, m) + C(x-1, m-1), summed over x.
        choose[1:, m] = np.cumsum(choose[:-1, m - 1])
    return choose


def subset_ranks(ascending: Ints, choose: Ranks) -> Ranks:
    """Ranks (N,) of (N, m) ascending rows x_1 < .. < x_m among m-subsets: sum of C(x_j, j)."""
    terms: Ranks = choose[ascending, np.arange(1, ascending.shape[1] + 1)]
    total: Ranks = terms.sum(1)
    return total


def subsets_of(ranks: Ranks, size: int, choose: Ranks) -> Ints:
    """(N, size) ascending rows of the given ranks, found greedily from the largest element."""
    chosen = np.empty((len(ranks), size), np.int64)
    for m in range(size, 0, -1):
        element = np.searchsorted(choose[:, m], ranks, side="right") - 1
        ranks = ranks - choose[element, m]
        chosen[:, m - 1] = element
    return chosen
