"""Linears of one input: search for the damping, correction, error."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vqllm.quantization import layer
from vqllm.quantization.base import GroupedSpec
from vqllm.quantization.gptq import GptqOptions
from vqllm.quantization.layer import GroupQuantizer, LinearTask
from vqllm.quantization.mappers import LocalMapper
from vqllm.quantization.moments import MomentSums
from vqllm.quantization.walks import TapPair

OPTIONS = GptqOptions(GroupedSpec(2, 32))
DAMPINGS = (0.001, 0.03, 0.9)


def inputs(seed: int) -> tuple[Tensor, Tensor]:
    """Few rows of correlated inputs in full precision, and the same disturbed."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(64, 64, generator=torch.Generator().manual_seed(9))
    reference = torch.randn(120, 64, generator=generator) @ mixing
    return reference, reference + torch.randn(120, 64, generator=generator)


def counted(task: LinearTask, alpha: float, hold_out: bool = True) -> MomentSums:
    reference, rows = inputs(0)
    sums = MomentSums({"a": task.weight}, 12, alpha > 0, hold_out)
    window = torch.arange(120) // 10
    sums.add(TapPair(rows, reference, window, window))
    return sums


def task(num_rows: int = 32) -> LinearTask:
    generator = torch.Generator().manual_seed(3)
    return LinearTask(torch.randn(num_rows, 64, generator=generator), OPTIONS)


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_the_damping_of_least_held_out_error_is_chosen(alpha: float) -> None:
    work = task()
    reference, rows = inputs(0)
    is_held_out = torch.arange(120) // 10 % 8 == 7
    seen, held = rows[is_held_out], reference[is_held_out]
    errors = []
    for damping in DAMPINGS:
        sums = MomentSums({"a": work.weight}, 12, alpha > 0, False)
        window = torch.zeros(int((~is_held_out).sum()), dtype=torch.int64)
        sums.add(TapPair(rows[~is_held_out], reference[~is_held_out], window, window))
        quantizer = GroupQuantizer(alpha, (damping,), LocalMapper())
        found = torch.from_numpy(quantizer.run({"a": work}, sums)["a"].linear.dequantize())
        wanted = seen @ work.weight.T + alpha * ((held - seen) @ work.weight.T)
        errors.append(float((seen @ found.T - wanted).square().sum()))
    quantizer = GroupQuantizer(alpha, DAMPINGS, LocalMapper())
    result = quantizer.run({"a": work}, counted(work, alpha))["a"]
    assert result.damping == DAMPINGS[errors.index(min(errors))]


def test_the_error_is_that_of_the_outputs() -> None:
    work, rows = task(), inputs(0)[1]
    quantizer = GroupQuantizer(0.0, (1e-6,), LocalMapper())
    result = quantizer.run({"a": work}, counted(work, 0.0, hold_out=False))["a"]
    difference = torch.from_numpy(result.linear.dequantize()) - work.weight
    wanted = (rows @ difference.T).square().sum() / (rows @ work.weight.T).square().sum()
    assert result.relative_error == pytest.approx(float(wanted), rel=1e-3)


def test_the_error_does_not_depend_on_the_block_of_columns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    quantizer = GroupQuantizer(0.5, (0.01,), LocalMapper())
    whole = quantizer.run({"a": task()}, counted(task(), 0.5))["a"]
    monkeypatch.setattr(layer, "_GRAM_COLUMNS", 7)
    pieces = quantizer.run({"a": task()}, counted(task(), 0.5))["a"]
    assert pieces.relative_error == pytest.approx(whole.relative_error, rel=1e-5)


@pytest.mark.parametrize("num_rows", [1, 127, 128, 129, 200, 1000, 4096])
def test_sampled_rows_are_distinct_rows_of_the_weight(num_rows: int) -> None:
    rows = layer._sampled_rows(num_rows)
    assert len(rows) == min(num_rows, layer.TRIAL_ROWS)
    assert len(set(rows.tolist())) == len(rows)
    assert rows.max() < num_rows


def test_with_few_windows_the_last_one_is_held_out() -> None:
    sums = MomentSums({"a": task().weight}, 3, False, True)
    window = torch.tensor([0, 1, 2, 2])
    sums.add(TapPair(torch.randn(4, 64), None, window, window))
    assert sums.held_out is not None
    assert (sums.training.hessian.num_rows, sums.held_out.hessian.num_rows) == (2, 2)
    assert sums.num_rows == 4
    assert sums.merged().hessian.num_rows == 4
