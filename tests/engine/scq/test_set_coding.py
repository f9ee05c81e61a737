"""Sets of codes under static tables: every state round trips, and no order is paid for."""

from __future__ import annotations

import numpy as np
import pytest

from scq.bitstream import rans
from scq.errors import CorruptCodes
from scq.lattice import LatticeCode
from scq.quantizers.coding import Ints, SymbolTables
from scq.quantizers.lattice_symbols import partitions, to_symbols
from scq.quantizers.set_coding import fit_set_tables, pack_sets, set_bits, unpack_sets
from support.lattices import every_assignment

CODES = [
    LatticeCode(5, 1, 1),
    LatticeCode(6, 2, 2),
    LatticeCode(6, 2, 4),
    LatticeCode(5, 3, 3),
    LatticeCode(6, 4, 8),
    LatticeCode(2, 2, 4),
]


def every_state(code: LatticeCode) -> Ints:
    return to_symbols(every_assignment(code), code)


def alphabets(code: LatticeCode) -> list[int]:
    others = [code.num_codes] * (code.max_support - 1)
    return [code.num_codes, len(partitions(code).parts), *others]


def uneven_tables(code: LatticeCode) -> SymbolTables:
    random = np.random.default_rng(7)
    rows = [random.exponential(size=(1, size)) ** 3 for size in alphabets(code)]
    return SymbolTables(tuple(rans.quantize_frequencies(row)[0] for row in rows))


@pytest.mark.parametrize("code", CODES, ids=str)
def test_every_state_comes_back_from_its_bytes(code: LatticeCode) -> None:
    symbols = every_state(code)
    assert len(symbols) == code.num_states
    for tables in (uneven_tables(code), fit_set_tables(symbols, alphabets(code), code)):
        data = pack_sets(symbols, tables, code)
        np.testing.assert_array_equal(unpack_sets(data, len(symbols), tables, code), symbols)
        ideal = set_bits(symbols, tables, code).sum() / 8
        assert len(data) <= 1.01 * ideal + 6


@pytest.mark.parametrize("code", CODES, ids=str)
def test_states_share_no_more_than_the_whole_probability(code: LatticeCode) -> None:
    shares = np.exp2(-set_bits(every_state(code), uneven_tables(code), code))
    assert shares.sum() <= 1 + 1e-9
    if code.max_support == code.denominator == 2:
        # Equal weights only: nothing is left for a code twice, but slots of 1 in 65536.
        assert shares.sum() > 0.999


def test_two_codes_of_equal_weight_take_twice_the_entropy_less_a_bit() -> None:
    code, random = LatticeCode(64, 2, 2), np.random.default_rng(3)
    share = random.exponential(size=64)
    drawn = random.choice(64, size=(60000, 2), p=share / share.sum())
    pairs = np.sort(drawn[drawn[:, 0] != drawn[:, 1]], axis=1)
    symbols = np.stack([pairs[:, 0], np.ones(len(pairs), np.int64), pairs[:, 1]], axis=1)
    tables = fit_set_tables(symbols, alphabets(code), code)
    row = tables.frequencies[0] / rans.TOTAL
    mean = len(pack_sets(symbols, tables, code)) * 8 / len(symbols)
    same = 1 - (row**2).sum()
    entropy = -(row * np.log2(row)).sum()
    # Draws of two different codes: the pair's entropy under the table, by definition.
    joint = 2 * np.triu(np.outer(row, row), 1) / same
    expected = -(joint[joint > 0] * np.log2(joint[joint > 0])).sum()
    assert mean == pytest.approx(expected, abs=0.04)
    assert mean < 2 * entropy - 0.95


def test_unequal_weights_cost_what_their_tables_say() -> None:
    code = LatticeCode(6, 2, 4)
    tables, names = uneven_tables(code), [list(p) for p in partitions(code).parts.tolist()]
    symbols = np.array([[5, names.index([3, 1]), 2]])
    at = [tables.frequencies[column][name] for column, name in enumerate(symbols[0].tolist())]
    assert set_bits(symbols, tables, code)[0] == pytest.approx(48 - np.log2(at).sum())


def test_symbols_and_streams_that_are_none_are_refused() -> None:
    code = LatticeCode(6, 2, 2)
    tables = uneven_tables(code)
    with pytest.raises(CorruptCodes, match="ascending"):
        pack_sets(np.array([[3, 1, 2]]), tables, code)
    with pytest.raises(CorruptCodes, match="ascending"):
        pack_sets(np.array([[3, 1, 3]]), tables, code)
    with pytest.raises(CorruptCodes, match="alphabet"):
        pack_sets(np.array([[3, 1, 6]]), tables, code)
    data = pack_sets(np.array([[1, 1, 2], [0, 1, 5]]), tables, code)
    for bad in (data[:-1], data + b"\0", b""):
        with pytest.raises(CorruptCodes):
            unpack_sets(bad, 2, tables, code)
    stream = _stream_of_last_code(tables)
    with pytest.raises(CorruptCodes, match="no code left"):
        unpack_sets(stream, 1, tables, code)


def _stream_of_last_code(tables: SymbolTables) -> bytes:
    """A set that begins with the last code of all, after which nothing can come."""
    single, pair = tables.frequencies[1].tolist()
    return rans.encode_intervals([(single, pair), (rans.TOTAL - 1, 1)])
