"""A linear layer in VPTQ's form: codebooks of short vectors that run along the outputs.

Liu et al., "VPTQ: Extreme Low-bit Vector Post-Training Quantization for Large Language Models",
2024; the layout of the tensors is that of its Hugging Face checkpoints. Knows no algorithm.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from vqllm.errors import InvalidConfig
from vqllm.quantization.base import Arrays, QuantizedLinear, checked_parameters
from vqllm.quantization.vptq_packing import pack_elements, words_per_row

MAX_CENTROIDS = 65536
MAX_COLUMNS = 65536  # the permutation is stored in 16 bits
ABSENT = -1  # what the format writes for a codebook that is not there

Halves = NDArray[np.float16]
Indices = NDArray[np.uint16]


@dataclass(frozen=True)
class VptqSpec:
    """Sizes of the codebooks of one linear.

    Attributes:
        vector_length: outputs per vector, v.
        num_centroids: entries of the main codebook, a power of two.
        num_res_centroids: entries of the residual codebook, a power of two; 0 for none.
        num_groups: groups of columns with codebooks of their own; they split the columns evenly.
        num_outliers: columns, first in the order of the sweep, with a codebook of their own.
        outlier_vector_length: as `vector_length`, for those columns; at least 2.
        num_outlier_centroids: entries of their codebook, a power of two.
        has_norm: whether every column has a scale and a bias.
        has_order: whether a permutation of the columns is stored; groups and outliers need it.

    Raises:
        InvalidConfig: a value is outside its range.
    """

    vector_length: int = 4
    num_centroids: int = 256
    num_res_centroids: int = 0
    num_groups: int = 1
    num_outliers: int = 0
    outlier_vector_length: int = 2
    num_outlier_centroids: int = 256
    has_norm: bool = True
    has_order: bool = False

    def __post_init__(self) -> None:
        _check_range("vector_length", self.vector_length, 1, 64)
        _check_power("num_centroids", self.num_centroids, MAX_CENTROIDS)
        if self.num_res_centroids:
            # vptq's own reader masks the residual index with the main index's bits.
            _check_power("num_res_centroids", self.num_res_centroids, self.num_centroids)
        _check_range("num_groups", self.num_groups, 1, MAX_COLUMNS)
        _check_range("num_outliers", self.num_outliers, 0, MAX_COLUMNS)
        _check_range("outlier_vector_length", self.outlier_vector_length, 2, 64)
        _check_power("num_outlier_centroids", self.num_outlier_centroids, MAX_CENTROIDS)

    @property
    def index_bits(self) -> int:
        return self.num_centroids.bit_length() - 1

    @property
    def res_bits(self) -> int:
        return self.num_res_centroids.bit_length() - 1 if self.num_res_centroids else 0

    @property
    def element_bits(self) -> int:
        return self.index_bits + self.res_bits

    def group_size(self, in_features: int) -> int:
        """Columns per group.

        Raises:
            InvalidConfig: the groups do not split the columns evenly, or there are too many.
        """
        _check_range("in_features", in_features, 1, MAX_COLUMNS)
        columns = in_features - self.num_outliers
        if columns <= 0 or columns % self.num_groups:
            raise InvalidConfig(
                "num_groups", self.num_groups, f"a divisor of the {columns} columns it splits"
            )
        return columns // self.num_groups

    def bits(self, out_features: int, in_features: int) -> int:
        """Bits in the file for a linear of this shape: indices, codebooks, norms, permutation."""
        size = self.group_size(in_features)
        rows = -(-out_features // self.vector_length)
        words = self.num_groups * rows * words_per_row(size, self.element_bits)
        entries = self.num_groups * (self.num_centroids + self.num_res_centroids)
        halves = entries * self.vector_length + 2 * in_features * self.has_norm
        halves += in_features * self.has_order
        if self.num_outliers:
            halves += -(-out_features // self.outlier_vector_length) * self.num_outliers
            halves += self.num_outlier_centroids * self.outlier_vector_length
        return 32 * words + 16 * halves


def _check_range(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise InvalidConfig(name, value, f"{low} to {high}")


def _check_power(name: str, value: int, high: int) -> None:
    if not 2 <= value <= high or value & (value - 1):
        raise InvalidConfig(name, value, f"a power of two from 2 to {high}")


@dataclass(frozen=True)
class VptqLinear(QuantizedLinear):
    """Weights as sums of codebook vectors, times a scale per column, plus a bias per column.

    Column `order[i]` of the weight is column i of the tables below: the outliers first, then the
    groups one after the other. The last vector of a column is cut where v does not divide out.

    Attributes:
        num_rows: rows of the weight matrix.
        spec: sizes of the codebooks.
        indices: uint16 (groups, ceil(out / v), columns per group).
        centroids: float16 (groups, k, v).
        res_indices, res_centroids: the same for the residual codebook, or None.
        outlier_indices: uint16 (ceil(out / v0), outliers), or None.
        outlier_centroids: float16 (k0, v0), or None.
        order: uint16 (in,), or None for the natural order.
        column_scales, column_biases: float16 (in,) in natural order, or both None.
    """

    num_rows: int
    spec: VptqSpec
    indices: Indices
    centroids: Halves
    res_indices: Indices | None = None
    res_centroids: Halves | None = None
    outlier_indices: Indices | None = None
    outlier_centroids: Halves | None = None
    order: Indices | None = None
    column_scales: Halves | None = None
    column_biases: Halves | None = None

    method: ClassVar[str] = "vptq"

    @property
    def in_features(self) -> int:
        return int(self.indices.shape[0] * self.indices.shape[2]) + self.spec.num_outliers

    @property
    def out_features(self) -> int:
        return self.num_rows

    def dequantize(self) -> NDArray[np.float32]:
        """Weights float32 (out, in), in the order of operations of VPTQ's own reader."""
        columns = self._tables()
        if self.order is not None:
            columns = columns[:, np.argsort(self.order)]
        if self.column_scales is not None and self.column_biases is not None:
            columns = columns * self.column_scales.astype(np.float32)
            columns += self.column_biases.astype(np.float32)
        return np.ascontiguousarray(columns)

    def _tables(self) -> NDArray[np.float32]:
        """Weights before permutation and scales, (out, in)."""
        parts = []
        if self.outlier_indices is not None and self.outlier_centroids is not None:
            parts.append(looked_up(self.outlier_indices, self.outlier_centroids))
        for group in range(self.spec.num_groups):
            values = looked_up(self.indices[group], self.centroids[group])
            if self.res_indices is not None and self.res_centroids is not None:
                values += looked_up(self.res_indices[group], self.res_centroids[group])
            parts.append(values)
        return np.concatenate([part[: self.out_features] for part in parts], axis=1)

    def tensors(self) -> Arrays:
        arrays: Arrays = {
            "indices": self._packed_indices(),
            "centroids.weight": self.centroids.reshape(self.spec.num_groups, -1),
        }
        if self.res_centroids is not None:
            arrays["res_centroids.weight"] = self.res_centroids.reshape(self.spec.num_groups, -1)
        if self.outlier_indices is not None and self.outlier_centroids is not None:
            arrays["outlier_indices"] = self.outlier_indices[None].view(np.int16)
            arrays["outlier_centroids.weight"] = self.outlier_centroids.reshape(1, -1)
        if self.order is not None:
            arrays["perm"] = self.order.view(np.int16)
        if self.column_scales is not None and self.column_biases is not None:
            arrays |= {"weight_scale": self.column_scales, "weight_bias": self.column_biases}
        return arrays

    def _packed_indices(self) -> NDArray[np.int32]:
        elements = self.indices.astype(np.uint32)
        if self.res_indices is not None:
            elements |= self.res_indices.astype(np.uint32) << np.uint32(self.spec.index_bits)
        return pack_elements(elements, self.spec.element_bits)

    def entry(self) -> dict[str, Any]:
        return {"method": self.method, **layer_config(self)}

    def parameters(self) -> Arrays:
        named = {
            "centroids": self.centroids,
            "res_centroids": self.res_centroids,
            "outlier_centroids": self.outlier_centroids,
            "column_scales": self.column_scales,
            "column_biases": self.column_biases,
        }
        return {name: values for name, values in named.items() if values is not None}

    def with_parameters(self, parameters: Arrays) -> Self:
        changes: dict[str, Any] = dict(checked_parameters(self.parameters(), parameters))
        return replace(self, **changes)


def looked_up(indices: Indices, centroids: NDArray[Any]) -> NDArray[np.float32]:
    """Vectors (rows, columns) of a codebook (k, v), laid along the rows: (rows * v, columns)."""
    vectors = centroids.astype(np.float32)[indices]
    return np.ascontiguousarray(vectors.transpose(0, 2, 1)).reshape(-1, indices.shape[1])


def layer_config(linear: VptqLinear) -> dict[str, Any]:
    """The entry of one layer in `config_for_layers` of a VPTQ checkpoint, without a bias."""
    spec = linear.spec
    has_outliers = spec.num_outliers > 0
    return {
        "in_features": linear.in_features,
        "out_features": linear.out_features,
        "vector_lens": [spec.outlier_vector_length if has_outliers else ABSENT, spec.vector_length],
        "num_centroids": [
            spec.num_outlier_centroids if has_outliers else ABSENT,
            spec.num_centroids,
        ],
        "num_res_centroids": [ABSENT, spec.num_res_centroids or ABSENT],
        "group_num": spec.num_groups,
        "group_size": spec.group_size(linear.in_features),
        "outlier_size": spec.num_outliers,
        "indices_as_float": False,
        "enable_norm": spec.has_norm,
        "enable_perm": spec.has_order,
        "is_indice_packed": True,
        "bias": False,
        "vector_quant_dim": "out",
    }
