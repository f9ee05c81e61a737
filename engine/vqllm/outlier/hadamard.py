"""Hadamard matrices of the orders that layer sizes need, and how a size splits into them.

Knows numbers only: no model, no seed. Entries are +-1 int8; the product with the transpose is
m times the identity.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from vqllm.errors import UnsupportedModel

MAX_ORDER = 1024

# Four sign sequences per order / 4, as bits (1 is -1, least significant first), whose periodic
# autocorrelations sum to zero. Found by a search over sequences that are constant on the orbits of
# a group of multipliers; any such four give a Goethals-Seidel array.
_SEQUENCES = {
    52: (0x2D1, 0x2D1, 0xC0D, 0xC0C),
    92: (0x296694, 0x18A519, 0x41DB82, 0x70180E),
    100: (0x934B25, 0x82B504, 0x9E31E4, 0x170303B),
    116: (0x15A4C96A, 0x8792785, 0x19D2E60, 0x1C40C08E),
    156: (0xA2D65E24A, 0x640A968FD9, 0x419A8A063D, 0x186445F043),
    172: (0x34CF5A50CD2, 0x22E743D18BA, 0x36761EF2A8, 0x4857C440185),
}


@dataclass(frozen=True)
class HadamardSize:
    """n = blocks * order * 2^power: `blocks` equal transforms side by side."""

    blocks: int
    order: int
    power: int


@cache
def hadamard_size(n: int) -> HadamardSize:
    """The widest split of n that has a Hadamard matrix, with the smallest base order.

    Sizes without a known matrix fall back to several equal blocks (block-diagonal).

    Raises:
        UnsupportedModel: n has no known even factor at all.
    """
    for blocks in range(1, n + 1):
        if n % blocks:
            continue
        order = _base_order(n // blocks)
        if order is not None and n // blocks > 1:
            return HadamardSize(blocks, order, (n // blocks // order).bit_length() - 1)
    raise UnsupportedModel(f"no Hadamard matrix divides size {n}; it must be even")


@cache
def hadamard_matrix(order: int) -> NDArray[np.int8]:
    """A Hadamard matrix of `order`, int8 (order, order).

    Order 1, or by the constructions of Paley (1933): type I for order - 1 a prime that is 3 mod 4,
    type II for order / 2 - 1 a prime that is 1 mod 4; for the orders in between by arrays of four
    circulants (Goethals and Seidel 1967).

    Raises:
        ValueError: no construction is known here for this order.
    """
    if order == 1:
        return np.ones((1, 1), np.int8)
    if _is_prime(order - 1) and order % 4 == 0:
        return _paley_one(order - 1)
    if _is_prime(order // 2 - 1) and order % 4 == 0 and order // 2 % 4 == 2:
        return _paley_two(order // 2 - 1)
    if order in _SEQUENCES:
        return _goethals_seidel(_SEQUENCES[order], order // 4)
    raise ValueError(f"no Hadamard matrix of order {order} is known here")


def is_known_order(order: int) -> bool:
    """Whether `hadamard_matrix` can build this order."""
    if order % 4:
        return order == 1
    is_paley_two = order // 2 % 4 == 2 and _is_prime(order // 2 - 1)
    return is_paley_two or _is_prime(order - 1) or order in _SEQUENCES


def _base_order(n: int) -> int | None:
    """The smallest known order m with n = m * 2^p."""
    odd = n // (n & -n)
    order = odd
    while order <= min(n, MAX_ORDER):
        if n % order == 0 and is_known_order(order):
            return order
        order *= 2
    return None


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))


def _jacobsthal(prime: int) -> NDArray[np.int8]:
    """Q[i, j] = Legendre symbol of i - j."""
    symbol = np.full(prime, -1, np.int8)
    symbol[np.arange(prime) ** 2 % prime] = 1
    symbol[0] = 0
    index = np.arange(prime)
    matrix: NDArray[np.int8] = symbol[(index[:, None] - index) % prime]
    return matrix


def _paley_one(prime: int) -> NDArray[np.int8]:
    matrix = np.ones((prime + 1, prime + 1), np.int8)
    matrix[1:, 0] = -1
    matrix[1:, 1:] = _jacobsthal(prime) + np.eye(prime, dtype=np.int8)
    return matrix


def _paley_two(prime: int) -> NDArray[np.int8]:
    core = np.zeros((prime + 1, prime + 1), np.int8)
    core[0, 1:] = core[1:, 0] = 1
    core[1:, 1:] = _jacobsthal(prime)
    plus = np.array([[1, 1], [1, -1]], np.int8)
    minus = np.array([[1, -1], [-1, -1]], np.int8)
    identity = np.eye(prime + 1, dtype=np.int8)
    return np.asarray(np.kron(core, plus) + np.kron(identity, minus), np.int8)


def _goethals_seidel(sequences: tuple[int, ...], size: int) -> NDArray[np.int8]:
    index = np.arange(size)
    signs = [np.array([1 - 2 * (bits >> i & 1) for i in index], np.int8) for bits in sequences]
    a, b, c, d = (row[(index - index[:, None]) % size] for row in signs)
    flip = np.s_[:, ::-1]  # times the back-identity
    return np.block(
        [
            [a, b[flip], c[flip], d[flip]],
            [-b[flip], a, d.T[flip], -c.T[flip]],
            [-c[flip], -d.T[flip], a, b.T[flip]],
            [-d[flip], c.T[flip], -b.T[flip], a],
        ]
    )
