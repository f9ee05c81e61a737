"""The surroundings of one layer to quantize: inputs with correlations, and the error they see."""

from __future__ import annotations

import torch
from torch import Tensor

from vqllm.quantization.base import QuantizedLinear
from vqllm.quantization.hessian import Hessian, HessianFactor, factorize


def correlated_inputs(columns: int) -> Tensor:
    """(600, columns), of columns that are mixed and ever smaller."""
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(columns, columns, generator=generator)
    mixing *= torch.linspace(3.0, 0.1, columns)[:, None]
    return torch.randn(600, columns, generator=generator) @ mixing


def factor_of(inputs: Tensor) -> HessianFactor:
    """The factor of the inputs' Hessian, damped by a hundredth."""
    hessian = Hessian(inputs.shape[1])
    hessian.add(inputs)
    return factorize(hessian.value, 0.01)


def output_error(weight: Tensor, linear: QuantizedLinear, inputs: Tensor) -> float:
    """Squared error of the layer's outputs relative to their squares."""
    difference = weight - torch.from_numpy(linear.dequantize())
    return float((inputs @ difference.T).square().sum() / (inputs @ weight.T).square().sum())
