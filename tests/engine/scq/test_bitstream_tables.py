"""Entropy tables: what they demand of their arrays, and how fitting learns from coded grids."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from scq.bitstream.canonical import canonical
from scq.bitstream.changes import NEW, REWEIGHT, SKIP, SWAP1, compare
from scq.bitstream.fitting import CodedGrid, cluster_rows, fit_tables, smooth
from scq.bitstream.tables import EntropyTables, table_shapes
from scq.errors import CorruptCodes, ScqError, UnsupportedOperation
from scq.lattice import LatticeAssignment, LatticeCode

CODE = LatticeCode(24, 3, 4)


def assignment_of(indices: list[list[int]], numerators: list[list[int]]) -> LatticeAssignment:
    return LatticeAssignment(torch.tensor(indices), torch.tensor(numerators))


def smooth_grid(code: LatticeCode, seed: int, rows: int = 6, columns: int = 7) -> CodedGrid:
    """Codes that drift slowly over the grid, so that neighbours predict each other."""
    generator = np.random.default_rng(seed)
    steps = generator.integers(-1, 2, (rows, columns)).cumsum(0).cumsum(1)
    heaviest = (steps % code.num_codes).reshape(-1)
    indices = np.repeat(heaviest[:, None], code.max_support, axis=1)
    numerators = np.zeros_like(indices)
    numerators[:, 0] = code.denominator
    if code.max_support > 1:
        mixed = generator.random(len(heaviest)) < 0.5
        indices[mixed, 1] = (heaviest[mixed] + 1) % code.num_codes
        numerators[mixed, 0] -= 1
        numerators[mixed, 1] += 1
    return CodedGrid(
        LatticeAssignment(torch.from_numpy(indices), torch.from_numpy(numerators)), (rows, columns)
    )


def fitted(code: LatticeCode = CODE, **sizes: int) -> EntropyTables:
    stills = [smooth_grid(code, seed) for seed in range(12)]
    return fit_tables(stills, code, videos=[stills[:6]], **sizes)


@pytest.mark.parametrize(
    "code", [LatticeCode(2, 1, 1), LatticeCode(24, 1, 4), CODE, LatticeCode(90, 4, 16)]
)
def test_tables_survive_tensors_exactly(code: LatticeCode) -> None:
    tables = fitted(code, base_clusters=5, other_clusters=9)
    tensors = tables.to_tensors()
    back = EntropyTables.from_tensors(tensors, code)
    assert back.frequencies.keys() == tables.frequencies.keys()
    for name, table in tables.frequencies.items():
        np.testing.assert_array_equal(back.frequencies[name], table)
    as_int32 = {name: tensor.to(torch.int32) for name, tensor in tensors.items()}
    again = EntropyTables.from_tensors(as_int32, code)
    np.testing.assert_array_equal(again.base_cluster, tables.base_cluster)
    assert all(t.dtype == torch.uint16 for t in tensors.values())
    assert tables.num_bytes == sum(2 * t.numel() for t in tensors.values())


def test_the_shapes_are_those_that_the_format_writes_down() -> None:
    shapes = table_shapes(LatticeCode(256, 4, 8), 16, 64)
    assert shapes == {
        "base": (289, 256), "support": (16, 4), "other": (64, 256), "mode": (25, 4),
        "new": (64, 256), "swap": (64, 256),
        "partition2": (1, 4), "partition3": (1, 5), "partition4": (1, 5),
        "slot2": (1, 2), "slot3": (1, 3), "slot4": (1, 4),
        "reweight2": (4, 7), "reweight3": (5, 21), "reweight4": (5, 35),
        "swap_weights2": (4, 7), "swap_weights3": (5, 21), "swap_weights4": (5, 35),
    }  # fmt: skip
    assert table_shapes(LatticeCode(2, 1, 1), 2, 2).keys() == {"base", "mode", "new", "swap"}
    # One partition and one composition of 2 into 2 parts: nothing to say about the weights.
    assert not {"partition2", "reweight2"} & table_shapes(LatticeCode(9, 2, 2), 2, 2).keys()


def without(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: value for key, value in tensors.items() if key != name}


def test_maps_and_tables_out_of_range_are_named() -> None:
    good = fitted().to_tensors()
    zero = good["other"].to(torch.int32)
    zero[0, 0], zero[0, 1] = 0, zero[0, 0] + zero[0, 1]
    short = good["mode"].to(torch.int32)
    short[3, 0] -= 1
    cases = [
        (without(good, "swap"), "unknown.*swap"),
        (without(good, "base_cluster"), "lack base_cluster"),
        (good | {"extra": torch.ones(2)[None].int()}, "extra"),
        (good | {"other": zero}, "other holds a frequency of 0"),
        (good | {"mode": short}, "row 3 of table mode sums to 65535"),
        (good | {"mode": good["mode"][:3]}, r"mode is uint16 \(3, 4\)"),
        (good | {"mode": good["mode"].float()}, "must hold integers"),
        (good | {"mode": good["mode"].int() - 70000}, "outside 0..65535"),
        (good | {"other_cluster": good["other_cluster"][1:]}, r"uint16 \(23,\)"),
        (good | {"base_cluster": good["base_cluster"].int() + 20}, "names cluster"),
    ]
    for tensors, message in cases:
        with pytest.raises(ScqError, match=message):
            EntropyTables.from_tensors(tensors, CODE)


def test_codes_beyond_the_profiles_have_no_tables() -> None:
    for code in (LatticeCode(8, 5, 8), LatticeCode(8, 2, 5), LatticeCode(1, 1, 1)):
        with pytest.raises(UnsupportedOperation, match="no profile"):
            fit_tables([], code)
    big = LatticeCode(8193, 1, 1)
    with pytest.raises(UnsupportedOperation, match="use RAW"):
        EntropyTables(big, np.zeros(8193, np.uint16), np.zeros(8193, np.uint16), {})


def test_fitting_is_deterministic_and_predicts_neighbours() -> None:
    one, two = fitted(), fitted()
    for name, table in one.frequencies.items():
        np.testing.assert_array_equal(two.frequencies[name], table)
    fresh = smooth_grid(CODE, 99)
    latents = canonical(fresh.assignment, CODE)
    grid = latents.heaviest.reshape(fresh.grid)
    rows = one.base_cluster[grid].astype(int)
    contexts = np.pad(rows, ((1, 0), (1, 0)), constant_values=one.num_base_clusters)
    row = contexts[1:, :-1] * (one.num_base_clusters + 1) + contexts[:-1, 1:]
    assert one.bits["base"][row, grid].mean() < 0.8 * np.log2(24)


def test_fitting_needs_pictures_on_one_grid() -> None:
    with pytest.raises(ScqError, match="at least one"):
        fit_tables([], CODE)
    film = [smooth_grid(CODE, 0), smooth_grid(CODE, 0, 7, 6)]
    with pytest.raises(ScqError, match="changes its grid"):
        fit_tables(film, CODE, videos=[film])
    with pytest.raises(CorruptCodes, match="do not fill"):
        CodedGrid(film[0].assignment, (5, 5))


def test_smoothing_follows_held_out_counts() -> None:
    prior = np.full(4, 0.25)
    fit = np.array([[90.0, 10, 0, 0]])
    agreeing, contrary = fit / 2, np.array([[0.0, 0, 50, 50]])
    assert smooth(fit, agreeing, prior)[0, 0] > 0.85
    assert smooth(fit, contrary, prior)[0, 2] > 0.24
    np.testing.assert_allclose(smooth(fit, contrary, prior).sum(1), 1)


def test_clusters_join_rows_with_like_distributions() -> None:
    counts = np.zeros((40, 40))
    counts[:20, :10] = 50
    counts[20:, 30:] = 50
    clusters = cluster_rows(counts, 2)
    assert len(set(clusters[:20])) == len(set(clusters[20:])) == 1
    assert clusters[0] != clusters[-1]
    np.testing.assert_array_equal(cluster_rows(counts, 64), np.arange(40))


def test_changes_tell_the_modes_apart() -> None:
    before = canonical(
        assignment_of(
            [[3, 5, 3], [3, 5, 3], [3, 5, 3], [3, 5, 3], [7, 7, 7], [1, 2, 3]],
            [[3, 1, 0], [3, 1, 0], [3, 1, 0], [3, 1, 0], [4, 0, 0], [2, 1, 1]],
        ),
        CODE,
    )
    now = canonical(
        assignment_of(
            [[3, 5, 3], [5, 3, 5], [9, 5, 9], [3, 3, 3], [8, 8, 8], [9, 3, 1]],
            [[3, 1, 0], [3, 1, 0], [3, 1, 0], [4, 0, 0], [4, 0, 0], [2, 1, 1]],
        ),
        CODE,
    )
    changes = compare(before, now, 4)
    assert changes.simplest.tolist() == [SKIP, REWEIGHT, SWAP1, NEW, SWAP1, SWAP1]
    # Compositions of 4 into 2: (1,3), (2,2), (3,1); into 3: (1,1,2), (1,2,1), (2,1,1).
    assert changes.compositions[[1, 2, 4, 5]].tolist() == [0, 2, 0, 1]
    assert changes.slots[[2, 4, 5]].tolist() == [0, 0, 1]
    assert changes.inserted[[2, 4, 5]].tolist() == [9, 8, 9]
    assert changes.partitions.tolist() == [1, 1, 1, 1, 0, 0]
