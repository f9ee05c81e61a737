"""Trellis-coded quantization of one matrix."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from support.layers import correlated_inputs, factor_of, output_error
from vqllm.errors import InvalidConfig, UnsupportedModel
from vqllm.quantization.base import GroupedSpec
from vqllm.quantization.gptq import GptqOptions, quantize_gptq
from vqllm.quantization.hessian import HessianFactor, factorize
from vqllm.quantization.methods import METHODS, read_linear
from vqllm.quantization.sweep import refit_scales
from vqllm.quantization.tcq import TcqLinear, TcqOptions, quantize_tcq
from vqllm.quantization.trellis import TrellisCodebook, codebook_of, encode_reference

ROWS, COLUMNS = 40, 96
FAST = TcqOptions(2, trellis_bits=10)

pytestmark = pytest.mark.usefixtures("native_encoder")


@pytest.fixture(scope="module")
def inputs() -> Tensor:
    return correlated_inputs(COLUMNS)


@pytest.fixture(scope="module")
def factor(inputs: Tensor) -> HessianFactor:
    return factor_of(inputs)


@pytest.fixture(scope="module")
def weight() -> Tensor:
    generator = torch.Generator().manual_seed(2)
    rows = torch.rand(ROWS, 1, generator=generator) + 0.5
    return torch.randn(ROWS, COLUMNS, generator=generator) * rows * 0.05


def dense_sweep(weight: Tensor, factor: HessianFactor, options: TcqOptions) -> Tensor:
    """The whole algorithm without refit, column by column, with the encoder of the definition."""
    codebook = codebook_of(options.bits, options.trellis_bits)
    scales = (weight.square().mean(1).sqrt() * options.first_scale).half().float()
    left, upper = weight.double().clone(), factor.upper.double()
    levels = torch.empty(weight.shape, dtype=torch.float64)
    for step, column in enumerate(factor.order.tolist()):
        target = left[:, column].float().numpy()
        path = encode_reference(codebook, target, scales.numpy())
        levels[:, column] = torch.from_numpy(codebook.level_of(path)).double()
        error = (left[:, column] - scales * levels[:, column]) / upper[step, step]
        left[:, factor.order] -= error[:, None] * upper[step]
    return levels


def test_feedback_is_that_of_a_dense_sweep(weight: Tensor, factor: HessianFactor) -> None:
    levels = quantize_tcq(weight, factor, FAST).levels().T
    # One column in float32 may take another path of nearly the same cost; if the feedback were
    # wrong nothing would agree, because every later target moves.
    assert (levels == dense_sweep(weight, factor, FAST).numpy()).mean() > 0.9


def test_feedback_lowers_the_error_of_the_outputs(
    weight: Tensor, factor: HessianFactor, inputs: Tensor
) -> None:
    alone = factorize(torch.diag(factor.hessian.diagonal()), 1e-6)
    with_feedback = output_error(weight, quantize_tcq(weight, factor, FAST), inputs)
    assert with_feedback < 0.7 * output_error(weight, quantize_tcq(weight, alone, FAST), inputs)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_it_beats_gptq_at_fewer_bits(
    bits: int, weight: Tensor, factor: HessianFactor, inputs: Tensor
) -> None:
    tcq, gptq = TcqOptions(bits), GptqOptions(GroupedSpec(bits, 48), symmetric=False)
    assert tcq.bits_of(ROWS, COLUMNS) < gptq.bits_of(ROWS, COLUMNS)
    tcq_error = output_error(weight, quantize_tcq(weight, factor, tcq), inputs)
    assert tcq_error < output_error(weight, quantize_gptq(weight, factor, gptq), inputs)


@pytest.mark.parametrize(
    "options",
    [
        FAST,
        TcqOptions(1, 10, group_size=32),
        TcqOptions(3, 10, group_size=40, column_scales=True),
        TcqOptions(5, 12, column_scales=True, rounds=2),
    ],
)
def test_what_is_stored_reads_back(
    options: TcqOptions, weight: Tensor, factor: HessianFactor
) -> None:
    linear = quantize_tcq(weight, factor, options)
    entry = json.loads(json.dumps(linear.entry()))
    read = read_linear(linear.tensors(), entry)
    np.testing.assert_array_equal(read.dequantize(), linear.dequantize())
    assert linear.num_bytes * 8 == options.bits_of(ROWS, COLUMNS)
    assert (linear.out_features, linear.in_features) == (ROWS, COLUMNS)
    assert entry["bits"] == options.bits


def test_a_weight_is_scale_times_level_times_column_scale(
    weight: Tensor, factor: HessianFactor
) -> None:
    linear = quantize_tcq(weight, factor, TcqOptions(2, 10, group_size=40, column_scales=True))
    assert linear.column_scales is not None
    levels = linear.levels()
    expected = np.empty((ROWS, COLUMNS), np.float32)
    for column in range(COLUMNS):
        scale = linear.scales[column // 40].astype(np.float32)
        product = scale * levels[column].astype(np.float32)
        expected[:, column] = product * np.float32(linear.column_scales[column])
    np.testing.assert_array_equal(linear.dequantize(), expected)


def test_column_scales_help_uneven_columns(factor: HessianFactor, inputs: Tensor) -> None:
    uneven = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(3))
    uneven *= torch.logspace(-1.5, 0, COLUMNS)
    plain = output_error(uneven, quantize_tcq(uneven, factor, FAST), inputs)
    scaled = quantize_tcq(uneven, factor, replace(FAST, column_scales=True))
    assert output_error(uneven, scaled, inputs) < 0.8 * plain


def test_refitted_scales_are_the_best_for_the_levels(weight: Tensor, factor: HessianFactor) -> None:
    linear = quantize_tcq(weight, factor, replace(FAST, group_size=48))
    steps = torch.from_numpy(linear.levels().T.astype(np.float32))
    scales = refit_scales(weight, steps, linear.group_index, factor.hessian)

    def error(change: float) -> float:
        moved = scales.clone()
        moved[1, 3] *= 1 + change
        difference = (weight - steps * moved[linear.group_index].T).double()
        return float(((difference @ factor.hessian) * difference).sum())

    assert error(0) < min(error(0.01), error(-0.01))
    np.testing.assert_allclose(linear.scales, scales.numpy(), rtol=1e-3)


def test_parameters_can_be_replaced_but_not_reshaped(weight: Tensor, factor: HessianFactor) -> None:
    linear = quantize_tcq(weight, factor, replace(FAST, column_scales=True))
    assert set(linear.parameters()) == {"scales", "column_scales"}
    doubled = {name: values * 2 for name, values in linear.parameters().items()}
    changed = linear.with_parameters(doubled)
    np.testing.assert_array_equal(changed.dequantize(), linear.dequantize() * 4)
    assert changed.scales.dtype == np.float16
    with pytest.raises(KeyError, match="scales"):
        linear.with_parameters({"scales": linear.scales})
    with pytest.raises(ValueError, match="scales"):
        linear.with_parameters({**doubled, "scales": linear.scales[:, :3]})


def test_a_stored_codebook_is_used_instead_of_the_shipped_one(
    weight: Tensor, factor: HessianFactor
) -> None:
    linear = quantize_tcq(weight, factor, FAST)
    stored = replace(linear.codebook, table=-linear.codebook.table)
    read = TcqLinear.from_tensors(linear.tensors(), linear.entry(), stored)
    np.testing.assert_array_equal(read.dequantize(), -linear.dequantize())
    other = codebook_of(3, 10)
    with pytest.raises(ValueError, match="3x10"):
        TcqLinear.from_tensors(linear.tensors(), linear.entry(), other)
    newer = replace(linear.codebook, multiplier=linear.codebook.multiplier ^ 2)
    with pytest.raises(ValueError, match="multiplier"):
        TcqLinear.from_tensors(linear.tensors(), linear.entry(), newer)


def test_misshapen_parts_are_refused(weight: Tensor, factor: HessianFactor) -> None:
    linear = quantize_tcq(weight, factor, FAST)
    good, entry = linear.tensors(), linear.entry()
    bad = [
        {"codes": good["codes"][:, :-1]},
        {"codes": good["codes"].astype(np.int32)},
        {"scales": np.concatenate([good["scales"]] * 2)},
        {"column_scales": np.ones(3, np.float16)},
    ]
    for change in bad:
        with pytest.raises(ValueError, match=next(iter(change))):
            TcqLinear.from_tensors({**good, **change}, entry)


def test_a_row_of_zeros_stays_small(weight: Tensor, factor: HessianFactor) -> None:
    changed = weight.clone()
    changed[5] = 0
    assert np.abs(quantize_tcq(changed, factor, FAST).dequantize()[5]).max() < 1e-4


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e9])
def test_weights_that_no_scale_can_express_are_refused(
    value: float, weight: Tensor, factor: HessianFactor
) -> None:
    changed = weight.clone()
    changed[0, 0] = value
    with pytest.raises(UnsupportedModel, match="float16 scales"):
        quantize_tcq(changed, factor, FAST)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bits", 0),
        ("bits", 6),
        ("trellis_bits", 9),
        ("trellis_bits", 17),
        ("group_size", -1),
        ("scale_factor", 0.0),
        ("rounds", 0),
    ],
)
def test_impossible_options_are_refused(field: str, value: float) -> None:
    with pytest.raises(InvalidConfig, match=field):
        replace(FAST, **{field: value})  # type: ignore[arg-type]


def test_the_method_is_in_the_table() -> None:
    assert METHODS["tcq"].options is TcqOptions
    assert isinstance(codebook_of(2, 10), TrellisCodebook)
