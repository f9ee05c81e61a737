"""The native lattice search: same bits on every tier, odd shapes, hostile input, brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from vqkernels.errors import DtypeError, NonFiniteError, ShapeError
from vqkernels.isa import Isa, forced_isa, supported_isas
from vqkernels.lattice import (
    Floats,
    LatticeEffort,
    LatticeStates,
    PreparedCodebook,
    lattice_search,
)

pytestmark = pytest.mark.usefixtures("native")

# (latents, features, codes, support, denominator, count)
SHAPES = [
    (1, 1, 1, 1, 1, 1),
    (3, 2, 2, 2, 2, 4),
    (5, 7, 15, 2, 16, 3),
    (7, 16, 17, 2, 4, 20),
    (6, 3, 33, 3, 8, 5),
    (4, 5, 70, 4, 16, 2),
    (9, 16, 256, 2, 8, 1),
    (2, 33, 301, 2, 4, 256),
    (40, 8, 300, 2, 7, 1),
    (20, 1, 65, 2, 4, 1),
]


def problem(shape: tuple[int, ...], seed: int = 0) -> tuple[Floats, Floats]:
    random = np.random.default_rng(seed)
    latents = random.standard_normal((shape[0], shape[1])) * 0.6
    codebook = random.standard_normal((shape[2], shape[1]))
    return latents.astype(np.float32), codebook.astype(np.float32)


def run(shape: tuple[int, ...]) -> LatticeStates:
    latents, codebook = problem(shape)
    return lattice_search(latents, codebook, shape[3], shape[4], LatticeEffort(count=shape[5]))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_tier_gives_the_same_bits(shape: tuple[int, ...]) -> None:
    with forced_isa(Isa.BASELINE):
        expected = run(shape)
    for isa in supported_isas():
        with forced_isa(isa):
            found = run(shape)
        assert found.errors.tobytes() == expected.errors.tobytes()
        assert found.indices.tobytes() == expected.indices.tobytes()
        assert found.numerators.tobytes() == expected.numerators.tobytes()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_states_are_canonical_and_errors_are_theirs(shape: tuple[int, ...]) -> None:
    latents, codebook = problem(shape)
    found = run(shape)
    real = np.isfinite(found.errors)
    assert real[:, 0].all()
    assert (found.numerators.sum(axis=2) == shape[4]).all()
    assert (np.diff(found.errors, axis=1)[real[:, 1:]] >= 0).all()
    points = (found.numerators[..., None] / shape[4] * codebook[found.indices]).sum(axis=2)
    errors = np.square(points - latents[:, None]).sum(axis=2)
    np.testing.assert_allclose(found.errors[real], errors[real], rtol=1e-4, atol=1e-5)
    heavier, lighter = found.numerators[..., :-1], found.numerators[..., 1:]
    ordered = found.indices[..., :-1] < found.indices[..., 1:]
    assert ((heavier > lighter) | ((heavier == lighter) & (ordered | (lighter == 0)))).all()
    unused = found.numerators == 0
    assert (found.indices == found.indices[..., :1])[unused].all()


def best_pairs(latents: Floats, codebook: Floats, denominator: int) -> Floats:
    points = [codebook]
    for light in range(1, denominator):
        for i, j in itertools.permutations(range(len(codebook)), 2):
            share = light / denominator
            points.append((1 - share) * codebook[i : i + 1] + share * codebook[j : j + 1])
    everything = np.concatenate(points)
    found: Floats = np.square(latents[:, None] - everything[None]).sum(axis=2).min(axis=1)
    return found


@pytest.mark.parametrize("denominator", [2, 4, 8])
@pytest.mark.parametrize("num_codes", [2, 16, 31])
def test_the_exact_search_finds_the_minimum(num_codes: int, denominator: int) -> None:
    latents, codebook = problem((20, 6, num_codes))
    found = lattice_search(latents, codebook, 2, denominator, LatticeEffort(exact=True))
    expected = best_pairs(latents, codebook, denominator)
    np.testing.assert_allclose(found.errors[:, 0], expected, rtol=1e-4, atol=1e-6)


def test_the_fast_search_loses_little() -> None:
    latents, codebook = problem((60, 12, 200))
    fast = lattice_search(latents, codebook, 2, 8, LatticeEffort(heavy=100))
    exact = lattice_search(latents, codebook, 2, 8, LatticeEffort(exact=True))
    assert (fast.errors >= exact.errors).all()
    assert fast.errors.sum() < 1.005 * exact.errors.sum()


@pytest.mark.parametrize("max_support", [1, 2, 3])
def test_copies_of_a_code_never_share_a_state(max_support: int) -> None:
    latents, codebook = problem((10, 3, 8))
    codebook = np.concatenate([codebook, codebook, codebook])
    found = lattice_search(latents, codebook, max_support, 4, LatticeEffort(count=6, exact=True))
    names = found.indices % 8
    for a, b in itertools.combinations(range(max_support), 2):
        both = (found.numerators[..., a] > 0) & (found.numerators[..., b] > 0)
        assert (names[..., a] != names[..., b])[both].all()
    assert (found.indices[:, 0, 0] < 8).all()


def test_many_codes_do_without_a_table() -> None:
    """Above 4096 codes rows of separations are made when needed; the result is the same."""
    random = np.random.default_rng(1)
    codebook = random.standard_normal((4100, 3)).astype(np.float32)
    latents = random.standard_normal((2, 3)).astype(np.float32)
    effort = LatticeEffort(heavy=20, beam=2)
    found = lattice_search(latents, codebook, 3, 4, effort)
    few = lattice_search(latents, codebook[:4096], 3, 4, effort)
    points = (found.numerators[..., None] / 4 * codebook[found.indices]).sum(axis=2)
    errors = np.square(points - latents[:, None]).sum(axis=2)
    np.testing.assert_allclose(found.errors, errors, rtol=1e-3, atol=1e-6)
    assert (found.errors <= few.errors * 1.5 + 1e-6).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_prepared_codebook_gives_the_same_bits(shape: tuple[int, ...]) -> None:
    latents, codebook = problem(shape)
    expected = run(shape)
    prepared = PreparedCodebook(codebook, shape[4])
    for _ in range(2):
        found = prepared.search(latents, shape[3], LatticeEffort(count=shape[5]))
        assert found.errors.tobytes() == expected.errors.tobytes()
        assert found.indices.tobytes() == expected.indices.tobytes()
        assert found.numerators.tobytes() == expected.numerators.tobytes()


def test_a_prepared_codebook_refuses_what_does_not_fit() -> None:
    latents, codebook = problem((4, 3, 5))
    prepared = PreparedCodebook(codebook, 4)
    with pytest.raises(ShapeError, match=r"\(4, 2\)"):
        prepared.search(latents[:, :2], 2)
    with pytest.raises(ShapeError):
        prepared.search(latents, 5)
    with pytest.raises(NonFiniteError):
        prepared.search(latents * np.float32(np.inf), 2)
    with pytest.raises(NonFiniteError):
        PreparedCodebook(codebook * np.float32(np.inf), 4)
    with pytest.raises(ShapeError, match="denominator 17"):
        PreparedCodebook(codebook, 17)
    with pytest.raises(DtypeError, match="float64"):
        PreparedCodebook(codebook.astype(np.float64), 4)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("count", [1, 9])
@pytest.mark.parametrize("stretch", [1e-20, 1e-10, 1.0, 1e10, 1e17])
def test_rows_are_ruled_out_only_where_nothing_is_lost(
    stretch: float, count: int, exact: bool
) -> None:
    """The limit of 256 states lets far more rows pass than that of one."""
    latents, codebook = problem((60, 6, 200), seed=3)
    latents, codebook = latents * np.float32(stretch), codebook * np.float32(stretch)
    found = lattice_search(latents, codebook, 2, 8, LatticeEffort(count=count, exact=exact))
    every = lattice_search(latents, codebook, 2, 8, LatticeEffort(count=256, exact=exact))
    assert found.errors.tobytes() == every.errors[:, :count].tobytes()


def test_values_at_the_edge_of_the_range_name_some_code() -> None:
    latents = np.full((2, 4), 3e38, np.float32)
    codebook = np.full((5, 4), -3e38, np.float32)
    found = lattice_search(latents, codebook, 2, 4)
    assert (found.indices == 0).all()
    assert (found.numerators == [[[4, 0]]]).all()
    nothing = lattice_search(np.empty((0, 4), np.float32), codebook, 2, 4)
    assert nothing.indices.shape == (0, 1, 2)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    latents, codebook = problem((4, 3, 5))
    latents[2, 1] = bad
    with pytest.raises(NonFiniteError):
        lattice_search(latents, codebook, 2, 4)
    with pytest.raises(NonFiniteError):
        lattice_search(codebook, latents, 2, 4)


def test_arrays_and_sizes_that_do_not_fit_are_refused() -> None:
    latents, codebook = problem((4, 3, 5))
    for max_support, denominator in ((0, 4), (5, 8), (2, 1), (2, 17), (1, 0)):
        with pytest.raises(ShapeError):
            lattice_search(latents, codebook, max_support, denominator)
    with pytest.raises(ShapeError):
        lattice_search(latents, codebook[:1], 2, 4)
    for effort in (LatticeEffort(count=0), LatticeEffort(count=257), LatticeEffort(beam=0)):
        with pytest.raises(ShapeError):
            lattice_search(latents, codebook, 2, 4, effort)
    with pytest.raises(ShapeError, match=r"\(4, 2\)"):
        lattice_search(latents[:, :2], codebook, 2, 4)
    with pytest.raises(ShapeError, match="two dimensions"):
        lattice_search(latents[0], codebook, 2, 4)
    with pytest.raises(DtypeError, match="float64"):
        lattice_search(latents.astype(np.float64), codebook, 2, 4)
