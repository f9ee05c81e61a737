"""Screening of many codes, warm starts, objectives, the relaxation and the conic solver."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from scq.errors import InvalidCodebook, InvalidLatents, UnsupportedOperation
from scq.layer import SCQLayer
from scq.solver import SOLVERS, SolverConfig, exact, kkt_residual, oracle, pricing, solve
from scq.solver.base import gradient_scale, half_gradient
from scq.solver.relaxed import project_by_sorting, project_by_sweeps, ridge_weights


def random_problem(
    num_latents: int, num_codes: int, code_dim: int, seed: int = 0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    latents = 1.3 * torch.randn(num_latents, code_dim, generator=generator, dtype=torch.float64)
    return latents, torch.randn(num_codes, code_dim, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("objective", ["nearest", "ridge"])
@pytest.mark.parametrize("shape", [(15, 600, 3), (12, 700, 12), (5, 2100, 24)])
def test_screening_finds_what_pricing_every_code_finds(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int], objective: str
) -> None:
    latents, codebook = random_problem(*shape)
    config = SolverConfig(objective=objective)  # type: ignore[arg-type]
    screened = exact.solve(latents, codebook, config)
    monkeypatch.setattr(pricing, "DIRECT_CODES", 10_000)
    direct = exact.solve(latents, codebook, config)
    torch.testing.assert_close(screened.assignment, direct.assignment, rtol=0, atol=1e-9)
    torch.testing.assert_close(screened.kkt_residual, direct.kkt_residual, rtol=0, atol=1e-9)


def test_screening_survives_more_copies_of_a_code_than_it_keeps() -> None:
    latents, codebook = random_problem(6, 12, 3)
    copies = codebook.repeat(60, 1)
    for solver in ("exact", "native"):
        crowded = solve(latents, copies, SolverConfig(lam=0.0), solver=solver)
        plain = solve(latents, codebook, SolverConfig(lam=0.0))
        torch.testing.assert_close(crowded.quantized, plain.quantized, rtol=0, atol=1e-6)
        # The nearest of equal codes is the first: with lam its pull goes there.
        pulled = solve(latents, copies, SolverConfig(lam=1e4), solver=solver).assignment
        nearest = torch.cdist(latents, codebook).argmin(1)
        assert torch.equal(pulled.argmax(1), nearest)


@pytest.mark.parametrize("solver", ["exact", "native"])
@pytest.mark.parametrize("num_codes", [40, 600])
def test_the_nearest_code_enters_for_its_bonus_alone(solver: str, num_codes: int) -> None:
    # Started without it, the nearest code must come in by pricing: its own gradient is too high
    # without the bonus at this lam, because the start already reproduces the latent.
    latents, codebook = random_problem(8, num_codes, 2, seed=3)
    config = SolverConfig(lam=20.0)
    nearest = torch.cdist(latents, codebook).argmin(1)
    others = torch.cdist(latents, codebook).topk(6, largest=False).indices[:, 1:]
    result = solve(latents, codebook, config, solver=solver, initial=others.contiguous())
    assert bool((result.assignment.gather(1, nearest[:, None]) > 0.3).all())
    scale = gradient_scale(latents - codebook.mean(0), codebook - codebook.mean(0), config.lam)
    residual = kkt_residual(latents, codebook, result.assignment, config.lam)
    assert bool((residual <= 1e-8 * scale).all())


@pytest.mark.parametrize("num_codes", [60, 700])
def test_a_warm_start_gives_the_same_answer_in_fewer_iterations(num_codes: int) -> None:
    latents, codebook = random_problem(40, num_codes, 8)
    cold = exact.solve(latents, codebook, SolverConfig())
    moved = latents + 0.01 * torch.randn(latents.shape, dtype=torch.float64)
    again = exact.solve(moved, codebook, SolverConfig())
    warm = exact.solve(moved, codebook, SolverConfig(), cold.sparse.support())
    torch.testing.assert_close(warm.assignment, again.assignment, rtol=0, atol=1e-9)
    assert warm.iterations.double().mean() < 0.6 * again.iterations.double().mean()


def test_repeated_and_missing_codes_in_a_start_do_no_harm() -> None:
    latents, codebook = random_problem(4, 30, 5)
    cold = exact.solve(latents, codebook, SolverConfig())
    starts = torch.tensor([[3, 3, 3, 3], [-1, -1, -1, -1], [5, -1, 5, 9], [0, 1, 2, 3]])
    warm = exact.solve(latents, codebook, SolverConfig(), starts)
    torch.testing.assert_close(warm.assignment, cold.assignment, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("initial", "message"),
    [
        (torch.zeros(3, 2, dtype=torch.int64), r"shape \(4, W\)"),
        (torch.zeros(4, 2), "torch.float32"),
        (torch.full((4, 2), 30), "names code 30, the codebook has 30"),
    ],
)
def test_starts_that_do_not_fit_are_refused(initial: Tensor, message: str) -> None:
    with pytest.raises(InvalidLatents, match=message):
        exact.solve(*random_problem(4, 30, 5), SolverConfig(), initial)


def test_ridge_tends_to_the_mean_and_nearest_to_plain_quantization() -> None:
    latents, codebook = random_problem(6, 24, 4)
    ridge = solve(latents, codebook, SolverConfig(lam=1e7, objective="ridge"))
    torch.testing.assert_close(
        ridge.assignment, torch.full((6, 24), 1 / 24, dtype=torch.float64), rtol=0, atol=1e-4
    )
    hard = solve(latents, codebook, SolverConfig(lam=1e7))
    nearest = codebook[torch.cdist(latents, codebook).argmin(1)]
    torch.testing.assert_close(hard.quantized, nearest, rtol=0, atol=1e-4)


def test_the_ridge_gradient_matches_finite_differences() -> None:
    latents, codebook = random_problem(4, 10, 3, seed=2)

    def quantize(z: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        result = exact.solve(z, c, SolverConfig(lam=0.2, objective="ridge"))
        return result.quantized, result.assignment

    inputs = (latents.requires_grad_(), codebook.requires_grad_())
    assert torch.autograd.gradcheck(quantize, inputs, eps=1e-6, atol=1e-5)


def test_the_relaxation_before_projection_has_no_gradient_left() -> None:
    latents, codebook = random_problem(7, 20, 5)
    for config in (SolverConfig(lam=0.3), SolverConfig(lam=0.3, objective="ridge")):
        free = ridge_weights(latents, codebook, config)
        gradient = half_gradient(latents, codebook, free, config)
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-10)


def test_sorting_gives_the_nearest_point_of_the_simplex() -> None:
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(50, 9, generator=generator, dtype=torch.float64)
    projected = project_by_sorting(points)
    torch.testing.assert_close(projected.sum(1), torch.ones(50, dtype=torch.float64))
    assert bool((projected >= 0).all())
    # Optimality: (x - p).(q - p) <= 0 for every vertex q.
    slope = points - projected
    assert bool((slope.amax(1) - (slope * projected).sum(1) <= 1e-12).all())


def test_more_sweeps_come_closer_to_the_simplex() -> None:
    points = torch.randn(50, 30, dtype=torch.float64)
    negative = [
        float(project_by_sweeps(points, sweeps).clamp(max=0).sum().abs()) for sweeps in (1, 5, 20)
    ]
    assert negative[0] > negative[1] > negative[2] > 0
    sums = project_by_sweeps(points, 3).sum(1)
    torch.testing.assert_close(sums, torch.ones(50, dtype=torch.float64))


@pytest.mark.parametrize("projection", ["sweeps", "sort"])
def test_the_relaxation_is_differentiable_and_its_certificate_admits_the_miss(
    projection: str,
) -> None:
    latents, codebook = random_problem(5, 16, 4, seed=4)
    config = SolverConfig(lam=0.5, projection=projection)  # type: ignore[arg-type]

    def quantize(z: Tensor, c: Tensor) -> Tensor:
        return SOLVERS["relaxed"](z, c, config).quantized

    result = SOLVERS["relaxed"](latents, codebook, config)
    assert bool((result.kkt_residual > 1e-3).any())
    assert result.iterations.tolist() == [20 if projection == "sweeps" else 1] * 5
    inputs = (latents.requires_grad_(), codebook.requires_grad_())
    assert torch.autograd.gradcheck(quantize, inputs, eps=1e-7, atol=1e-5)


def test_the_relaxation_refuses_lam_zero() -> None:
    with pytest.raises(UnsupportedOperation, match="lam > 0; use 'exact'"):
        SOLVERS["relaxed"](*random_problem(2, 3, 2), SolverConfig(lam=0.0))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("method", ["SCS", "Clarabel"])
def test_ridge_and_nearest_match_the_conic_solvers(method: str) -> None:
    pytest.importorskip("cvxpylayers")
    latents, codebook = random_problem(3, 9, 3, seed=6)
    settings = dict(oracle.SOLVER_ARGS) if method == "SCS" else {"solve_method": method}
    for config in (SolverConfig(lam=0.2), SolverConfig(lam=0.2, objective="ridge")):
        ours = solve(latents, codebook, config)
        theirs = oracle.solve_with(latents, codebook, config, settings)
        torch.testing.assert_close(ours.assignment, theirs.assignment, rtol=0, atol=1e-4)


def test_the_layer_takes_objective_lam_start_and_sparse() -> None:
    torch.manual_seed(0)
    layer = SCQLayer(4, 20, sparse=True, objective="ridge")
    grid = torch.randn(2, 3, 2, 4)
    _, sparse, cold = layer(grid)
    assert sparse.support().shape[:3] == (2, 3, 2)
    quantized, again, warm = layer(grid, lam=0.1, initial=sparse.support())
    torch.testing.assert_close(again.dense() @ layer.codebook, quantized, rtol=0, atol=1e-5)
    assert warm.max_iterations <= cold.max_iterations
    assert warm.mean_iterations < cold.mean_iterations
    assert cold.max_support_size >= cold.mean_support_size
    hard, _, _ = SCQLayer(4, 20)(grid, lam=1e6)
    assert torch.isfinite(hard).all()
    assert "objective='ridge'" in repr(layer)


def test_qpth_is_refused_with_the_reason() -> None:
    with pytest.raises(InvalidCodebook, match="numpy < 2"):
        SCQLayer(4, 8, solver="qpth")


@pytest.mark.parametrize("field", ["objective", "projection"])
def test_unknown_options_are_refused_with_the_known_ones(field: str) -> None:
    with pytest.raises(InvalidCodebook, match=f"{field} is 'magic'"):
        SolverConfig(**{field: "magic"})  # type: ignore[arg-type]


def test_a_large_codebook_trains_without_a_dense_assignment() -> None:
    layer = SCQLayer(16, 16384, sparse=True)
    latents = torch.randn(64, 16, requires_grad=True)
    quantized, sparse, stats = layer(latents)
    quantized.square().sum().backward()
    assert sparse.weights.shape[1] < 64
    assert stats.max_kkt_residual < 1e-6
    assert layer.codebook.grad is not None
    assert 0 < int((layer.codebook.grad.abs().sum(1) > 0).sum()) <= 64 * 64


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["exact", "native"])
def test_the_largest_problem_is_certified(solver: str) -> None:
    generator = torch.Generator().manual_seed(0)
    codebook = torch.randn(65536, 256, generator=generator) / math.sqrt(256)
    latents = torch.randn(16, 256, generator=generator) / math.sqrt(256)
    result = solve(latents, codebook, SolverConfig(), solver=solver)
    residual = kkt_residual(latents.double(), codebook.double(), result.assignment.double(), 0.1)
    assert bool((residual < 1e-5).all())
    assert float(result.kkt_residual.max()) < 1e-8
