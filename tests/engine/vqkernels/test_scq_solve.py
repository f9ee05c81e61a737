"""The native SCQ solver: equal bits on every tier and thread count, refusals, plain nearest code.

Its answers are compared with the torch solver in tests/engine/scq/test_solver_native.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vqkernels import (
    DtypeError,
    NativeCallError,
    NonFiniteError,
    ShapeError,
    ThreadPool,
    forced_isa,
    supported_isas,
)
from vqkernels.scq_solve import (
    ScqProblem,
    ScqSlopes,
    ScqSolution,
    differentiate,
    nearest,
    solve,
)

pytestmark = pytest.mark.usefixtures("native")


def arrays(
    num_latents: int, num_codes: int, code_dim: int, seed: int, dtype: Any = np.float64
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    random = np.random.default_rng(seed)
    latents = 1.3 * random.standard_normal((num_latents, code_dim))
    return latents.astype(dtype), random.standard_normal((num_codes, code_dim)).astype(dtype)


def assert_same_bits(left: ScqSolution, right: ScqSolution) -> None:
    for name, values in vars(left).items():
        np.testing.assert_array_equal(values, getattr(right, name), name)


@settings(max_examples=40, deadline=None)
@given(
    num_latents=st.integers(1, 60),
    num_codes=st.integers(1, 150),
    code_dim=st.integers(1, 40),
    lam=st.sampled_from([0.0, 1e-3, 0.1, 3.0]),
    objective=st.sampled_from(["nearest", "ridge"]),
    dtype=st.sampled_from([np.float32, np.float64]),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_tier_gives_the_same_bits(
    num_latents: int,
    num_codes: int,
    code_dim: int,
    lam: float,
    objective: str,
    dtype: Any,
    seed: int,
) -> None:
    latents, codebook = arrays(num_latents, num_codes, code_dim, seed, dtype)
    problem = ScqProblem(latents, codebook, lam, objective)
    slope = np.random.default_rng(seed).standard_normal(latents.shape)
    outcomes = []
    for tier in supported_isas():
        with forced_isa(tier):
            solution = solve(problem)
            solved = not solution.unsolved.any()
            gradient = differentiate(problem, solution, ScqSlopes(None, slope)) if solved else ()
            outcomes.append((solution, gradient))
    for solution, gradient in outcomes[1:]:
        assert_same_bits(solution, outcomes[0][0])
        for ours, theirs in zip(gradient, outcomes[0][1], strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("num_threads", [2, 5])
def test_threads_do_not_change_the_result(num_threads: int) -> None:
    problem = ScqProblem(*arrays(130, 200, 9, seed=3), lam=0.1)
    alone = solve(problem)
    slopes = ScqSlopes(np.ones_like(alone.weights), np.ones(problem.latents.shape))
    gradient = differentiate(problem, alone, slopes)
    with ThreadPool(num_threads) as pool:
        together = solve(problem, pool=pool)
        shared = differentiate(problem, together, slopes, pool=pool)
        np.testing.assert_array_equal(
            nearest(problem.latents, problem.codebook, pool=pool), alone.nearest
        )
    assert_same_bits(alone, together)
    for ours, theirs in zip(gradient, shared, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("shape", [(1, 1, 1), (30, 33, 3), (50, 1000, 16), (25, 257, 70)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_nearest_is_the_argmin_of_float64_distances(
    shape: tuple[int, int, int], dtype: Any
) -> None:
    latents, codebook = arrays(*shape, seed=4, dtype=dtype)
    wide = latents.astype(np.float64)[:, None] - codebook.astype(np.float64)[None]
    np.testing.assert_array_equal(nearest(latents, codebook), (wide**2).sum(2).argmin(1))


def test_nearest_takes_the_lower_index_of_equal_codes() -> None:
    latents, codebook = arrays(40, 30, 5, seed=5)
    doubled = np.concatenate((codebook, codebook, codebook))
    np.testing.assert_array_equal(nearest(latents, doubled), nearest(latents, codebook))


def test_nearest_tells_codes_apart_that_float32_cannot() -> None:
    codebook = np.zeros((64, 2))
    codebook[:, 0] = 1.0 + np.arange(64) * 1e-6
    codebook[0] = (-1.0, 0.0)
    latents = np.array([[1.0 + 40e-6, 0.3]])
    assert nearest(latents, codebook)[0] == 40


def test_iterations_that_run_out_are_reported_per_latent() -> None:
    problem = ScqProblem(*arrays(30, 40, 8, seed=6), lam=0.1)
    full = solve(problem)
    hurried = solve(replace(problem, max_iterations=4))
    np.testing.assert_array_equal(hurried.unsolved, full.iterations > 4)
    assert 0 < hurried.unsolved.sum() < 30
    assert (hurried.sizes[hurried.unsolved] == 0).all()


def test_supports_larger_than_the_tables_are_left_unsolved() -> None:
    latents, codebook = arrays(48, 150, 1, seed=8)
    solution = solve(ScqProblem(latents, codebook, lam=3.0, objective="ridge"))
    assert solution.unsolved.any()
    assert (solution.sizes[solution.unsolved] == 0).all()
    assert (solution.sizes <= solution.weights.shape[1]).all()


def test_unused_slots_are_code_zero_with_weight_zero() -> None:
    solution = solve(ScqProblem(*arrays(30, 40, 8, seed=7), lam=0.1))
    unused = np.arange(solution.weights.shape[1]) >= solution.sizes[:, None]
    assert (solution.weights[unused] == 0).all()
    assert (solution.indices[unused] == 0).all()
    assert (solution.weights[~unused] > 0).all()


def test_arrays_that_do_not_fit_are_named() -> None:
    latents, codebook = arrays(5, 6, 3, seed=0)
    with pytest.raises(ShapeError, match=r"latents are \(5, 2\)"):
        ScqProblem(latents[:, :2].copy(), codebook, 0.1)
    with pytest.raises(ShapeError, match="C-contiguous"):
        ScqProblem(latents[:, ::2], codebook, 0.1)
    with pytest.raises(DtypeError, match="latents are float32"):
        ScqProblem(latents.astype(np.float32), codebook, 0.1)
    with pytest.raises(DtypeError, match="latents is int64"):
        ScqProblem(latents.astype(np.int64), codebook, 0.1)
    with pytest.raises(ShapeError, match="objective is 'magic'"):
        ScqProblem(latents, codebook, 0.1, "magic")


def test_starts_that_do_not_fit_are_named() -> None:
    latents, codebook = arrays(5, 6, 3, seed=0)
    for initial, error, message in (
        (np.zeros((5, 2), np.int32), DtypeError, "int32"),
        (np.zeros((4, 2), np.int64), ShapeError, r"must be \(5, W\)"),
        (np.full((5, 2), 6), ShapeError, "code 6 of 6"),
    ):
        with pytest.raises(error, match=message):
            ScqProblem(latents, codebook, 0.1, initial=cast(Any, initial))


@pytest.mark.parametrize("lam", [-1.0, float("nan"), float("inf")])
def test_a_lam_out_of_range_is_refused(lam: float) -> None:
    with pytest.raises(NonFiniteError):
        solve(ScqProblem(*arrays(5, 6, 3, seed=0), lam=lam))


def test_supports_that_name_no_code_are_refused() -> None:
    problem = ScqProblem(*arrays(5, 6, 3, seed=0), lam=0.1)
    solution = solve(problem)
    slopes = ScqSlopes(None, np.ones((5, 3)))
    with pytest.raises(ShapeError, match="out of range"):
        differentiate(problem, replace(solution, indices=solution.indices + 6), slopes)
    with pytest.raises(ShapeError, match="out of range"):
        differentiate(problem, replace(solution, sizes=solution.sizes * 0), slopes)
    with pytest.raises(ShapeError, match=r"slopes.quantized has shape"):
        differentiate(problem, solution, ScqSlopes(None, np.ones((5, 2))))
    with pytest.raises(DtypeError, match=r"slopes.quantized is float32"):
        differentiate(problem, solution, ScqSlopes(None, np.ones((5, 3), np.float32)))


def test_a_closed_pool_is_refused() -> None:
    pool = ThreadPool(2)
    pool.close()
    with pytest.raises(NativeCallError, match="closed"):
        solve(ScqProblem(*arrays(5, 6, 3, seed=0), lam=0.1), pool=pool)
