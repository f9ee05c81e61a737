"""Tuning of tiny models: gradients, exact forms of every method, and never worse than before."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from vqllm.checkpoint import FINAL_NORM, Checkpoint
from vqllm.errors import CalibrationError, InvalidConfig, UnsupportedModel
from vqllm.outlier.quarot import QuarotOptions, RotatedSource
from vqllm.output_head import OutputHead
from vqllm.quantization.base import GroupedSpec, MethodOptions, QuantizedLinear
from vqllm.quantization.gptq import GptqOptions
from vqllm.quantization.hessian import factorize
from vqllm.quantization.methods import method_of
from vqllm.quantization.tcq import TcqOptions
from vqllm.quantization.vptq import VptqOptions
from vqllm.sources import PlainSource, WeightSource, source_logits
from vqllm.tuning.linears import TunableLinear
from vqllm.tuning.loss import divergence
from vqllm.tuning.student import Student
from vqllm.tuning.tune import TuningConfig, TuningStep, tune

METHODS: list[MethodOptions] = [
    GptqOptions(GroupedSpec(2, 32)),
    GptqOptions(GroupedSpec(4, 128)),
    TcqOptions(2),
    TcqOptions(2, group_size=32, column_scales=True),
    VptqOptions(4, 16, 4),
]

SMALL = TuningConfig(steps=8, batch_windows=4, validation_windows=4, dtype=torch.float32)

Windows = NDArray[np.int64]


def quantized(weight: torch.Tensor, options: MethodOptions) -> QuantizedLinear:
    factor = factorize(torch.eye(weight.shape[1], dtype=torch.float64), 0.01)
    linear: QuantizedLinear = method_of(options.method).quantize(weight, factor, options)
    return linear


def quantized_model(source: WeightSource, options: MethodOptions) -> dict[str, QuantizedLinear]:
    return {
        f"model.layers.{layer}.{part}": quantized(weight, options)
        for layer in range(source.config.num_layers)
        for part, weight in source.block(layer).linears.items()
    }


@pytest.fixture
def text() -> Windows:
    return np.random.default_rng(5).integers(0, 256, (80, 24)).astype(np.int64)


@pytest.mark.parametrize("options", METHODS)
def test_a_linear_projects_as_it_is_stored(options: MethodOptions) -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    linear = quantized(weight, options)
    inputs = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    expected = inputs @ torch.from_numpy(linear.dequantize()).T
    found = TunableLinear(linear, torch.float32).project(inputs)
    assert torch.allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("options", METHODS)
def test_gradients_agree_with_differences(options: MethodOptions) -> None:
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    linear = TunableLinear(quantized(weight, options), torch.float32)
    inputs = torch.randn(7, 64, generator=torch.Generator().manual_seed(1))
    slopes = torch.randn(7, 32, generator=torch.Generator().manual_seed(2))
    (linear.project(inputs) * slopes).sum().backward()  # type: ignore[no-untyped-call]
    linear.finish()
    assert linear.tunables
    for tunable in linear.tunables:
        gradient = tunable.change.grad
        assert gradient is not None
        direction = torch.sign(gradient)
        values = []
        for step in (1e-3, -1e-3):
            with torch.no_grad():
                tunable.change += step * direction
                linear.begin()
                values.append(float((linear.project(inputs) * slopes).sum()))
                tunable.change -= step * direction
        expected = float((gradient * direction).sum())
        assert (values[0] - values[1]) / 2e-3 == pytest.approx(expected, rel=0.02, abs=0.02)


@pytest.mark.parametrize("options", METHODS)
def test_an_untouched_linear_comes_back_as_it_was(options: MethodOptions) -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    linear = quantized(weight, options)
    back = TunableLinear(linear, torch.float32).tuned()
    assert type(back) is type(linear)
    for part, array in linear.tensors().items():
        assert np.array_equal(back.tensors()[part], array), part


def test_the_student_is_the_stored_model(tiny_folder: Path, text: Windows) -> None:
    source = RotatedSource(PlainSource(Checkpoint(tiny_folder)), QuarotOptions())
    linears = quantized_model(source, TcqOptions(4))
    head = OutputHead.of(source, torch.float32)
    tokens = torch.from_numpy(text[:2])
    with torch.no_grad():
        full = Student(source, {}, head, recompute=False)
        logits = head.project(head.normed(full.hidden(tokens), full.final_norm))
        assert torch.allclose(logits, source_logits(source, tokens), atol=1e-4)
        hidden = Student(source, linears, head, recompute=False).hidden(tokens)
    assert not torch.allclose(hidden, full.hidden(tokens), atol=1e-3)


def test_recomputing_gives_the_same_gradients(tiny_folder: Path, text: Windows) -> None:
    source = PlainSource(Checkpoint(tiny_folder))
    linears = quantized_model(source, TcqOptions(2))
    head = OutputHead.of(source, torch.float32)
    gradients = []
    for recompute in (False, True):
        student = Student(source, linears, head, recompute)
        student.hidden(torch.from_numpy(text[:1])).square().sum().backward()  # type: ignore[no-untyped-call]
        student.finish()
        gradients.append([t.change.grad for t in student.tunables if t.change.grad is not None])
    assert len(gradients[0]) > 10
    for kept, recomputed in zip(*gradients, strict=True):
        assert torch.allclose(kept, recomputed, rtol=1e-4, atol=1e-5)


def test_the_divergence_and_its_gradient(tiny_folder: Path) -> None:
    source = PlainSource(Checkpoint(tiny_folder))
    head = OutputHead.of(source, torch.float32)
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(300, 64, generator=generator) / 8
    student = (torch.randn(300, 64, generator=generator)).requires_grad_()
    norm = head.norm.clone().requires_grad_()
    found = torch.autograd.grad(divergence(head, teacher, student, norm), (student, norm))
    log_p = head.project(teacher).log_softmax(-1)
    log_q = head.project(head.normed(student, norm)).log_softmax(-1)
    plain = (log_p.exp() * (log_p - log_q)).sum()
    assert divergence(head, teacher, student, norm).item() == pytest.approx(plain.item(), rel=1e-4)
    for one, other in zip(found, torch.autograd.grad(plain, (student, norm)), strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("options", [METHODS[0], METHODS[2], METHODS[4]])
def test_tuning_brings_a_model_closer(
    tiny_folder: Path, text: Windows, options: MethodOptions
) -> None:
    source = PlainSource(Checkpoint(tiny_folder))
    linears = quantized_model(source, options)
    steps: list[TuningStep] = []
    result = tune(source, linears, text, SMALL, steps.append)
    assert result.accepted
    assert result.after < result.before
    assert [step.step for step in steps] == list(range(1, SMALL.steps + 1))
    assert FINAL_NORM in result.norms
    assert len(result.norms) == 1 + 2 * source.config.num_layers
    codes = {"gptq": "qweight", "tcq": "codes", "vptq": "indices"}[options.method]
    for name, linear in result.linears.items():
        assert np.array_equal(linear.tensors()[codes], linears[name].tensors()[codes])
        assert linear.num_bytes == linears[name].num_bytes


def test_the_same_seed_gives_the_same_model(tiny_folder: Path, text: Windows) -> None:
    source = PlainSource(Checkpoint(tiny_folder))
    linears = quantized_model(source, TcqOptions(2))
    one, other = (tune(source, linears, text, SMALL) for _ in range(2))
    for name, linear in one.linears.items():
        assert np.array_equal(linear.dequantize(), other.linears[name].dequantize())


def test_what_does_not_help_is_not_taken(tiny_folder: Path, text: Windows) -> None:
    source = PlainSource(Checkpoint(tiny_folder))
    linears = quantized_model(source, TcqOptions(4))
    result = tune(source, linears, text, replace(SMALL, learning_rate=10.0, steps=3))
    assert not result.accepted
    assert result.after == result.before
    assert result.norms == {}
    assert result.linears == linears


def test_no_steps_change_nothing(tiny_folder: Path, text: Windows) -> None:
    source = PlainSource(Checkpoint(tiny_folder))
    linears = quantized_model(source, TcqOptions(3))
    assert not tune(source, linears, text, replace(SMALL, steps=0)).accepted


def test_the_rate_rises_and_falls() -> None:
    config = TuningConfig(steps=50, learning_rate=1.0, warmup=0.1)
    rates = [config.rate(step) for step in range(50)]
    assert max(rates) == pytest.approx(1.0)
    assert rates[0] < rates[4] < 1
    assert rates[-1] < 0.01
    assert min(rates) > 0


def test_bad_input(tiny_folder: Path, text: Windows) -> None:
    source = PlainSource(Checkpoint(tiny_folder))
    linears = quantized_model(source, TcqOptions(2))
    with pytest.raises(CalibrationError, match="keeps 4 windows back"):
        tune(source, linears, text[:2], SMALL)
    with pytest.raises(UnsupportedModel, match="no linear of this model"):
        tune(source, {"model.layers.9.mlp.up_proj": next(iter(linears.values()))}, text, SMALL)
    fields: list[dict[str, Any]] = [
        {"steps": -1},
        {"batch_windows": 0},
        {"learning_rate": 0.0},
        {"warmup": 1.0},
    ]
    for field in fields:
        with pytest.raises(InvalidConfig, match=next(iter(field))):
            TuningConfig(**field)


@pytest.mark.gpu
def test_it_runs_on_a_gpu(tiny_folder: Path, text: Windows) -> None:
    source = PlainSource(Checkpoint(tiny_folder))
    linears = quantized_model(source, TcqOptions(2))
    result = tune(source, linears, text, replace(SMALL, device="cuda"))
    assert result.after <= result.before
