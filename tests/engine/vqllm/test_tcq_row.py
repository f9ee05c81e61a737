"""Trellis-coded quantization along the inputs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from support.layers import correlated_inputs, factor_of, output_error
from vqllm.api import AutoQuantizer
from vqllm.calibration import CalibrationConfig
from vqllm.checkpoint import Checkpoint
from vqllm.errors import InvalidConfig, UnsupportedModel
from vqllm.quantization.hessian import HessianFactor, factorize
from vqllm.quantization.methods import METHODS, read_linear
from vqllm.quantization.presets import QuantizeConfig
from vqllm.quantization.tcq import TcqOptions, first_scales, quantize_tcq
from vqllm.quantization.tcq_row import TcqRowLinear, TcqRowOptions, quantize_tcq_row
from vqllm.quantization.trellis import codebook_of, encode_reference, states_of

ROWS, COLUMNS = 24, 90
FAST = TcqRowOptions(2, trellis_bits=10)

pytestmark = pytest.mark.usefixtures("native_encoder")


@pytest.fixture(scope="module")
def inputs() -> Tensor:
    return correlated_inputs(COLUMNS)


@pytest.fixture(scope="module")
def factor(inputs: Tensor) -> HessianFactor:
    return factor_of(inputs)


@pytest.fixture(scope="module")
def weight() -> Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(2)) * 0.05


def test_without_correlations_a_row_is_the_best_path_of_its_weights(weight: Tensor) -> None:
    identity = factorize(torch.eye(COLUMNS, dtype=torch.float64), 0.01)
    options = replace(FAST, step=COLUMNS)
    linear = quantize_tcq_row(weight, identity, options)
    scale = first_scales(weight, TcqOptions(2, 10))[0]
    states = states_of(linear.codebook, linear.codes, COLUMNS)
    for row in (0, 7):
        scales = scale[row].repeat(COLUMNS).numpy()
        path = encode_reference(linear.codebook, weight[row].numpy(), scales)
        levels = linear.codebook.level_of(path)
        same = (linear.codebook.level_of(states[row]) == levels).mean()
        assert same > 0.95  # the importance of columns is 1 up to rounding


def test_steps_and_look_ahead_make_one_stream(weight: Tensor, factor: HessianFactor) -> None:
    """Every state must follow from the one before it, across all steps."""
    linear = quantize_tcq_row(weight, factor, replace(FAST, step=7, look_ahead=5))
    states = states_of(linear.codebook, linear.codes, COLUMNS)
    np.testing.assert_array_equal(states[:, 1:] & 0xFF, states[:, :-1] >> 2)


def test_feedback_and_look_ahead_both_help(
    weight: Tensor, factor: HessianFactor, inputs: Tensor
) -> None:
    def error(options: TcqRowOptions) -> float:
        return output_error(weight, quantize_tcq_row(weight, factor, options), inputs)

    assert error(FAST) < 0.8 * error(replace(FAST, step=COLUMNS))
    assert error(FAST) < 0.9 * error(replace(FAST, look_ahead=0))


def test_the_direction_along_the_outputs_is_better(factor: HessianFactor, inputs: Tensor) -> None:
    """On columns that are long against the few rows without a full choice of states."""
    tall = torch.randn(200, COLUMNS, generator=torch.Generator().manual_seed(3))
    row = output_error(tall, quantize_tcq_row(tall, factor, FAST), inputs)
    column = output_error(tall, quantize_tcq(tall, factor, TcqOptions(2, 10)), inputs)
    assert column < row < 2 * column


@pytest.mark.parametrize("bits", [1, 3, 5])
def test_what_is_stored_reads_back(bits: int, weight: Tensor, factor: HessianFactor) -> None:
    options = replace(FAST, bits=bits)
    linear = quantize_tcq_row(weight, factor, options)
    read = read_linear(linear.tensors(), json.loads(json.dumps(linear.entry())))
    assert isinstance(read, TcqRowLinear)
    np.testing.assert_array_equal(read.dequantize(), linear.dequantize())
    assert linear.num_bytes * 8 == options.bits_of(ROWS, COLUMNS)
    assert (read.out_features, read.in_features) == (ROWS, COLUMNS)


def test_scales_can_be_replaced(weight: Tensor, factor: HessianFactor) -> None:
    linear = quantize_tcq_row(weight, factor, FAST)
    doubled = linear.with_parameters({"scales": linear.scales * 2})
    np.testing.assert_array_equal(doubled.dequantize(), 2 * linear.dequantize())


def test_misshapen_parts_are_refused(weight: Tensor, factor: HessianFactor) -> None:
    linear = quantize_tcq_row(weight, factor, FAST)
    good, entry = linear.tensors(), linear.entry()
    for change in ({"codes": good["codes"][:, :-1]}, {"scales": good["scales"][0]}):
        with pytest.raises(ValueError, match=next(iter(change))):
            TcqRowLinear.from_tensors({**good, **change}, entry)
    with pytest.raises(ValueError, match="3x10"):
        TcqRowLinear.from_tensors(good, entry, codebook_of(3, 10))


def test_weights_that_are_not_finite_are_refused(weight: Tensor, factor: HessianFactor) -> None:
    changed = weight.clone()
    changed[0, 0] = torch.nan
    with pytest.raises(UnsupportedModel, match="not finite"):
        quantize_tcq_row(changed, factor, FAST)


@pytest.mark.parametrize(
    ("field", "value"),
    [("bits", 6), ("trellis_bits", 9), ("step", 0), ("look_ahead", -1), ("scale_factor", 5.0)],
)
def test_impossible_options_are_refused(field: str, value: float) -> None:
    with pytest.raises(InvalidConfig):
        replace(FAST, **{field: value})  # type: ignore[arg-type]


def test_the_direction_is_asked_for_by_name() -> None:
    assert QuantizeConfig(method="tcq", bits=2, direction="row").options() == TcqRowOptions(2)
    assert METHODS["tcq_row"].options is TcqRowOptions
    for wrong in ({"direction": "diagonal"}, {"direction": "row", "method": "gptq"}):
        with pytest.raises(InvalidConfig, match="direction"):
            QuantizeConfig(**{"method": "tcq", "bits": 2, **wrong})  # type: ignore[arg-type]


def test_a_folder_of_rows_loads_back(tiny_folder: Path, tmp_path: Path) -> None:
    quantizer = AutoQuantizer.from_pretrained(tiny_folder)
    text = CalibrationConfig(num_windows=2, window_length=32)
    quantizer.quantize(
        text, method="tcq", bits=4, direction="row", preprocess="none", alpha=0, dampings=(0.01,)
    )
    folder = quantizer.save_pretrained(tmp_path / "rows")
    name = "model.layers.0.mlp.down_proj"
    original, stored = Checkpoint(tiny_folder).linear(name), Checkpoint(folder).linear(name)
    assert isinstance(original, np.ndarray)
    assert isinstance(stored, TcqRowLinear)
    error = np.square(stored.dequantize() - original).mean() / np.square(original).mean()
    assert error < 0.05
