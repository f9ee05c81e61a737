"""The native solver behind autograd: the answers, gradients and statistics of the torch solver."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from scq.errors import UnsupportedOperation
from scq.layer import SCQLayer
from scq.solver import SolverConfig, SolveResult, native, solve
from scq.solver.base import gradient_scale
from vqkernels import NativeStatus, forced_isa, native_status, supported_isas

if not native_status().available:
    pytest.skip(native_status().reason, allow_module_level=True)

SHAPES = [(1, 1, 1), (4, 2, 1), (9, 3, 8), (30, 16, 4), (25, 128, 16), (12, 700, 9), (6, 1100, 32)]


def random_problem(num_latents: int, num_codes: int, code_dim: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_latents * num_codes)
    latents = 1.3 * torch.randn(num_latents, code_dim, generator=generator, dtype=torch.float64)
    return latents, torch.randn(num_codes, code_dim, generator=generator, dtype=torch.float64)


def differentiated(
    name: str, latents: Tensor, codebook: Tensor, config: SolverConfig
) -> tuple[SolveResult, Tensor, Tensor]:
    z, c = latents.clone().requires_grad_(), codebook.clone().requires_grad_()
    result = solve(z, c, config, solver=name)
    generator = torch.Generator().manual_seed(1)
    slope = torch.randn(latents.shape, generator=generator, dtype=torch.float64)
    loss = (result.quantized * slope.to(latents.dtype)).sum()
    if config.lam > 0:
        loss = loss + result.assignment.square().sum()
    grad_latents, grad_codebook = torch.autograd.grad(loss, (z, c))
    return result, grad_latents, grad_codebook


@pytest.mark.parametrize(
    ("lam", "objective"), [(0.0, "nearest"), (0.1, "nearest"), (5.0, "nearest"), (0.1, "ridge")]
)
@pytest.mark.parametrize("shape", SHAPES)
def test_native_equals_torch(shape: tuple[int, int, int], lam: float, objective: str) -> None:
    latents, codebook = random_problem(*shape)
    config = SolverConfig(lam=lam, objective=objective)  # type: ignore[arg-type]
    theirs, *their_gradients = differentiated("exact", latents, codebook, config)
    for tier in supported_isas():
        with forced_isa(tier):
            ours, *gradients = differentiated("native", latents, codebook, config)
        torch.testing.assert_close(ours.quantized, theirs.quantized, rtol=0, atol=1e-9)
        if lam > 0:
            torch.testing.assert_close(ours.assignment, theirs.assignment, rtol=0, atol=1e-9)
        for ours_gradient, gradient in zip(gradients, their_gradients, strict=True):
            torch.testing.assert_close(ours_gradient, gradient, rtol=1e-6, atol=1e-6)
        centre = codebook.mean(0)
        scale = gradient_scale(latents - centre, codebook - centre, lam)
        assert bool((ours.kkt_residual <= 1e-9 * scale).all())


def test_float32_keeps_its_dtype_and_agrees() -> None:
    latents, codebook = (x.float() for x in random_problem(20, 64, 8))
    theirs, *their_gradients = differentiated("exact", latents, codebook, SolverConfig())
    ours, *gradients = differentiated("native", latents, codebook, SolverConfig())
    for left, right in zip(
        (ours.quantized, ours.assignment, *gradients),
        (theirs.quantized, theirs.assignment, *their_gradients),
        strict=True,
    ):
        assert left.dtype == torch.float32
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)


def test_gradients_match_finite_differences() -> None:
    latents, codebook = random_problem(5, 12, 4)

    def quantize(z: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        result = native.solve(z, c, SolverConfig())
        return result.quantized, result.assignment

    inputs = (latents.requires_grad_(), codebook.requires_grad_())
    assert torch.autograd.gradcheck(quantize, inputs, eps=1e-6, atol=1e-5)


def test_starting_from_the_answer_takes_one_iteration_each() -> None:
    latents, codebook = random_problem(40, 200, 8)
    cold = native.solve(latents, codebook, SolverConfig())
    warm = native.solve(latents, codebook, SolverConfig(), cold.sparse.support())
    assert bool((warm.iterations == 1).all())
    torch.testing.assert_close(warm.assignment, cold.assignment, rtol=0, atol=1e-12)


def test_any_start_leads_to_the_same_answer() -> None:
    latents, codebook = random_problem(30, 60, 6)
    cold = native.solve(latents, codebook, SolverConfig())
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(-1, 60, (30, 9), generator=generator)
    starts[:5] = -1
    warm = native.solve(latents, codebook, SolverConfig(), starts)
    torch.testing.assert_close(warm.assignment, cold.assignment, rtol=0, atol=1e-9)


@pytest.mark.parametrize("lam", [0.0, 0.1])
@pytest.mark.parametrize("width", [40, 70])
def test_a_long_start_is_solved_without_falling_back(width: int, lam: float) -> None:
    latents, codebook = random_problem(13, 443, 39)
    generator = torch.Generator().manual_seed(2)
    starts = torch.randint(-1, 443, (13, width), generator=generator)
    warm = native.solve(latents, codebook, SolverConfig(lam=lam), starts)
    cold = native.solve(latents, codebook, SolverConfig(lam=lam))
    assert warm.fallback_count == cold.fallback_count == 0
    torch.testing.assert_close(warm.quantized, cold.quantized, rtol=0, atol=1e-9)


@pytest.mark.parametrize("lam", [0.0, 0.1])
def test_duplicate_and_collinear_codes_are_solved_all_the_same(lam: float) -> None:
    latents, codebook = random_problem(20, 10, 3)
    line = torch.linspace(-1, 1, 9, dtype=torch.float64)[:, None] * codebook[:1]
    for hard in (torch.cat((codebook, codebook, codebook)), line, codebook[:1].expand(9, 3)):
        hard = hard.contiguous()
        theirs = solve(latents, hard, SolverConfig(lam=lam)).quantized
        ours = solve(latents, hard, SolverConfig(lam=lam), solver="native")
        torch.testing.assert_close(ours.quantized, theirs, rtol=0, atol=1e-6)


def test_latents_without_a_native_answer_are_solved_by_torch_and_counted() -> None:
    latents, codebook = random_problem(20, 40, 8)
    config = SolverConfig(max_iterations=7)
    ours, *gradients = differentiated("native", latents, codebook, config)
    full, *expected = differentiated("native", latents, codebook, SolverConfig())
    assert 0 < ours.fallback_count < 20
    torch.testing.assert_close(ours.assignment, full.assignment, rtol=0, atol=1e-9)
    for left, right in zip(gradients, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-6)


def test_extreme_scales_keep_the_answer() -> None:
    latents, codebook = random_problem(10, 40, 6)
    base = native.solve(latents, codebook, SolverConfig(lam=0.1)).assignment
    for scale, offset in itertools.product((2.0**-60, 1.0, 2.0**60), (0.0, 8.0)):
        moved = native.solve(
            (latents + offset) * scale,
            (codebook + offset) * scale,
            SolverConfig(lam=0.1 * scale**2),
        )
        torch.testing.assert_close(moved.assignment, base, rtol=0, atol=1e-9)


def test_threads_are_an_option_that_changes_nothing() -> None:
    latents, codebook = random_problem(80, 50, 6)
    alone = native.solve(latents, codebook, SolverConfig())
    together = native.solve(latents, codebook, SolverConfig(num_threads=2))
    assert torch.equal(alone.assignment, together.assignment)


def test_the_layer_trains_on_the_native_solver() -> None:
    layer = SCQLayer(4, 12, solver="native")
    quantized, assignment, stats = layer(torch.randn(2, 3, 5, 4))
    quantized.square().sum().backward()
    assert assignment.shape == (2, 3, 5, 12)
    assert layer.codebook.grad is not None
    assert stats.fallback_count == 0


def test_tensors_elsewhere_and_too_many_features_are_refused() -> None:
    with pytest.raises(UnsupportedOperation, match="1024 features"):
        native.solve(torch.zeros(2, 1025), torch.eye(1025), SolverConfig())


def test_a_missing_library_is_named_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = NativeStatus(available=False, isa="", reason="no compiler", executors=())
    monkeypatch.setattr(native, "native_status", lambda: missing)
    with pytest.raises(UnsupportedOperation, match=r"no compiler; use solver 'exact'"):
        native.solve(*random_problem(2, 3, 2), SolverConfig())
    latents, codebook = random_problem(4, 9, 3)
    chosen = solve(latents, codebook, solver="auto")
    wanted = solve(latents, codebook, solver="exact")
    assert torch.equal(chosen.quantized, wanted.quantized)


def test_auto_takes_the_library_where_it_fits() -> None:
    latents, codebook = random_problem(4, 9, 3)
    result = solve(latents, codebook, solver="auto")
    assert torch.equal(result.quantized, solve(latents, codebook, solver="native").quantized)
    wide = torch.zeros(2, 1025, dtype=torch.float64)
    assert solve(wide, wide + 1, solver="auto").support_size.tolist() == [1, 1]
