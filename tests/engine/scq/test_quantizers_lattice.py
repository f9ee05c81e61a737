"""Lattice assignments as symbols and as ranks: bijections onto exactly the states of the code."""

from __future__ import annotations

import pytest
import torch

from scq.errors import CorruptCodes
from scq.lattice import LatticeAssignment, LatticeCode
from scq.quantizers.lattice_symbols import (
    from_ranks,
    from_symbols,
    partitions,
    to_ranks,
    to_symbols,
)
from support.lattices import every_assignment

CODES = [
    LatticeCode(5, 1, 1),
    LatticeCode(6, 2, 4),
    LatticeCode(5, 3, 4),
    LatticeCode(5, 4, 8),
]


@pytest.mark.parametrize("code", CODES)
def test_ranks_are_a_bijection_onto_the_states(code: LatticeCode) -> None:
    assignment = every_assignment(code)
    ranks = to_ranks(assignment, code)
    assert sorted(ranks) == list(range(code.num_states))
    back = from_ranks(ranks, code)
    assert torch.equal(back.indices, assignment.indices)
    assert torch.equal(back.numerators, assignment.numerators)


@pytest.mark.parametrize("code", CODES)
def test_symbols_name_every_state_once(code: LatticeCode) -> None:
    assignment = every_assignment(code)
    symbols = to_symbols(assignment, code)
    assert len({tuple(row) for row in symbols.tolist()}) == code.num_states
    back = from_symbols(symbols, code)
    assert torch.equal(back.indices, assignment.indices)
    assert torch.equal(back.numerators, assignment.numerators)


def test_ranks_beyond_64_bits_are_exact() -> None:
    code = LatticeCode(65536, 4, 16)
    assert code.num_states > 2**64
    last = LatticeAssignment(
        torch.tensor([[65535, 65534, 65533, 65532], [0, 0, 0, 0]]),
        torch.tensor([[13, 1, 1, 1], [16, 0, 0, 0]]),
    )
    ranks = to_ranks(last, code)
    back = from_ranks(ranks, code)
    assert ranks[1] == 0
    assert torch.equal(back.numerators, last.numerators)
    assert torch.equal(back.indices[0].sort().values, last.indices[0].sort().values)


def test_partitions_are_descending_and_complete() -> None:
    table = partitions(LatticeCode(9, 3, 6))
    assert table.parts.tolist() == [
        [6, 0, 0], [5, 1, 0], [4, 2, 0], [3, 3, 0], [4, 1, 1], [3, 2, 1], [2, 2, 2],
    ]  # fmt: skip
    assert table.sizes.tolist() == [1, 2, 2, 2, 3, 3, 3]


def test_a_code_named_twice_is_corrupt() -> None:
    code = LatticeCode(5, 2, 4)
    with pytest.raises(CorruptCodes, match="latent 1 names the same code twice"):
        from_symbols(torch.tensor([[1, 0, 0], [3, 1, 3]]).numpy(), code)
