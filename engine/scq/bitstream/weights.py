"""Small combinatorics of lattice weights: compositions, partitions, and the profiles they serve.

Orders fixed here are part of the format. A composition of n into t parts is a tuple of positive
integers with sum n; a partition is a composition whose parts do not increase. Both are numbered
in lexicographic order, smallest tuple first. Knows nothing of codes, latents or bytes.
"""

from __future__ import annotations

import functools
import itertools

import numpy as np
from numpy.typing import NDArray

from scq.errors import UnsupportedOperation
from scq.lattice import LatticeCode

MAX_SUPPORT = 4
MAX_DENOMINATOR = 16
MAX_CODES = 65536

Parts = tuple[int, ...]
Ints = NDArray[np.int64]


def check_profile(code: LatticeCode) -> None:
    """Raise UnsupportedOperation unless SCQ1 has a profile for `code`."""
    power_of_two = code.denominator & (code.denominator - 1) == 0
    if not (
        2 <= code.num_codes <= MAX_CODES
        and code.max_support <= MAX_SUPPORT
        and code.denominator <= MAX_DENOMINATOR
        and power_of_two
    ):
        raise UnsupportedOperation(
            f"SCQ1 has no profile for {code}: it takes 2..{MAX_CODES} codes, supports of "
            f"1..{MAX_SUPPORT} and denominators 1, 2, 4, 8, 16"
        )


@functools.cache
def compositions(total: int, parts: int) -> tuple[Parts, ...]:
    """Positive tuples of `parts` integers that sum to `total`, in lexicographic order."""
    if parts == 1:
        return ((total,),) if total > 0 else ()
    return tuple(
        (first, *rest)
        for first in range(1, total - parts + 2)
        for rest in compositions(total - first, parts - 1)
    )


@functools.cache
def partitions(total: int, parts: int) -> tuple[Parts, ...]:
    """The compositions whose parts do not increase, in lexicographic order."""
    return tuple(c for c in compositions(total, parts) if _descends(c))


@functools.cache
def led_compositions(total: int, parts: int, below: int) -> tuple[Parts, ...]:
    """Compositions led by the heaviest: part 0 > each of the next `below`, >= each of the rest.

    They are the weights of a code, of `below` codes with lower indices and of the others, so
    that the first code is the heaviest with ties going to the lower index.
    """
    return tuple(
        c
        for c in compositions(total, parts)
        if all(c[0] > part for part in c[1 : 1 + below])
        and all(c[0] >= part for part in c[1 + below :])
    )


@functools.cache
def composition_numbers(total: int, parts: int) -> Ints:
    """Array from `key` of a composition to its number; -1 elsewhere."""
    return _numbers(compositions(total, parts), total, parts)


@functools.cache
def partition_numbers(total: int, parts: int) -> Ints:
    """Array from `key` of a partition to its number; -1 elsewhere."""
    return _numbers(partitions(total, parts), total, parts)


@functools.cache
def led_numbers(total: int, parts: int, below: int) -> Ints:
    """Array from `key` of a led composition to its number; -1 elsewhere."""
    return _numbers(led_compositions(total, parts, below), total, parts)


def key(rows: Ints, total: int) -> Ints:
    """(N, t) parts in 0..total -> (N,) integers that tell them apart: base total + 1."""
    powers = (total + 1) ** np.arange(rows.shape[1], dtype=np.int64)
    keys: Ints = rows @ powers
    return keys


def _numbers(tuples: tuple[Parts, ...], total: int, parts: int) -> Ints:
    table = np.full((total + 1) ** parts, -1, np.int64)
    if tuples:
        table[key(np.array(tuples, np.int64), total)] = np.arange(len(tuples))
    table.setflags(write=False)
    return table


def _descends(parts: Parts) -> bool:
    return all(first >= second for first, second in itertools.pairwise(parts))
