"""GPTQ: uniform grids with error feedback along the input columns.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", algorithm 1, with act-order and static groups: columns are visited by falling
hessian diagonal, yet grids belong to runs of neighbouring columns and are fixed beforehand, so
the result needs no column permutation when it runs.

Works on one weight matrix and one hessian; knows no model, no file and no progress bar.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from vqkernels.trellis import sweep_grid
from vqllm.quantization.base import GroupedLinear
from vqllm.quantization.grid import (
    GridOptions,
    UniformGrid,
    grouped_linear,
    positive_half,
    search_grid,
)
from vqllm.quantization.hessian import HessianFactor
from vqllm.quantization.sweep import refit_scales, sweep_columns


@dataclass(frozen=True)
class GptqOptions(GridOptions):
    """How to run GPTQ.

    Attributes:
        refit: fit the scales to the codes once these are known, by least squares under the
            hessian.
    """

    refit: bool = True

    method: ClassVar[str] = "gptq"


def quantize_gptq(weight: Tensor, factor: HessianFactor, options: GptqOptions) -> GroupedLinear:
    """Quantize `weight` (out, in) float32 for inputs with the hessian of `factor`.

    Rows do not influence each other, so layers that read the same input may be stacked.

    Raises:
        UnsupportedModel: the weights are not finite or exceed what float16 scales can express.
        NativeUnavailableError: the native library is not installed.
    """
    weight = weight.detach().float().cpu()
    hessian = factor.hessian.cpu()
    grid = search_grid(weight, hessian.diagonal().float(), options)
    codes = round_columns(weight, factor, grid, options)
    if options.refit:
        grid = _refitted(weight, codes, grid, hessian, options)
    return grouped_linear(codes, grid, options.spec)


def round_columns(
    weight: Tensor, factor: HessianFactor | None, grid: UniformGrid, options: GridOptions
) -> Tensor:
    """Codes (in, out) uint8; without a factor each weight is rounded to nearest."""
    coder = partial(
        sweep_grid,
        zeros=np.ascontiguousarray(grid.zeros.numpy()),
        max_code=options.spec.max_code,
    )
    layout = grid.for_sweep(weight.shape[1], options.spec)
    return torch.from_numpy(sweep_columns(weight, factor, layout, coder))


def _refitted(
    weight: Tensor, codes: Tensor, grid: UniformGrid, hessian: Tensor, options: GptqOptions
) -> UniformGrid:
    """The grid with the best scales for `codes`; one that would not be positive stays as it is."""
    groups = grid.for_sweep(weight.shape[1], options.spec).groups
    steps = codes.float() - grid.zeros[torch.from_numpy(groups).long()].float()
    best = refit_scales(weight, steps.T.contiguous(), groups, hessian)
    return replace(grid, scales=torch.where(best > 0, positive_half(best), grid.scales))
