"""The GPTQ algorithm on one matrix."""

import numpy as np
import pytest
import torch

from vqllm.errors import CalibrationError, InvalidConfig
from vqllm.quantization.base import GroupedSpec
from vqllm.quantization.gptq import (
    GptqOptions,
    quantize_gptq,
    quantize_rtn,
    relative_error,
)
from vqllm.quantization.hessian import Hessian

OPTIONS = GptqOptions(GroupedSpec(bits=3, group_size=32))


def correlated_inputs(num_rows: int, num_columns: int) -> torch.Tensor:
    """Inputs with a few strong directions, as activations have."""
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(num_columns, num_columns, generator=generator)
    mixing *= torch.linspace(3.0, 0.1, num_columns)[:, None]
    return torch.randn(num_rows, num_columns, generator=generator) @ mixing


def random_weight() -> torch.Tensor:
    return torch.randn(48, 96, generator=torch.Generator().manual_seed(2))


def test_feedback_beats_rounding_to_nearest_on_held_out_inputs() -> None:
    inputs = correlated_inputs(2000, 96)
    calibration, held_out = Hessian(96), Hessian(96)
    calibration.add(inputs[:1000])
    held_out.add(inputs[1000:])
    weight = random_weight()
    gptq = quantize_gptq(weight, calibration.value, OPTIONS)
    nearest = quantize_rtn(weight, OPTIONS)
    gptq_error = relative_error(weight, gptq, held_out.value)
    assert gptq_error < 0.5 * relative_error(weight, nearest, held_out.value)


def test_without_correlations_gptq_is_rounding_to_nearest() -> None:
    weight = random_weight()
    gptq = quantize_gptq(weight, torch.eye(96, dtype=torch.float64), OPTIONS)
    np.testing.assert_array_equal(gptq.codes, quantize_rtn(weight, OPTIONS).codes)


def test_stacked_rows_quantize_as_they_do_alone() -> None:
    hessian = Hessian(96)
    hessian.add(correlated_inputs(500, 96))
    weight = random_weight()
    stacked = quantize_gptq(weight, hessian.value, OPTIONS).output_slice(16, 48)
    alone = quantize_gptq(weight[16:], hessian.value, OPTIONS)
    np.testing.assert_array_equal(stacked.dequantize(), alone.dequantize())


def test_groups_stay_contiguous_although_columns_are_visited_by_importance() -> None:
    hessian = torch.diag(torch.rand(96, dtype=torch.float64) + 0.1)
    linear = quantize_gptq(random_weight(), hessian, OPTIONS)
    assert linear.has_contiguous_groups
    assert linear.group_index.tolist() == [column // 32 for column in range(96)]


def test_a_last_group_may_be_shorter() -> None:
    options = GptqOptions(GroupedSpec(bits=4, group_size=64))
    linear = quantize_gptq(random_weight(), torch.eye(96, dtype=torch.float64), options)
    assert linear.scales.shape == (2, 48)
    error = linear.dequantize() - random_weight().numpy()
    assert np.square(error[:, 64:]).mean() < 0.02


def test_inputs_that_never_fire_do_no_harm() -> None:
    hessian = torch.diag(torch.rand(96, dtype=torch.float64) + 0.1)
    hessian[5, 5] = 0.0
    linear = quantize_gptq(random_weight(), hessian, OPTIONS)
    assert np.isfinite(linear.dequantize()).all()


def test_a_row_of_zeros_stays_zero() -> None:
    weight = random_weight()
    weight[3] = 0.0
    linear = quantize_gptq(weight, torch.eye(96, dtype=torch.float64), OPTIONS)
    assert (linear.dequantize()[3] == 0).all()


def test_a_hessian_with_nan_is_refused() -> None:
    hessian = torch.eye(96, dtype=torch.float64)
    hessian[0, 0] = torch.nan
    with pytest.raises(CalibrationError, match="NaN"):
        quantize_gptq(random_weight(), hessian, OPTIONS)


def test_an_indefinite_hessian_is_refused() -> None:
    hessian = torch.eye(96, dtype=torch.float64)
    hessian[0, 1] = hessian[1, 0] = 5.0
    with pytest.raises(CalibrationError, match="not positive definite"):
        quantize_gptq(random_weight(), hessian, OPTIONS)


@pytest.mark.parametrize(("bits", "group_size"), [(5, 128), (4, 100), (4, 8)])
def test_impossible_grids_are_refused(bits: int, group_size: int) -> None:
    with pytest.raises(InvalidConfig, match="allowed is"):
        GroupedSpec(bits, group_size)
