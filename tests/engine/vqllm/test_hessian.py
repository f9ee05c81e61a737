"""Hessians, their factors, and factoring in place."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vqllm.errors import CalibrationError
from vqllm.quantization import hessian as hessian_module
from vqllm.quantization.hessian import Hessian, factorize
from vqllm.quantization.triangular import cholesky_, invert_lower_, permute_


def random_hessian(size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(3 * size, size, dtype=torch.float64, generator=generator)
    rows *= torch.linspace(0.1, 3, size, dtype=torch.float64)
    gram = rows.T @ rows
    return (gram + gram.T) / 2


def test_it_is_the_mean_of_outer_products_in_any_batches() -> None:
    inputs = torch.randn(4, 6, 5)
    whole, first, second = Hessian(5), Hessian(5), Hessian(5)
    whole.add(inputs)
    first.add(inputs[:1])
    second.add(inputs[1:])
    first.merge(second)
    rows = inputs.reshape(-1, 5).double()
    torch.testing.assert_close(whole.value, rows.T @ rows / 24, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(first.value, whole.value, rtol=1e-5, atol=1e-6)
    assert first.num_rows == 24


@pytest.mark.parametrize("act_order", [True, False])
def test_the_factor_is_the_inverse_in_the_order_of_the_sweep(act_order: bool) -> None:
    factor = factorize(random_hessian(40), 0.01, act_order)
    ordered = factor.hessian[factor.order][:, factor.order]
    upper = factor.upper.double()
    assert torch.equal(factor.upper, factor.upper.triu())
    torch.testing.assert_close(
        upper.T @ upper @ ordered, torch.eye(40, dtype=torch.float64), rtol=0, atol=1e-4
    )
    if act_order:
        assert (ordered.diagonal().diff() <= 0).all()
    else:
        assert factor.order.tolist() == list(range(40))


@pytest.mark.parametrize("size", [64, 70, 33])
def test_the_blocked_factor_is_the_same_and_leaves_the_hessian(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = factorize(random_hessian(size), 0.01)
    monkeypatch.setattr(hessian_module, "BLOCKED_FROM", 1)
    original = random_hessian(size)
    working = original.clone()
    order = plain.order
    upper = hessian_module._inverse_cholesky_blocked(working, order, block=16)
    assert torch.equal(working, original)
    assert torch.equal(upper, upper.triu())
    damped = factorize(original, 0.01)
    torch.testing.assert_close(damped.upper, plain.upper, rtol=1e-5, atol=1e-7)


def test_damping_in_place_changes_the_diagonal_alone() -> None:
    original = random_hessian(12)
    working = original.clone()
    factor = factorize(working, 0.5, overwrite=True)
    assert factor.hessian is working
    off = ~torch.eye(12, dtype=torch.bool)
    assert torch.equal(working[off], original[off])
    added = working.diagonal() - original.diagonal()
    torch.testing.assert_close(added, (0.5 * original.diagonal().mean()).expand(12))
    assert torch.equal(factorize(original, 0.5).upper, factor.upper)
    assert torch.equal(original, random_hessian(12))


def test_the_scale_of_the_hessian_does_not_matter_to_the_feedback() -> None:
    first, second = (factorize(random_hessian(10) * s, 0.01).upper for s in (1.0, 4.0))
    torch.testing.assert_close(first, second * 2)


def test_inputs_that_never_fired_are_left_alone() -> None:
    hessian = random_hessian(6)
    hessian[2], hessian[:, 2] = 0, 0
    factor = factorize(hessian, 0.01)
    assert factor.hessian[2, 2] > 0
    assert torch.isfinite(factor.upper).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_hessian_that_is_not_finite_is_refused(bad: float) -> None:
    hessian = random_hessian(6)
    hessian[1, 1] = bad
    with pytest.raises(CalibrationError, match="NaN or infinite"):
        factorize(hessian, 0.01)


@pytest.mark.parametrize("blocked_from", [1, 10**6])
def test_a_hessian_that_is_not_definite_is_refused(
    blocked_from: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hessian_module, "BLOCKED_FROM", blocked_from)
    hessian = torch.eye(6, dtype=torch.float64)
    hessian[0, 1] = hessian[1, 0] = 5
    with pytest.raises(CalibrationError, match="not positive definite; use more"):
        factorize(hessian, 0.01)


def test_triangular_steps_match_lapack() -> None:
    original = random_hessian(50)
    working = original.clone()
    assert cholesky_(working, block=16)
    lower = torch.linalg.cholesky(original)
    for start in range(0, 50, 16):
        torch.testing.assert_close(
            working[start:, start : start + 16].tril(), lower[start:, start : start + 16].tril()
        )
    invert_lower_(working, block=16)
    inverse = torch.linalg.inv(lower)
    torch.testing.assert_close(working[32:, :32], inverse[32:, :32])
    assert torch.equal(working[:16, 16:], original[:16, 16:])


def test_permuting_in_place() -> None:
    original = random_hessian(23)
    working, order = (
        original.clone(),
        torch.randperm(23, generator=torch.Generator().manual_seed(1)),
    )
    permute_(working, order, chunk=4)
    assert torch.equal(working, original[order][:, order])
