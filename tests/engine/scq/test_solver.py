"""The exact solver: optimality, agreement with an independent conic solver, gradients, limits."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from scq.errors import InvalidCodebook, InvalidLatents, UnsupportedOperation
from scq.solver import SOLVERS, SolverConfig, exact, kkt_residual
from scq.solver.base import gradient_scale
from scq.solver.fallback import solve_one
from scq.solver.problem import prepare


def random_problem(
    num_latents: int, num_codes: int, code_dim: int, seed: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(num_latents, code_dim, generator=generator, dtype=torch.float64)
    codebook = torch.randn(num_codes, code_dim, generator=generator, dtype=torch.float64)
    return (1.3 * latents).to(dtype), codebook.to(dtype)


def objective(latents: Tensor, codebook: Tensor, assignment: Tensor, lam: float) -> Tensor:
    nearest = torch.cdist(latents, codebook).argmin(1)
    target = torch.nn.functional.one_hot(nearest, len(codebook)).to(latents.dtype)
    error = (latents - assignment @ codebook).square().sum(1)
    return error + lam * (assignment - target).square().sum(1)


@given(
    num_codes=st.integers(1, 40),
    code_dim=st.integers(1, 12),
    lam=st.sampled_from([0.0, 1e-3, 0.1, 1.0, 100.0]),
    latent_scale=st.sampled_from([0.0, 1e-4, 1.0, 1e4]),
    code_scale=st.sampled_from([1e-4, 1.0, 1e4]),
    offset=st.sampled_from([0.0, 100.0]),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=60, deadline=None)
def test_every_solution_lies_on_the_simplex_and_satisfies_kkt(
    num_codes: int,
    code_dim: int,
    lam: float,
    latent_scale: float,
    code_scale: float,
    offset: float,
    seed: int,
) -> None:
    latents, codebook = random_problem(5, num_codes, code_dim, seed)
    latents, codebook = latents * latent_scale + offset, codebook * code_scale + offset
    config = SolverConfig(lam=lam)
    result = exact.solve(latents, codebook, config)
    assert bool((result.assignment >= 0).all())
    torch.testing.assert_close(
        result.assignment.sum(1), torch.ones(5, dtype=torch.float64), rtol=0, atol=1e-12
    )
    centre = codebook.mean(0)
    scale = gradient_scale(latents - centre, codebook - centre, lam)
    recomputed = kkt_residual(latents - centre, codebook - centre, result.assignment, lam)
    assert bool((recomputed <= 1e-8 * scale).all())
    assert bool((result.kkt_residual <= 1e-8 * scale).all())


@pytest.mark.parametrize("lam", [0.0, 0.1, 2.0])
def test_no_random_simplex_point_or_single_code_beats_the_solution(lam: float) -> None:
    latents, codebook = random_problem(20, 15, 4, seed=3)
    result = exact.solve(latents, codebook, SolverConfig(lam=lam))
    best = objective(latents, codebook, result.assignment, lam)
    generator = np.random.default_rng(0)
    for others in (
        torch.from_numpy(generator.dirichlet(np.full(15, 0.2), (200, 20))),
        torch.eye(15, dtype=torch.float64)[:, None].expand(15, 20, 15),
    ):
        for other in others:
            assert bool((objective(latents, codebook, other, lam) >= best - 1e-12).all())


# cvxpylayers and diffcp use deprecated numpy and string forms; not ours to mend.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("num_codes", "code_dim"), [(12, 3), (24, 6)])
@pytest.mark.parametrize("lam", [0.0, 0.1, 1.0])
def test_assignment_and_gradients_match_the_conic_solver(
    num_codes: int, code_dim: int, lam: float
) -> None:
    pytest.importorskip("cvxpylayers")
    latents, codebook = random_problem(12, num_codes, code_dim, seed=num_codes)
    upstream = torch.randn(12, code_dim, dtype=torch.float64)
    # Without lam the assignment need not be unique, only the quantized latent is.
    direct = torch.randn(12, num_codes, dtype=torch.float64) * (lam > 0)
    outcomes = []
    for solver in ("exact", "cvxpy"):
        z, c = latents.clone().requires_grad_(), codebook.clone().requires_grad_()
        assignment = SOLVERS[solver](z, c, SolverConfig(lam=lam)).assignment
        loss = (assignment @ c * upstream).sum() + (assignment * direct).sum()
        torch.autograd.backward(loss)
        outcomes.append((assignment @ c, assignment * (lam > 0), z.grad, c.grad))
    for ours, theirs in zip(*outcomes, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("num_codes", "lam"), [(1, 0.1), (7, 0.0), (16, 0.1), (16, 5.0)])
def test_gradients_match_finite_differences(num_codes: int, lam: float) -> None:
    latents, codebook = random_problem(6, num_codes, 4, seed=11)

    def quantize(z: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        assignment = exact.solve(z, c, SolverConfig(lam=lam)).assignment
        return (assignment @ c, assignment) if lam else (assignment @ c,)

    inputs = (latents.requires_grad_(), codebook.requires_grad_())
    assert torch.autograd.gradcheck(quantize, inputs, eps=1e-6, atol=1e-5)


def test_codes_outside_every_support_get_exactly_zero_gradient() -> None:
    latents, codebook = random_problem(4, 30, 5, seed=2)
    codebook.requires_grad_()
    assignment = exact.solve(latents, codebook, SolverConfig()).assignment
    torch.autograd.backward((assignment @ codebook).square().sum())
    unused = assignment.detach().sum(0) == 0
    assert bool(unused.any())
    assert codebook.grad is not None
    assert bool((codebook.grad[unused] == 0).all())
    assert bool((codebook.grad[~unused].abs().sum(1) > 0).all())


def test_float32_agrees_with_float64_and_keeps_its_dtype() -> None:
    latents, codebook = random_problem(50, 64, 8, seed=5)
    wide = exact.solve(latents, codebook, SolverConfig())
    narrow_latents, narrow_codebook = latents.float().requires_grad_(), codebook.float()
    narrow = exact.solve(narrow_latents, narrow_codebook, SolverConfig())
    assert narrow.assignment.dtype == torch.float32
    torch.testing.assert_close(narrow.assignment.double(), wide.assignment, rtol=0, atol=1e-5)
    torch.autograd.backward(narrow.assignment.square().sum())
    assert narrow_latents.grad is not None
    assert narrow_latents.grad.dtype == torch.float32


def test_batches_beyond_one_chunk_are_solved_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    latents, codebook = random_problem(25, 12, 4, seed=9)
    whole_codebook, codebook = codebook.clone().requires_grad_(), codebook.requires_grad_()
    whole = exact.solve(latents, whole_codebook, SolverConfig())
    monkeypatch.setattr(exact, "CHUNK_LATENTS", 7)
    chunked = exact.solve(latents, codebook, SolverConfig())
    torch.testing.assert_close(chunked.assignment, whole.assignment)
    assert torch.equal(chunked.iterations, whole.iterations)
    torch.autograd.backward([whole.assignment.square().sum(), chunked.assignment.square().sum()])
    torch.testing.assert_close(codebook.grad, whole_codebook.grad)


def test_lam_zero_reproduces_latents_inside_the_hull() -> None:
    _, codebook = random_problem(1, 40, 3, seed=7)
    weights = torch.rand(10, 40, dtype=torch.float64).softmax(1)
    inside = weights @ codebook
    result = exact.solve(inside, codebook, SolverConfig(lam=0.0))
    torch.testing.assert_close(result.assignment @ codebook, inside, rtol=0, atol=1e-8)


def test_large_lam_gives_plain_vector_quantization() -> None:
    latents, codebook = random_problem(30, 20, 6, seed=8)
    result = exact.solve(latents, codebook, SolverConfig(lam=1e6))
    nearest = torch.cdist(latents, codebook).argmin(1)
    torch.testing.assert_close(
        result.assignment, torch.nn.functional.one_hot(nearest, 20).double(), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("lam", [0.0, 0.1])
def test_a_latent_on_a_code_and_far_away_latents_choose_vertices(lam: float) -> None:
    codebook = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    latents = torch.tensor([[1.0, 0.0], [1e9, 1.0], [-1e9, -1e9]], dtype=torch.float64)
    result = exact.solve(latents, codebook, SolverConfig(lam=lam))
    expected = torch.eye(3, dtype=torch.float64)[[1, 1, 0]]
    torch.testing.assert_close(result.assignment, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("lam", [0.0, 0.1])
def test_duplicate_codes_and_a_single_point_codebook_stay_solvable(lam: float) -> None:
    latents, codebook = random_problem(20, 10, 3, seed=1)
    doubled = torch.cat((codebook, codebook, codebook))
    plain = exact.solve(latents, codebook, SolverConfig(lam=lam))
    result = exact.solve(latents, doubled, SolverConfig(lam=lam))
    if lam == 0:
        quantized = plain.assignment @ codebook
        torch.testing.assert_close(result.assignment @ doubled, quantized, rtol=0, atol=1e-6)
    same = codebook[:1].expand(9, 3).contiguous()
    collapsed = exact.solve(latents, same, SolverConfig(lam=lam)).assignment @ same
    torch.testing.assert_close(collapsed, same[:1].expand(20, 3), rtol=0, atol=1e-9)


def test_running_out_of_iterations_falls_back_per_latent_and_counts() -> None:
    latents, codebook = random_problem(12, 40, 8, seed=4)
    full = exact.solve(latents, codebook, SolverConfig())
    assert full.fallback_count == 0
    hurried = exact.solve(latents, codebook, SolverConfig(max_iterations=2))
    assert hurried.fallback_count == int((full.iterations > 2).sum()) > 0
    torch.testing.assert_close(hurried.assignment, full.assignment, rtol=0, atol=1e-9)


@pytest.mark.parametrize("lam", [0.0, 0.3])
def test_the_slow_solver_agrees_and_survives_codes_almost_on_top_of_each_other(lam: float) -> None:
    latents, codebook = random_problem(6, 9, 3, seed=21)
    crowded = torch.cat((codebook, codebook + 1e-13, codebook))
    problem, centre = prepare(crowded, SolverConfig(lam=lam))
    wanted = exact.solve(latents, crowded, SolverConfig(lam=lam)).quantized
    for latent, quantized in zip(latents - centre, wanted - centre, strict=True):
        nearest = int(torch.cdist(latent[None], problem.codes).argmin())
        weights = solve_one(problem, latent, nearest, 1e-12)
        torch.testing.assert_close(weights @ problem.codes, quantized, rtol=0, atol=1e-7)


def test_the_residual_measures_distance_from_optimality() -> None:
    latents, codebook = random_problem(8, 12, 4, seed=6)
    best = exact.solve(latents, codebook, SolverConfig()).assignment
    uniform = torch.full((8, 12), 1 / 12, dtype=torch.float64)
    residual = kkt_residual(latents, codebook, uniform, 0.1)
    excess = objective(latents, codebook, uniform, 0.1) - objective(latents, codebook, best, 0.1)
    assert bool((2 * residual >= excess).all())
    negative = best.clone()
    negative[:, 0] -= 0.1
    assert bool((kkt_residual(latents, codebook, negative, 0.1) > 1e-3).all())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_latents_that_are_not_finite_are_refused_by_number(value: float) -> None:
    latents, codebook = random_problem(5, 6, 3, seed=0)
    latents[3, 1] = value
    with pytest.raises(InvalidLatents, match=r"1 of 5 .* first is latent 3"):
        exact.solve(latents, codebook, SolverConfig())


def test_unusable_shapes_dtypes_and_codebooks_are_refused() -> None:
    latents, codebook = random_problem(5, 6, 3, seed=0)
    config = SolverConfig()
    for bad_latents in (latents[:, :2], latents[0], latents[:0], latents.float(), latents.long()):
        with pytest.raises(InvalidLatents):
            exact.solve(bad_latents, codebook, config)
    with pytest.raises(InvalidLatents, match="float32"):
        exact.solve(latents.half(), codebook.half(), config)
    for bad_codebook in (codebook[:0], codebook[0], codebook / 0):
        with pytest.raises(InvalidCodebook):
            exact.solve(latents, bad_codebook, config)


@pytest.mark.parametrize(
    "field", [{"lam": -1.0}, {"lam": float("nan")}, {"tolerance": 0.0}, {"max_iterations": 0}]
)
def test_solver_config_refuses_values_out_of_range(field: dict[str, float]) -> None:
    with pytest.raises(InvalidCodebook, match=next(iter(field))):
        replace(SolverConfig(), **field)  # type: ignore[arg-type]


def test_the_oracle_names_the_package_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cvxpylayers.torch", None)
    latents, codebook = random_problem(2, 5, 3, seed=0)
    with pytest.raises(UnsupportedOperation, match=r"pip install 'vqstack\[oracle\]'"):
        SOLVERS["cvxpy"](latents, codebook, SolverConfig(lam=0.123))
