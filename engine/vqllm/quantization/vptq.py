"""VPTQ: vector quantization along the outputs with error feedback along the inputs.

Liu et al., "VPTQ: Extreme Low-bit Vector Post-Training Quantization for Large Language Models",
2024, in its file format. The search differs from the released one: columns are scaled by their rms
with the hessian rescaled alike, k-means is seeded, residual entries are searched by a beam, and
after a sweep codebooks, scales and biases are refitted in closed form, in turns with new sweeps and
coordinate descent over the indices. `vqllm.quantization.vptq_published` keeps the released way.

Works on one weight matrix and one hessian; knows no model, no file and no progress bar.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vqllm.errors import InvalidConfig, UnsupportedModel
from vqllm.quantization.hessian import HessianFactor
from vqllm.quantization.vptq_kmeans import assign, kmeans
from vqllm.quantization.vptq_linear import VptqLinear, VptqSpec
from vqllm.quantization.vptq_refit import refit_codebooks, refit_norms, rounded
from vqllm.quantization.vptq_sweep import Assignment, descend, sweep
from vqllm.quantization.vptq_tables import Table

_SMALLEST_SCALE = 2.0**-14  # smallest normal float16: below it scales lose their digits


@dataclass(frozen=True)
class VptqOptions:
    """How to run VPTQ.

    Attributes:
        vector_length: outputs per vector.
        num_centroids: entries of the main codebook, a power of two.
        num_res_centroids: entries of the residual codebook, a power of two; 0 for none.
        num_outliers: input columns of the largest hessian diagonal with a codebook of their own.
        num_groups: groups of the other columns with codebooks of their own.
        outlier_vector_length, num_outlier_centroids: codebook of the outlier columns.
        has_norm: give every column a scale and a bias (32 bits per column).
        beam: main entries that are tried with their best residual entry.
        kmeans_steps: Lloyd iterations.
        num_rounds: turns of refit and new choice of all indices after the first sweep; the last
            one chooses by coordinate descent, those before by another sweep.
        seed: of k-means.
        is_published: quantize as the released tool does, for comparison.

    Raises:
        InvalidConfig: a value is outside its range.
    """

    vector_length: int = 4
    num_centroids: int = 256
    num_res_centroids: int = 0
    num_outliers: int = 0
    num_groups: int = 1
    outlier_vector_length: int = 2
    num_outlier_centroids: int = 256
    has_norm: bool = True
    beam: int = 8
    kmeans_steps: int = 12
    num_rounds: int = 3
    seed: int = 0
    is_published: bool = False

    def __post_init__(self) -> None:
        if self.beam < 1 or self.kmeans_steps < 1:
            raise InvalidConfig("beam", self.beam, "at least 1, as kmeans_steps")
        if self.num_rounds < 0:
            raise InvalidConfig("num_rounds", self.num_rounds, "at least 0")
        self.spec  # noqa: B018 - checks the sizes

    @property
    def method(self) -> str:
        return "vptq"

    @property
    def spec(self) -> VptqSpec:
        """What is stored."""
        return VptqSpec(
            vector_length=self.vector_length,
            num_centroids=self.num_centroids,
            num_res_centroids=self.num_res_centroids,
            num_groups=self.num_groups,
            num_outliers=self.num_outliers,
            outlier_vector_length=self.outlier_vector_length,
            num_outlier_centroids=self.num_outlier_centroids,
            has_norm=self.has_norm,
            has_order=self.is_published or self.num_outliers > 0 or self.num_groups > 1,
        )

    def bits_of(self, out_features: int, in_features: int) -> float:
        """Bits in the file for a linear of this shape, all overhead counted."""
        return float(self.spec.bits(out_features, in_features))


def quantize_vptq(weight: Tensor, factor: HessianFactor, options: VptqOptions) -> VptqLinear:
    """Quantize `weight` (out, in) float32 for inputs with the second moments of `factor`.

    Raises:
        InvalidConfig: the groups do not split the columns evenly.
        UnsupportedModel: the weights exceed what float16 can express.
    """
    check_range(weight)
    if options.is_published:
        from vqllm.quantization.vptq_published import quantize_as_published

        return quantize_as_published(weight, factor, options)
    columns = weight.T.contiguous()
    hessian = (factor.hessian / factor.hessian.diagonal().mean()).float()
    order = table_order(factor, options.spec)
    scales, biases = _start_norms(columns, options.has_norm)
    importance = scales.square() * column_weights(factor)
    normed = (columns - biases[:, None]) / scales[:, None]
    tables = [
        _trained_table(chosen, normed, importance, options, number)
        for number, chosen in enumerate(split_columns(order, options.spec))
    ]
    state = Assignment.empty(tables, scales, biases, columns.shape[1])
    sweep(columns, factor, state, options.beam)
    for turn in range(options.num_rounds):
        refit_codebooks(columns, hessian, state)
        if options.has_norm:
            refit_norms(columns, hessian, state)
        if turn + 1 < options.num_rounds:
            sweep(columns, factor, state, options.beam)
        else:
            descend(columns, hessian, state, options.beam)
    refit_codebooks(columns, hessian, state)
    return packed(state, options.spec, order)


def check_range(weight: Tensor) -> None:
    """Raise UnsupportedModel for weights that float16 scales and codebooks cannot express."""
    if not bool(torch.isfinite(weight).all()) or float(weight.abs().max()) > 30_000:
        raise UnsupportedModel("the weights are too large for the float16 codebooks of the format")


def table_order(factor: HessianFactor, spec: VptqSpec) -> Tensor:
    """Columns as they are stored: by falling hessian diagonal where an order is stored at all."""
    diagonal = factor.hessian.diagonal()
    if spec.has_order:
        return torch.argsort(diagonal, descending=True, stable=True)
    return torch.arange(len(diagonal), device=diagonal.device)


def split_columns(order: Tensor, spec: VptqSpec) -> list[Tensor]:
    """The columns of every table: the outliers where there are any, then the groups."""
    size, first = spec.group_size(len(order)), spec.num_outliers
    groups = [order[start : start + size] for start in range(first, len(order), size)]
    return [order[:first], *groups] if first else groups


def column_weights(factor: HessianFactor) -> Tensor:
    """(in,) float32: what a squared error of a column costs, for k-means.

    The geometric mean of two extremes: the hessian's diagonal, as if no column made up for
    another, and 1 / U[j, j]^2, the variance of input j given those swept after it, as if all
    later ones did so perfectly. Either alone was up to 4 % worse on held-out text.
    """
    diagonal = factor.hessian.diagonal().float()
    conditional = torch.empty_like(diagonal)
    conditional[factor.order] = factor.upper.diagonal().square().reciprocal()
    return (diagonal / diagonal.mean() * conditional / conditional.mean()).sqrt()


def _start_norms(columns: Tensor, has_norm: bool) -> tuple[Tensor, Tensor]:
    """Scale and bias of every column (in,): rms around the mean, and the mean."""
    if not has_norm:
        return torch.ones_like(columns[:, 0]), torch.zeros_like(columns[:, 0])
    biases = rounded(columns.mean(1))
    scales = (columns - biases[:, None]).square().mean(1).sqrt()
    return rounded(scales.clamp(min=_SMALLEST_SCALE)), biases


def _trained_table(
    chosen: Tensor, normed: Tensor, importance: Tensor, options: VptqOptions, number: int
) -> Table:
    """Codebooks of the columns `chosen`, by k-means on normed columns (in, out)."""
    is_outlier = options.num_outliers > 0 and number == 0
    length = options.outlier_vector_length if is_outlier else options.vector_length
    size = options.num_outlier_centroids if is_outlier else options.num_centroids
    vectors = as_vectors(normed[chosen], length)
    weights = importance[chosen].repeat_interleave(len(vectors) // len(chosen))
    seed, steps = options.seed + 2 * number, options.kmeans_steps
    main = rounded(kmeans(vectors, weights, size, seed, steps))
    if is_outlier or not options.num_res_centroids:
        return Table(chosen, main)
    rest = vectors - main[assign(vectors, main)[0]]
    residual = kmeans(rest, weights, options.num_res_centroids, seed + 1, steps)
    return Table(chosen, main, rounded(residual))


def as_vectors(columns: Tensor, length: int) -> Tensor:
    """Columns (n, out) as vectors (n * ceil(out / v), v), the last of a column padded by zeros."""
    padding = -columns.shape[1] % length
    return torch.nn.functional.pad(columns, (0, padding)).reshape(-1, length)


def packed(state: Assignment, spec: VptqSpec, order: Tensor) -> VptqLinear:
    """The linear that an assignment stands for."""
    first = 1 if spec.num_outliers else 0
    groups = state.tables[first:]
    residuals = [codes for codes in state.residual[first:] if codes is not None]
    return VptqLinear(
        num_rows=state.num_rows,
        spec=spec,
        indices=_indices(torch.stack([codes.T for codes in state.main[first:]])),
        centroids=_halves(torch.stack([table.main for table in groups])),
        res_indices=_indices(torch.stack([codes.T for codes in residuals])) if residuals else None,
        res_centroids=_halves(
            torch.stack([table.residual for table in groups if table.residual is not None])
        )
        if residuals
        else None,
        outlier_indices=_indices(state.main[0].T) if first else None,
        outlier_centroids=_halves(state.tables[0].main) if first else None,
        order=_indices(order) if spec.has_order else None,
        column_scales=_halves(state.scales) if spec.has_norm else None,
        column_biases=_halves(state.biases) if spec.has_norm else None,
    )


def _indices(values: Tensor) -> NDArray[np.uint16]:
    return np.ascontiguousarray(values.cpu().numpy().astype(np.uint16))


def _halves(values: Tensor) -> NDArray[np.float16]:
    return np.ascontiguousarray(values.cpu().numpy().astype(np.float16))
