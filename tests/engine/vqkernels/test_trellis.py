"""The native weight encoders: same bits on every tier, the format by hand, hostile input."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from vqkernels.errors import DtypeError, NonFiniteError, ShapeError
from vqkernels.isa import Isa, forced_isa, supported_isas
from vqkernels.trellis import (
    Bytes,
    Floats,
    Levels,
    Sweep,
    Trellis,
    decode_trellis,
    sweep_grid,
    sweep_trellis,
)

pytestmark = pytest.mark.usefixtures("native")

SIZES = [(bits, state_bits) for bits in range(1, 6) for state_bits in (10, 12, 13)]
# A code whose levels show the hash: level = top byte of state * 1061 mod 2^L, minus 128.
RAMP = np.arange(-128, 128).astype(np.int8)


def make_trellis(bits: int, state_bits: int) -> Trellis:
    table = np.random.default_rng(bits).normal(0, 32, 256).clip(-127, 127).astype(np.int8)
    return Trellis(bits, state_bits, 743, table)


def make_sweep(num_columns: int, num_rows: int, *, has_factor: bool = True) -> Sweep:
    random = np.random.default_rng(num_rows)
    upper = np.triu(random.normal(0, 0.1, (num_columns, num_columns + 3)), 1)
    np.fill_diagonal(upper, random.uniform(0.5, 2, num_columns))
    wide = upper.astype(np.float32)
    return Sweep(
        columns=random.standard_normal((num_columns, num_rows)).astype(np.float32),
        scales=(random.uniform(0.5, 2, (2, num_rows)) / 32).astype(np.float32),
        groups=(np.arange(num_columns) % 2).astype(np.int32),
        factor=wide[:, :num_columns] if has_factor else None,
        column_scales=random.uniform(0.5, 2, num_columns).astype(np.float32),
    )


def levels_by_hand(trellis: Trellis, codes: Bytes, num_rows: int) -> Levels:
    """The format in whole numbers: a column is one number, a state a run of its bits."""
    levels = np.empty((len(codes), num_rows), np.int8)
    size = 1 << trellis.state_bits
    for column, stream in enumerate(codes):
        number = int.from_bytes(stream.tobytes(), "little") << trellis.state_bits
        for row in range(num_rows):
            state = (number >> ((row + 1) * trellis.bits)) % size
            index = (state * trellis.multiplier % size) >> (trellis.state_bits - 8)
            levels[column, row] = trellis.table[index]
    return levels


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("num_rows", [1, 7, 100])
def test_streams_mean_what_the_format_says(size: tuple[int, int], num_rows: int) -> None:
    trellis = make_trellis(*size)
    shape = (3, trellis.stream_bytes(num_rows))
    codes = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    np.testing.assert_array_equal(
        decode_trellis(trellis, codes, num_rows), levels_by_hand(trellis, codes, num_rows)
    )


@pytest.mark.parametrize(
    ("bits", "levels"),
    [
        (1, [-128, -128, 0, 64, 96, 112, -8, -68]),
        (2, [-128, 64, 112, -68, 79, -13, -36, 37]),
        (3, [0, 112, 30, -13, 13, 105, -117, 104]),
        (4, [64, -68, -13, 37, -39, 104, 57, -74]),
        (5, [96, 79, 13, -39, -45, -35, 126, -89]),
    ],
)
def test_example_vectors_of_the_format(bits: int, levels: list[int]) -> None:
    stream = np.array([[0x8C, 0x57, 0x19, 0xE4, 0x3B]], np.uint8)[:, :bits]
    np.testing.assert_array_equal(
        decode_trellis(Trellis(bits, 12, 1061, RAMP), np.ascontiguousarray(stream), 8), [levels]
    )


@pytest.mark.parametrize("size", [*SIZES, (2, 16)])
def test_every_tier_finds_the_same_path(size: tuple[int, int]) -> None:
    trellis = make_trellis(*size)
    results = []
    for isa in supported_isas():
        sweep = make_sweep(3, 77)
        with forced_isa(isa):
            results.append((*sweep_trellis(sweep, trellis), sweep.columns))
    for result in results[1:]:
        for expected, found in zip(results[0], result, strict=True):
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("num_rows", [1, 15, 16, 77])
@pytest.mark.parametrize("max_code", [3, 15, 255])
def test_every_tier_rounds_to_the_same_codes(num_rows: int, max_code: int) -> None:
    zeros = np.random.default_rng(2).integers(0, max_code + 1, (2, num_rows)).astype(np.uint8)
    results = []
    for isa in supported_isas():
        sweep = make_sweep(4, num_rows)
        with forced_isa(isa):
            results.append((*sweep_grid(sweep, zeros, max_code), sweep.columns))
    for result in results[1:]:
        for expected, found in zip(results[0], result, strict=True):
            np.testing.assert_array_equal(found, expected)


def column_values(sweep: Sweep, steps: Floats) -> Floats:
    assert sweep.column_scales is not None
    return steps * (sweep.scales[sweep.groups] * sweep.column_scales[:, None])


def test_errors_are_those_of_the_codes_and_move_on_to_later_columns() -> None:
    sweep, trellis = make_sweep(5, 33), make_trellis(3, 10)
    before = sweep.columns.copy()
    codes, errors = sweep_trellis(sweep, trellis)
    values = column_values(sweep, decode_trellis(trellis, codes, 33).astype(np.float32))
    assert sweep.factor is not None
    diagonal = np.diag(sweep.factor)[:, None]
    np.testing.assert_allclose(errors, (sweep.columns - values) / diagonal, atol=1e-6)
    pushed = np.triu(sweep.factor, 1).T @ errors
    np.testing.assert_allclose(sweep.columns, before - pushed, atol=1e-5)


def test_a_grid_rounds_to_nearest_and_stops_at_its_ends() -> None:
    columns = np.array([[-9.0, -2.5, -0.5, 0.25, 0.5, 1.5, 2.5, 9.0]], np.float32)
    sweep = Sweep(columns, np.ones((1, 8), np.float32), np.zeros(1, np.int32))
    codes, errors = sweep_grid(sweep, np.full((1, 8), 3, np.uint8), 7)
    np.testing.assert_array_equal(codes, [[0, 1, 3, 3, 3, 5, 5, 7]])
    np.testing.assert_array_equal(errors, [[-6, -0.5, -0.5, 0.25, 0.5, -0.5, 0.5, 5]])


def test_values_beyond_the_table_take_its_ends() -> None:
    trellis = Trellis(2, 10, 743, RAMP)
    columns = np.array([[1e4] * 40, [-1e4] * 40], np.float32)
    ones = np.ones((1, 40), np.float32)
    codes, _ = sweep_trellis(Sweep(columns, ones, np.zeros(2, np.int32)), trellis)
    levels = decode_trellis(trellis, codes, 40)
    assert levels[0].min() > 40
    assert levels[1].max() < -40


def test_long_columns_stay_exact() -> None:
    trellis = make_trellis(4, 12)
    columns = np.random.default_rng(3).normal(0, 32, (1, 20000)).astype(np.float32)
    ones = np.ones((1, 20000), np.float32)
    _, errors = sweep_trellis(Sweep(columns, ones, np.zeros(1, np.int32)), trellis)
    halves = np.square(errors).reshape(2, -1).mean(axis=1)
    assert halves[1] == pytest.approx(halves[0], rel=0.1)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    sweep = make_sweep(2, 9)
    sweep.columns[1, 8] = value
    with pytest.raises(NonFiniteError, match="sweep_trellis"):
        sweep_trellis(sweep, make_trellis(2, 12))
    with pytest.raises(NonFiniteError, match="sweep_grid"):
        sweep_grid(sweep, np.zeros((2, 9), np.uint8), 3)


@pytest.mark.parametrize(
    ("field", "value"),
    [("bits", 0), ("bits", 6), ("state_bits", 9), ("state_bits", 17), ("multiplier", 2)],
)
def test_impossible_codes_are_refused(field: str, value: int) -> None:
    with pytest.raises(ShapeError, match=field):
        replace(make_trellis(2, 12), **{field: value})  # type: ignore[arg-type]


def test_arrays_that_do_not_fit_are_refused() -> None:
    sweep, trellis = make_sweep(3, 9), make_trellis(2, 12)
    with pytest.raises(DtypeError, match="columns"):
        replace(sweep, columns=sweep.columns.astype(np.float64))
    with pytest.raises(ShapeError, match="scales"):
        replace(sweep, scales=sweep.scales[:, :5])
    with pytest.raises(ShapeError, match="groups must lie"):
        replace(sweep, groups=np.full(3, 2, np.int32))
    with pytest.raises(ShapeError, match="factor"):
        replace(sweep, factor=np.eye(2, dtype=np.float32))
    with pytest.raises(ShapeError, match="column_scales"):
        replace(sweep, column_scales=np.ones(2, np.float32))
    with pytest.raises(ShapeError, match="zeros"):
        sweep_grid(sweep, np.zeros((2, 5), np.uint8), 3)
    with pytest.raises(ShapeError, match="codes up to 256"):
        sweep_grid(sweep, np.zeros((2, 9), np.uint8), 256)
    with pytest.raises(ShapeError, match="codes"):
        decode_trellis(trellis, np.zeros((3, 2), np.uint8), 9)


def test_the_baseline_is_always_there() -> None:
    assert Isa.BASELINE in supported_isas()
