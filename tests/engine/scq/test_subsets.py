"""Ranks of subsets: every rank once, in colexicographic order, in small and unbounded integers."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from scq.subsets import binomials, subset_ranks, subsets_of


@pytest.mark.parametrize("size", [0, 1, 2, 4])
@pytest.mark.parametrize("dtype", [np.int64, np.object_])
def test_ranks_number_all_subsets_in_order(size: int, dtype: type) -> None:
    choose = binomials(7, 4, dtype)
    subsets = sorted(itertools.combinations(range(7), size), key=lambda subset: subset[::-1])
    rows = np.array(subsets, np.int64).reshape(len(subsets), size)
    ranks = subset_ranks(rows, choose)
    assert ranks.tolist() == list(range(math.comb(7, size)))
    assert subsets_of(ranks, size, choose).tolist() == rows.tolist()


def test_binomials_beyond_64_bits_stay_exact() -> None:
    choose = binomials(65_536, 8, np.object_)
    assert choose[65_536, 8] == math.comb(65_536, 8)
    last = subsets_of(np.array([math.comb(65_536, 8) - 1], np.object_), 8, choose)
    assert last.tolist() == [list(range(65_528, 65_536))]
