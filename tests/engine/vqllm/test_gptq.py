"""Uniform grids, rounding to nearest and the GPTQ algorithm, on one matrix."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from vqllm.errors import CalibrationError, InvalidConfig, UnsupportedModel
from vqllm.packing import pack_rows, unpack_columns, unpack_rows
from vqllm.quantization.base import GroupedLinear, GroupedSpec
from vqllm.quantization.gptq import GptqOptions, quantize_gptq
from vqllm.quantization.grid import search_grid
from vqllm.quantization.hessian import Hessian, HessianFactor, factorize
from vqllm.quantization.methods import METHODS, read_linear
from vqllm.quantization.rtn import RtnOptions, quantize_rtn

OPTIONS = GptqOptions(GroupedSpec(bits=3, group_size=32))
ALL_BITS = (2, 3, 4, 5, 6, 8)


def correlated_inputs(num_rows: int, num_columns: int) -> Tensor:
    """Inputs with a few strong directions, as activations have."""
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(num_columns, num_columns, generator=generator)
    mixing *= torch.linspace(3.0, 0.1, num_columns)[:, None]
    return torch.randn(num_rows, num_columns, generator=generator) @ mixing


def random_weight(shift: float = 0.0) -> Tensor:
    return torch.randn(48, 96, generator=torch.Generator().manual_seed(2)) + shift


def factor_of(inputs: Tensor, damping: float = 0.01) -> HessianFactor:
    hessian = Hessian(inputs.shape[1])
    hessian.add(inputs)
    return factorize(hessian.value, damping)


def identity() -> HessianFactor:
    return factorize(torch.eye(96, dtype=torch.float64), 0.01)


def output_error(weight: Tensor, linear: GroupedLinear, inputs: Tensor) -> float:
    """Squared error of the outputs on `inputs`, relative."""
    difference = weight - torch.from_numpy(linear.dequantize())
    return float((inputs @ difference.T).square().sum() / (inputs @ weight.T).square().sum())


def dense_sweep(weight: Tensor, factor: HessianFactor, options: GptqOptions) -> np.ndarray:
    """GPTQ as the paper writes it, one column at a time over the whole matrix, in float64."""
    grid = search_grid(weight, factor.hessian.diagonal().float(), options)
    left, upper = weight.double().clone(), factor.upper.double()
    codes = np.empty((weight.shape[1], weight.shape[0]), np.uint8)
    for step, column in enumerate(factor.order.tolist()):
        group = column // options.spec.columns_per_group(weight.shape[1])
        scale, zero = grid.scales[group].double(), grid.zeros[group].double()
        code = (torch.round(left[:, column] / scale) + zero).clamp(0, options.spec.max_code)
        codes[column] = code.numpy()
        error = (left[:, column] - (code - zero) * scale) / upper[step, step]
        left[:, factor.order] -= error[:, None] * upper[step]
    return codes


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4])
def test_the_sweep_is_the_algorithm_of_the_paper(bits: int, symmetric: bool) -> None:
    options = GptqOptions(GroupedSpec(bits, 32), symmetric, refit=False)
    weight, factor = random_weight(), factor_of(correlated_inputs(500, 96))
    codes = quantize_gptq(weight, factor, options).codes
    # Float32 against float64 may land on the other side of a rounding border, and the error of
    # that one code then moves its row; whole columns would differ if the feedback were wrong.
    assert (codes != dense_sweep(weight, factor, options)).mean() < 0.02


def test_feedback_beats_rounding_to_nearest_on_held_out_inputs() -> None:
    inputs = correlated_inputs(2000, 96)
    weight = random_weight()
    gptq = quantize_gptq(weight, factor_of(inputs[:1000]), OPTIONS)
    nearest = quantize_rtn(weight, None, RtnOptions(OPTIONS.spec))
    gptq_error = output_error(weight, gptq, inputs[1000:])
    assert gptq_error < 0.5 * output_error(weight, nearest, inputs[1000:])


def test_without_correlations_gptq_is_rounding_to_nearest() -> None:
    weight = random_weight()
    gptq = quantize_gptq(weight, identity(), OPTIONS)
    nearest = quantize_rtn(weight, None, RtnOptions(OPTIONS.spec))
    np.testing.assert_array_equal(gptq.codes, nearest.codes)


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_width_packs_and_reads_back(bits: int, symmetric: bool) -> None:
    options = GptqOptions(GroupedSpec(bits, 24), symmetric)
    weight = random_weight()[:32]
    linear = quantize_gptq(weight, factor_of(correlated_inputs(500, 96)), options)
    read = read_linear(linear.tensors(), linear.entry())
    np.testing.assert_array_equal(read.dequantize(), linear.dequantize())
    assert linear.is_symmetric == symmetric
    assert linear.num_bytes * 8 == options.bits_of(32, 96)


def test_error_falls_with_the_width() -> None:
    inputs = correlated_inputs(500, 96)
    factor, weight = factor_of(inputs), random_weight()
    errors = [
        output_error(weight, quantize_gptq(weight, factor, GptqOptions(GroupedSpec(b, 32))), inputs)
        for b in ALL_BITS
    ]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("bits", [3, 5, 6])
def test_thirty_two_codes_fill_one_word_per_bit(bits: int) -> None:
    codes = np.arange(64, dtype=np.uint8).reshape(32, 2) % (1 << bits)
    words = pack_rows(codes.astype(np.uint8), bits)
    assert words.shape == (bits, 2)
    stream = sum(int(code) << (bits * i) for i, code in enumerate(codes[:, 1]))
    as_numbers = words[:, 1].astype(np.int64) & 0xFFFFFFFF
    assert sum(int(word) << (32 * i) for i, word in enumerate(as_numbers)) == stream
    np.testing.assert_array_equal(unpack_rows(words, bits), codes)


def test_asymmetric_grids_fit_shifted_weights_better() -> None:
    inputs = correlated_inputs(500, 96)
    weight, factor = random_weight(shift=1.5), factor_of(inputs)
    symmetric = quantize_gptq(weight, factor, OPTIONS)
    asymmetric = quantize_gptq(weight, factor, replace(OPTIONS, symmetric=False))
    assert output_error(weight, asymmetric, inputs) < output_error(weight, symmetric, inputs)


@pytest.mark.parametrize("shift", [-50.0, 0.0, 50.0])
@pytest.mark.parametrize("bits", [2, 8])
def test_zero_points_are_codes(bits: int, shift: float) -> None:
    options = GptqOptions(GroupedSpec(bits, 32), symmetric=False)
    linear = quantize_gptq(random_weight(shift), identity(), options)
    assert int(linear.zeros.max()) <= options.spec.max_code
    stored = unpack_columns(linear.tensors()["qzeros"], bits)
    np.testing.assert_array_equal(stored, linear.zeros)


def test_a_finer_search_never_finds_a_worse_grid() -> None:
    weight = random_weight()
    importance = torch.rand(96, generator=torch.Generator().manual_seed(3)) + 0.1

    def error(options: RtnOptions) -> float:
        grid = search_grid(weight, importance, options)
        scales = grid.scales.repeat_interleave(32, dim=0).T
        zeros = grid.zeros.repeat_interleave(32, dim=0).T.float()
        codes = (torch.round(weight / scales) + zeros).clamp(0, options.spec.max_code)
        return float(((weight - (codes - zeros) * scales).square() * importance).sum())

    spec = GroupedSpec(2, 32)
    whole_range = error(RtnOptions(spec, clip_steps=1))
    assert error(RtnOptions(spec, clip_steps=13)) < whole_range
    assert error(RtnOptions(spec, symmetric=False, clip_steps=13)) < error(
        RtnOptions(spec, clip_steps=13)
    )


def test_refitted_scales_keep_the_codes_and_lower_the_error() -> None:
    inputs = correlated_inputs(500, 96)
    weight, factor = random_weight(), factor_of(inputs)
    plain = quantize_gptq(weight, factor, replace(OPTIONS, refit=False))
    refitted = quantize_gptq(weight, factor, OPTIONS)
    np.testing.assert_array_equal(refitted.codes, plain.codes)
    assert output_error(weight, refitted, inputs) < output_error(weight, plain, inputs)


def test_stacked_rows_quantize_as_they_do_alone() -> None:
    factor, weight = factor_of(correlated_inputs(500, 96)), random_weight()
    options = replace(OPTIONS, refit=False)
    stacked = quantize_gptq(weight, factor, options).output_slice(16, 48)
    alone = quantize_gptq(weight[16:], factor, options)
    np.testing.assert_array_equal(stacked.dequantize(), alone.dequantize())


def test_groups_stay_contiguous_although_columns_are_visited_by_importance() -> None:
    hessian = torch.diag(torch.rand(96, dtype=torch.float64) + 0.1)
    linear = quantize_gptq(random_weight(), factorize(hessian, 0.01), OPTIONS)
    assert linear.has_contiguous_groups
    assert linear.group_index.tolist() == [column // 32 for column in range(96)]


def test_a_last_group_may_be_shorter() -> None:
    options = GptqOptions(GroupedSpec(bits=4, group_size=64))
    linear = quantize_gptq(random_weight(), identity(), options)
    assert linear.scales.shape == (2, 48)
    error = linear.dequantize() - random_weight().numpy()
    assert np.square(error[:, 64:]).mean() < 0.02


def test_one_group_may_hold_a_whole_row() -> None:
    linear = quantize_gptq(random_weight(), identity(), GptqOptions(GroupedSpec(4, -1)))
    assert linear.scales.shape == (1, 48)
    assert set(linear.group_index.tolist()) == {0}
    assert linear.entry()["group_size"] == -1


def test_inputs_that_never_fire_do_no_harm() -> None:
    hessian = torch.diag(torch.rand(96, dtype=torch.float64) + 0.1)
    hessian[5, 5] = 0.0
    linear = quantize_gptq(random_weight(), factorize(hessian, 0.01), OPTIONS)
    assert np.isfinite(linear.dequantize()).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_row_of_zeros_stays_zero(symmetric: bool) -> None:
    weight = random_weight()
    weight[3] = 0.0
    linear = quantize_gptq(weight, identity(), replace(OPTIONS, symmetric=symmetric))
    assert (linear.dequantize()[3] == 0).all()


def test_a_hessian_with_nan_is_refused() -> None:
    hessian = torch.eye(96, dtype=torch.float64)
    hessian[0, 0] = torch.nan
    with pytest.raises(CalibrationError, match="NaN"):
        factorize(hessian, 0.01)


def test_an_indefinite_hessian_is_refused() -> None:
    hessian = torch.eye(96, dtype=torch.float64)
    hessian[0, 1] = hessian[1, 0] = 5.0
    with pytest.raises(CalibrationError, match="not positive definite"):
        factorize(hessian, 0.01)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e9])
def test_weights_that_no_scale_can_express_are_refused(value: float) -> None:
    weight = random_weight()
    weight[0, 0] = value
    with pytest.raises(UnsupportedModel, match="float16 scales"):
        quantize_gptq(weight, identity(), OPTIONS)


@pytest.mark.parametrize(("bits", "group_size"), [(7, 128), (4, 100), (4, 0), (4, -8)])
def test_impossible_grids_are_refused(bits: int, group_size: int) -> None:
    with pytest.raises(InvalidConfig, match="allowed is"):
        GroupedSpec(bits, group_size)


@pytest.mark.parametrize("field", [{"clip_steps": 0}, {"min_clip": 0.0}, {"min_clip": 1.5}])
def test_impossible_searches_are_refused(field: dict[str, float]) -> None:
    with pytest.raises(InvalidConfig, match=next(iter(field))):
        replace(OPTIONS, **field)  # type: ignore[arg-type]


def test_both_methods_are_in_the_table() -> None:
    assert METHODS["gptq"].options is GptqOptions
    assert METHODS["rtn"].options is RtnOptions
