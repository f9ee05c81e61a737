"""Rounding to nearest: the baseline that every other method has to beat.

Same grids and same file format as GPTQ, no feedback and no hessian.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vqllm.quantization.base import GroupedLinear
from vqllm.quantization.gptq import round_columns
from vqllm.quantization.grid import GridOptions, grouped_linear, search_grid
from vqllm.quantization.hessian import HessianFactor


@dataclass(frozen=True)
class RtnOptions(GridOptions):
    """How to round to nearest; see `GridOptions`. One clip step means the whole range."""

    method: ClassVar[str] = "rtn"


def quantize_rtn(
    weight: Tensor, factor: HessianFactor | None, options: GridOptions
) -> GroupedLinear:
    """Quantize `weight` (out, in) float32; the factor is not looked at.

    Raises:
        UnsupportedModel: the weights are not finite or exceed what float16 scales can express.
        NativeUnavailableError: the native library is not installed.
    """
    weight = weight.detach().float().cpu()
    grid = search_grid(weight, torch.ones(weight.shape[1]), options)
    return grouped_linear(round_columns(weight, None, grid, options), grid, options.spec)
