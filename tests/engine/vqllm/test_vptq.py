"""VPTQ: what is stored is what was chosen, and each of its parts lowers the error."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from vqllm.quantization.hessian import HessianFactor, factorize
from vqllm.quantization.vptq import VptqOptions, quantize_vptq
from vqllm.quantization.vptq_linear import VptqLinear
from vqllm.quantization.vptq_reading import read_vptq

OUT, IN = 128, 96
SMALL = VptqOptions(num_centroids=64, kmeans_steps=6)


def synthetic_layer(seed: int = 0, out: int = OUT) -> tuple[Tensor, Tensor]:
    """Heavy-tailed weights (out, in), and moments of correlated inputs, four of them large."""
    generator = torch.Generator().manual_seed(seed)
    tails = torch.randn(5, out, IN, generator=generator).square().mean(0).sqrt()
    weight = torch.randn(out, IN, generator=generator) / tails * 0.02
    mixing = torch.eye(IN) / 2 + torch.randn(IN, IN, generator=generator) / IN**0.5
    inputs = torch.randn(2048, IN, generator=generator) @ mixing
    inputs[:, torch.randperm(IN, generator=generator)[:4]] *= 15
    return weight, (inputs.T @ inputs / 2048).double()


def relative_error(weight: Tensor, linear: VptqLinear, hessian: Tensor) -> float:
    difference, gram = weight - torch.from_numpy(linear.dequantize()), hessian.float()
    error = float(((difference @ gram) * difference).sum())
    return error / float(((weight @ gram) * weight).sum())


def error_of(options: VptqOptions, act_order: bool = True, seed: int = 0) -> float:
    weight, hessian = synthetic_layer(seed)
    factor = factorize(hessian, 0.01, act_order)
    return relative_error(weight, quantize_vptq(weight, factor, options), hessian)


@pytest.fixture(scope="module")
def factor() -> HessianFactor:
    return factorize(synthetic_layer()[1], 0.01)


@pytest.mark.parametrize(
    "options",
    [
        SMALL,
        replace(SMALL, num_res_centroids=16, beam=4),
        replace(SMALL, num_outliers=6, num_groups=2, num_outlier_centroids=16),
        replace(SMALL, has_norm=False, vector_length=5),
        replace(SMALL, is_published=True, num_res_centroids=8),
    ],
)
def test_what_is_stored_reads_back_the_same(options: VptqOptions, factor: HessianFactor) -> None:
    weight, hessian = synthetic_layer()
    linear = quantize_vptq(weight, factor, options)
    again = read_vptq(linear.tensors(), linear.entry())
    np.testing.assert_array_equal(again.dequantize(), linear.dequantize())
    assert 8 * linear.num_bytes == options.bits_of(OUT, IN)
    assert (linear.out_features, linear.in_features) == (OUT, IN)
    assert relative_error(weight, linear, hessian) < 0.2
