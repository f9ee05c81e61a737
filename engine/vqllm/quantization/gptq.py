"""GPTQ: scalar quantization with error feedback along the input columns.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", algorithm 1, with act-order and static groups: columns are visited by falling
hessian diagonal, yet scales belong to runs of neighbouring columns and are fixed beforehand, so
the result needs no column permutation when it runs.

Works on one weight matrix and one hessian; knows no model, no file and no progress bar.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vqllm.errors import InvalidConfig, UnsupportedModel
from vqllm.quantization.base import GroupedLinear, GroupedSpec, contiguous_groups
from vqllm.quantization.hessian import HessianFactor, factorize

_SCALE_FLOOR = 2.0**-24  # smallest positive float16, so that no scale rounds to zero


@dataclass(frozen=True)
class GptqOptions:
    """How to run GPTQ.

    Attributes:
        spec: width and group size.
        damping: part of the mean hessian diagonal that is added to the diagonal.
        column_block: columns that are updated together before the rest of the matrix.
        clip_steps: candidate scales per group, from the largest weight down to `min_clip` of it.
        min_clip: the smallest clipping that is tried.
    """

    spec: GroupedSpec
    damping: float = 0.01
    column_block: int = 64
    clip_steps: int = 12
    min_clip: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.damping < 1:
            raise InvalidConfig("damping", self.damping, "a number in (0, 1)")
        if self.column_block < 1 or self.clip_steps < 1:
            raise InvalidConfig("column_block", self.column_block, "at least 1, as clip_steps")

    @property
    def method(self) -> str:
        """Key of the method's table."""
        return "gptq"

    def bits_of(self, out_features: int, in_features: int) -> float:
        """Bits in the file: codes, scales, zero points and group indices."""
        groups = self.spec.num_groups(in_features)
        per_group = out_features * (16 + self.spec.bits)
        return out_features * in_features * self.spec.bits + groups * per_group + 32 * in_features


def quantize_gptq(weight: Tensor, hessian: Tensor, options: GptqOptions) -> GroupedLinear:
    """Quantize `weight` (out, in) float32 for inputs whose Gram matrix is `hessian` (in, in).

    Rows do not influence each other, so layers that read the same input may be stacked.

    Raises:
        CalibrationError: the hessian is not finite or cannot be factored.
        UnsupportedModel: the weights exceed what float16 scales can express.
    """
    factor = factorize(hessian, options.damping)
    columns = weight.T.contiguous()
    with _one_thread():
        scales = search_scales(columns, factor.hessian.diagonal().float(), options)
        codes = _sweep(columns, factor, scales, options)
    return _grouped_linear(codes, scales, options.spec)


def quantize_rtn(weight: Tensor, options: GptqOptions) -> GroupedLinear:
    """Round to nearest on the same grids without feedback: the baseline GPTQ has to beat."""
    columns = weight.T.contiguous()
    scales = search_scales(columns, torch.ones(columns.shape[0]), options)
    group = torch.from_numpy(contiguous_groups(columns.shape[0], options.spec)).long()
    codes = _nearest_codes(columns, scales[group], options.spec)
    return _grouped_linear(codes, scales, options.spec)


def relative_error(weight: Tensor, linear: GroupedLinear, hessian: Tensor) -> float:
    """tr(D H D') / tr(W H W') for D = W - dequantized W: error of the outputs, squared."""
    gram = hessian.float()
    difference = weight - torch.from_numpy(linear.dequantize())
    error = ((difference @ gram) * difference).sum().item()
    signal = ((weight @ gram) * weight).sum().item()
    return error / signal if signal > 0 else 0.0


def search_scales(columns: Tensor, importance: Tensor, options: GptqOptions) -> Tensor:
    """Scale per group and row, (groups, out) float32 already rounded to float16.

    Clips the largest weight by the factor that minimizes the squared rounding error, weighted by
    the `importance` (in,) of each column. `columns` is the weight transposed, (in, out).
    """
    spec = options.spec
    if columns.abs().max() / (spec.max_code / 2) > torch.finfo(torch.float16).max:
        raise UnsupportedModel("the weights are too large for the float16 scales of the format")
    clips = torch.linspace(1.0, options.min_clip, options.clip_steps)
    scales = []
    for start in range(0, columns.shape[0], spec.group_size):
        group = columns[start : start + spec.group_size]
        weights = importance[start : start + spec.group_size, None]
        scales.append(_best_scale(group, weights, clips, spec))
    return torch.stack(scales)


def _best_scale(group: Tensor, importance: Tensor, clips: Tensor, spec: GroupedSpec) -> Tensor:
    largest = group.abs().amax(0)
    best_error = torch.full_like(largest, torch.inf)
    best = torch.full_like(largest, _SCALE_FLOOR)
    for clip in clips:
        scale = _round_to_half(largest * clip / (spec.max_code / 2))
        rounded = _dequantize(_nearest_codes(group, scale, spec), scale, spec)
        error = ((group - rounded).square() * importance).sum(0)
        is_better = error < best_error
        best_error = torch.where(is_better, error, best_error)
        best = torch.where(is_better, scale, best)
    return best


def _round_to_half(scale: Tensor) -> Tensor:
    return scale.clamp(_SCALE_FLOOR, torch.finfo(torch.float16).max).half().float()


def _nearest_codes(values: Tensor, scale: Tensor, spec: GroupedSpec) -> Tensor:
    codes = torch.round(values / scale).add_(spec.symmetric_zero)
    return codes.clamp_(0, spec.max_code).to(torch.uint8)


def _dequantize(codes: Tensor, scale: Tensor, spec: GroupedSpec) -> Tensor:
    return (codes.float() - spec.symmetric_zero) * scale


@contextmanager
def _one_thread() -> Iterator[None]:
    """Hold torch to one thread.

    The sweep is a hundred thousand tiny operations per model. Split over threads, each ends in a
    barrier, and on a busy machine a barrier costs a time slice: 19 s per block instead of 4.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _grouped_linear(codes: Tensor, scales: Tensor, spec: GroupedSpec) -> GroupedLinear:
    return GroupedLinear(
        codes=codes.numpy(),
        scales=scales.half().numpy(),
        zeros=np.full(tuple(scales.shape), spec.symmetric_zero, np.uint8),
        group_index=contiguous_groups(codes.shape[0], spec),
        spec=spec,
    )


def _sweep(columns: Tensor, factor: HessianFactor, scales: Tensor, options: GptqOptions) -> Tensor:
    """Codes (in, out) uint8. `columns` is the weight transposed, so a column is contiguous."""
    num_columns = columns.shape[0]
    order, upper = factor.order, factor.upper
    scale_of = scales[order // options.spec.group_size]
    remaining = columns[order].contiguous()
    codes = torch.empty_like(remaining, dtype=torch.uint8)
    for start in range(0, num_columns, options.column_block):
        stop = min(start + options.column_block, num_columns)
        block = slice(start, stop)
        codes[block], errors = _sweep_block(
            remaining[block], upper[block, block], scale_of[block], options.spec
        )
        remaining[stop:].addmm_(upper[block, stop:].T, errors, alpha=-1)
    restored = torch.empty_like(codes)
    restored[order] = codes
    return restored


def _sweep_block(
    block: Tensor, factor: Tensor, scales: Tensor, spec: GroupedSpec
) -> tuple[Tensor, Tensor]:
    """Quantize columns one by one, pushing each error onto the later columns of the block.

    Returns the codes and the errors divided by the factor's diagonal, for the later blocks.
    """
    codes = torch.empty_like(block, dtype=torch.uint8)
    errors = torch.empty_like(block)
    for column in range(block.shape[0]):
        value, scale = block[column], scales[column]
        codes[column] = _nearest_codes(value, scale, spec)
        error = (value - _dequantize(codes[column], scale, spec)) / factor[column, column]
        errors[column] = error
        block[column + 1 :].addr_(factor[column, column + 1 :], error, alpha=-1)
    return codes, errors
