"""SCQLayer: shapes, dtypes, statistics and refusals."""

from __future__ import annotations

import pytest
import torch

from scq.errors import InvalidCodebook, InvalidLatents
from scq.layer import SCQLayer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(7, 4), (2, 3, 5, 4)])
def test_outputs_follow_the_latents_shape_and_dtype(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    layer = SCQLayer(codebook_dim=4, num_codes=9, lam=0.1)
    latents = torch.randn(shape, dtype=dtype, requires_grad=True)
    quantized, assignment, _ = layer(latents)
    assert quantized.shape == latents.shape
    assert assignment.shape == (*shape[:-1], 9)
    assert quantized.dtype == assignment.dtype == dtype
    quantized.square().sum().backward()
    assert latents.grad is not None
    assert latents.grad.shape == latents.shape
    assert layer.codebook.grad is not None
    assert layer.codebook.shape == (9, 4)


def test_a_grid_is_solved_like_its_flattened_latents() -> None:
    layer = SCQLayer(3, 12).double()
    grid = torch.randn(2, 3, 4, 3, dtype=torch.float64)
    quantized, assignment, _ = layer(grid)
    flat_quantized, flat_assignment, _ = layer(grid.reshape(-1, 3))
    torch.testing.assert_close(quantized.reshape(-1, 3), flat_quantized)
    torch.testing.assert_close(assignment.reshape(-1, 12), flat_assignment)


def test_stats_describe_the_use_of_the_codebook() -> None:
    layer = SCQLayer(2, 4, lam=1e6).double()
    corners = torch.tensor([[1, 1], [1, -1], [-1, 1], [-1, -1]], dtype=torch.float64)
    with torch.no_grad():
        layer.codebook.copy_(corners)
    _, _, stats = layer(1.1 * corners[[0, 0, 1, 1]])
    assert stats.top1_usage == 0.5
    assert stats.perplexity == pytest.approx(2.0)
    assert stats.mass_perplexity == pytest.approx(2.0, abs=1e-3)
    assert stats.mean_support_size >= 1
    assert stats.mean_iterations >= 1
    assert stats.max_kkt_residual < 1e-2
    assert stats.fallback_count == 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_oracle_is_selectable_and_agrees() -> None:
    pytest.importorskip("cvxpylayers")
    exact, oracle = SCQLayer(3, 8), SCQLayer(3, 8, solver="cvxpy")
    oracle.load_state_dict(exact.state_dict())
    latents = torch.randn(4, 3)
    torch.testing.assert_close(oracle(latents)[0], exact(latents)[0], rtol=0, atol=1e-5)


def test_a_gradient_step_on_the_codebook_lowers_the_quantization_error() -> None:
    torch.manual_seed(0)
    layer = SCQLayer(4, 8).double()
    latents = 2 * torch.randn(60, 4, dtype=torch.float64)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    losses = []
    for _ in range(20):
        loss = (layer(latents)[0] - latents).square().sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4), (1, 2, 2, 2, 4), (3, 5), (0, 4)])
def test_other_latent_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidLatents):
        SCQLayer(4, 8)(torch.zeros(shape))


def test_nan_latents_are_refused() -> None:
    with pytest.raises(InvalidLatents, match="NaN"):
        SCQLayer(4, 8)(torch.full((2, 4), float("nan")))


@pytest.mark.parametrize("arguments", [(0, 8), (4, 0), (4, 8, -1.0)])
def test_unusable_sizes_are_refused(arguments: tuple[int, ...]) -> None:
    with pytest.raises(InvalidCodebook):
        SCQLayer(*arguments)


def test_an_unknown_solver_is_refused_with_those_that_exist() -> None:
    with pytest.raises(InvalidCodebook, match="'exact'"):
        SCQLayer(4, 8, solver="magic")
