"""The step towards full-precision outputs."""

from __future__ import annotations

import pytest
import torch

from vqllm.quantization import correction
from vqllm.quantization.correction import CrossMoment, corrected
from vqllm.quantization.hessian import Hessian, factorize


def streams(num_rows: int = 300, size: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(num_rows, size, generator=generator)
    return reference, reference + 0.3 * torch.randn(num_rows, size, generator=generator)


@pytest.mark.parametrize("num_outputs", [4, 30])  # fewer than inputs, and more
def test_the_moment_is_the_same_in_both_forms(num_outputs: int) -> None:
    reference, inputs = streams()
    weights = {"a": torch.randn(num_outputs, 12), "b": torch.randn(1, 12)}
    moment, rest = CrossMoment(weights), CrossMoment(weights)
    moment.add(reference[:100], inputs[:100])
    rest.add(reference[100:], inputs[100:])
    moment.merge(rest)
    for part, weight in weights.items():
        wanted = weight.double() @ (reference - inputs).double().T @ inputs.double()
        torch.testing.assert_close(moment.of(part), wanted, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(moment.of(part, slice(0, 1)), moment.of(part)[:1])


def test_the_whole_step_is_the_least_squares_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(correction, "_ROWS", 3)
    monkeypatch.setattr(correction, "_COLUMNS", 5)
    reference, inputs = streams()
    weight = torch.randn(7, 12)
    moment, hessian = CrossMoment({"a": weight}), Hessian(12)
    moment.add(reference, inputs)
    hessian.add(inputs)
    factor = factorize(hessian.total, 1e-9)
    found = corrected(weight, moment.of("a"), factor, 1.0)
    wanted = torch.linalg.lstsq(inputs.double(), (reference @ weight.T).double()).solution.T
    torch.testing.assert_close(found, wanted.float(), rtol=1e-3, atol=1e-4)
    half = corrected(weight, moment.of("a"), factor, 0.5)
    torch.testing.assert_close(half, (weight + found) / 2, rtol=1e-4, atol=1e-5)
    assert torch.equal(corrected(weight, moment.of("a"), factor, 0.0), weight)
