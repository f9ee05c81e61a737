"""VPTQ as its released tool quantizes, defects included: a baseline, never a default.

What differs from `vqllm.quantization.vptq`: columns are normed by minimum and range while hessian
and factor stay those of the unscaled problem; the main codebook is fixed before the residual one
and searched greedily; nothing is refitted. The random start of k-means is seeded here.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from vqllm.quantization.hessian import HessianFactor
from vqllm.quantization.vptq import (
    VptqOptions,
    as_vectors,
    check_range,
    packed,
    split_columns,
    table_order,
)
from vqllm.quantization.vptq_kmeans import kmeans
from vqllm.quantization.vptq_linear import VptqLinear
from vqllm.quantization.vptq_refit import rounded
from vqllm.quantization.vptq_sweep import Assignment, sweep
from vqllm.quantization.vptq_tables import Table

_SMALLEST_RANGE = 2.0**-14


def quantize_as_published(
    weight: Tensor, factor: HessianFactor, options: VptqOptions
) -> VptqLinear:
    """Quantize `weight` (out, in) float32 as the released tool does.

    Raises:
        InvalidConfig: the groups do not split the columns evenly.
        UnsupportedModel: the weights exceed what float16 can express.
    """
    check_range(weight)
    columns = weight.T.contiguous()
    scales, biases = torch.ones_like(columns[:, 0]), torch.zeros_like(columns[:, 0])
    if options.has_norm:
        biases = rounded(columns.amin(1))
        scales = rounded((columns.amax(1) - biases).clamp(min=_SMALLEST_RANGE))
    normed = (columns - biases[:, None]) / scales[:, None]
    order = table_order(factor, options.spec)
    state = _two_passes(normed, factor, split_columns(order, options.spec), options)
    return packed(replace(state, scales=scales, biases=biases), options.spec, order)


def _two_passes(
    normed: Tensor, factor: HessianFactor, groups: list[Tensor], options: VptqOptions
) -> Assignment:
    """A sweep with main codebooks, then one with residual codebooks where they are asked for."""
    importance = factor.hessian.diagonal().float()
    trainer = _Trainer(importance, options)
    tables = [trainer.main(number, chosen, normed) for number, chosen in enumerate(groups)]
    ones, zeros = torch.ones_like(importance), torch.zeros_like(importance)
    state = Assignment.empty(tables, ones, zeros, normed.shape[1])
    sweep(normed, factor, state, beam=1)
    if not options.num_res_centroids:
        return state
    rest = normed - state.weights()
    for number, table in enumerate(tables):
        if not trainer.is_outlier(number):
            table.residual = trainer.train(number, table.columns, rest, options.num_res_centroids)
    state = Assignment.empty(tables, ones, zeros, normed.shape[1])
    sweep(normed, factor, state, beam=1)
    return state


class _Trainer:
    """k-means over the columns of a table, weighted by the hessian's diagonal."""

    def __init__(self, importance: Tensor, options: VptqOptions) -> None:
        self._importance, self._options = importance, options

    def is_outlier(self, number: int) -> bool:
        return self._options.num_outliers > 0 and number == 0

    def main(self, number: int, chosen: Tensor, values: Tensor) -> Table:
        options = self._options
        size = options.num_outlier_centroids if self.is_outlier(number) else options.num_centroids
        return Table(chosen, self.train(number, chosen, values, size))

    def train(self, number: int, chosen: Tensor, values: Tensor, size: int) -> Tensor:
        options = self._options
        is_outlier = self.is_outlier(number)
        length = options.outlier_vector_length if is_outlier else options.vector_length
        vectors = as_vectors(values[chosen], length)
        weights = self._importance[chosen].repeat_interleave(len(vectors) // len(chosen))
        seed = options.seed + 2 * number
        return rounded(kmeans(vectors, weights, size, seed, options.kmeans_steps))
