"""Lattice assignments and entropy tables to code in tests, the same for the same seed."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import torch

from scq.bitstream import CodedGrid, EntropyTables, fit_tables
from scq.bitstream.canonical import canonical
from scq.bitstream.weights import compositions
from scq.lattice import LatticeAssignment, LatticeCode

PROFILES = (
    LatticeCode(2, 1, 1),
    LatticeCode(2, 2, 2),
    LatticeCode(24, 1, 4),
    LatticeCode(7, 3, 4),
    LatticeCode(4, 4, 4),
    LatticeCode(90, 2, 4),
    LatticeCode(40, 4, 16),
)


def assignment_of(indices: list[list[int]], numerators: list[list[int]]) -> LatticeAssignment:
    """An assignment from plain lists, any slot order."""
    return LatticeAssignment(torch.tensor(indices), torch.tensor(numerators))


def every_assignment(code: LatticeCode) -> LatticeAssignment:
    """Every state of a small code once, heaviest code first, ties by lower index."""
    rows = []
    for size in range(1, code.max_support + 1):
        for subset in itertools.combinations(range(code.num_codes), size):
            for cuts in itertools.combinations(range(1, code.denominator), size - 1):
                parts = [b - a for a, b in itertools.pairwise((0, *cuts, code.denominator))]
                slots = sorted(zip(parts, subset, strict=True), key=lambda x: (-x[0], x[1]))
                slots += [(0, slots[0][1])] * (code.max_support - size)
                rows.append(slots)
    table = torch.tensor(rows)
    return LatticeAssignment(table[..., 1].contiguous(), table[..., 0].contiguous())


def random_assignment(code: LatticeCode, count: int, seed: int = 0) -> LatticeAssignment:
    """Canonical assignments with every support size, codes and weights drawn evenly."""
    generator = np.random.default_rng(seed)
    indices = np.zeros((count, code.max_support), np.int64)
    numerators = np.zeros_like(indices)
    for row in range(count):
        size = int(generator.integers(1, code.max_support + 1))
        choices = compositions(code.denominator, size)
        indices[row, :size] = generator.choice(code.num_codes, size, replace=False)
        numerators[row, :size] = choices[generator.integers(len(choices))]
    return canonical(
        LatticeAssignment(torch.from_numpy(indices), torch.from_numpy(numerators)), code
    ).to_assignment()


def changed_assignment(
    assignment: LatticeAssignment, code: LatticeCode, seed: int, share: float = 0.5
) -> LatticeAssignment:
    """Some latents new, some with their weights or one code changed, the rest as they were."""
    generator = np.random.default_rng(seed)
    fresh = random_assignment(code, len(assignment), seed + 1)
    indices, numerators = assignment.indices.clone(), assignment.numerators.clone()
    kinds = generator.choice(4, len(assignment), p=[1 - share, share / 3, share / 3, share / 3])
    for row, kind in enumerate(kinds.tolist()):
        size = int((numerators[row] > 0).sum())
        if kind == 1:
            indices[row], numerators[row] = fresh.indices[row], fresh.numerators[row]
        if kind == 2:
            numerators[row, :size] = numerators[row, :size].flip(0)
        if kind == 3 and fresh.indices[row, 0] not in indices[row, :size]:
            indices[row, int(generator.integers(size))] = fresh.indices[row, 0]
    return canonical(LatticeAssignment(indices, numerators), code).to_assignment()


@functools.cache
def random_tables(code: LatticeCode) -> EntropyTables:
    """Tables fitted to a few random grids."""
    grids = [CodedGrid(random_assignment(code, 63, seed), (7, 9)) for seed in range(4)]
    films = [[grids[0], CodedGrid(changed_assignment(grids[0].assignment, code, 9), (7, 9))]]
    return fit_tables(grids, code, videos=films, base_clusters=4, other_clusters=6)


def same(one: LatticeAssignment, two: LatticeAssignment) -> bool:
    """Whether two assignments are equal slot by slot."""
    return torch.equal(one.indices, two.indices) and torch.equal(one.numerators, two.numerators)
