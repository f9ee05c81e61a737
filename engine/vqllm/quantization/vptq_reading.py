"""A `VptqLinear` from its tensors and the facts that stand beside them, both checked.

Knows no file; messages name the part or the field, callers add where it came from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vqllm.errors import InvalidConfig, UnsupportedModel
from vqllm.quantization.base import Arrays
from vqllm.quantization.vptq_linear import VptqLinear, VptqSpec
from vqllm.quantization.vptq_packing import unpack_elements, words_per_row


def read_vptq(tensors: Arrays, entry: Mapping[str, Any]) -> VptqLinear:
    """The linear whose `tensors()` and `entry()` are given.

    Raises:
        ValueError: a part is missing or misshapen, or contradicts a field of the entry.
        UnsupportedModel: vectors along the inputs, or indices that are not packed.
    """
    spec = spec_of(entry)
    out_features, in_features = entry["out_features"], entry["in_features"]
    main, residual = _indices(tensors, out_features, in_features, spec)
    outliers = _outliers(tensors, out_features, spec) if spec.num_outliers else (None, None)
    norm = (in_features,)
    return VptqLinear(
        num_rows=out_features,
        spec=spec,
        indices=main,
        centroids=_codebook(tensors, "centroids.weight", spec.num_centroids, spec),
        res_indices=residual,
        res_centroids=None
        if residual is None
        else _codebook(tensors, "res_centroids.weight", spec.num_res_centroids, spec),
        outlier_indices=outliers[0],
        outlier_centroids=outliers[1],
        order=_order(tensors, in_features) if spec.has_order else None,
        column_scales=_halves(tensors, "weight_scale", norm) if spec.has_norm else None,
        column_biases=_halves(tensors, "weight_bias", norm) if spec.has_norm else None,
    )


def spec_of(entry: Mapping[str, Any]) -> VptqSpec:
    """Codebook sizes from the entry of a layer, in the field names of VPTQ's checkpoints.

    Raises:
        ValueError: a field is absent, impossible, or contradicts another one.
        UnsupportedModel: as `read_vptq`.
    """
    if entry.get("vector_quant_dim", "out") != "out" or not entry.get("is_indice_packed", True):
        raise UnsupportedModel(
            "only packed indices of vectors along the outputs can be read "
            "(vector_quant_dim 'out', is_indice_packed true)"
        )
    lengths, counts, residuals = (
        _pair(entry, key) for key in ("vector_lens", "num_centroids", "num_res_centroids")
    )
    has_outliers = lengths[0] > 1 and counts[0] > 0
    spec = VptqSpec(
        vector_length=lengths[1],
        num_centroids=counts[1],
        num_res_centroids=max(residuals[1], 0),
        num_groups=_integer(entry, "group_num"),
        num_outliers=_integer(entry, "outlier_size") if has_outliers else 0,
        outlier_vector_length=lengths[0] if has_outliers else 2,
        num_outlier_centroids=counts[0] if has_outliers else 256,
        has_norm=bool(entry.get("enable_norm")),
        has_order=bool(entry.get("enable_perm")),
    )
    group_size = spec.group_size(_integer(entry, "in_features"))
    if _integer(entry, "group_size") != group_size or _integer(entry, "out_features") < 1:
        raise InvalidConfig("group_size", entry["group_size"], f"{group_size} for these columns")
    return spec


def _integer(entry: Mapping[str, Any], key: str) -> int:
    value = entry.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidConfig(key, value, "an integer")
    return value


def _pair(entry: Mapping[str, Any], key: str) -> tuple[int, int]:
    """(outlier, main) values of a field."""
    values = entry.get(key)
    if not isinstance(values, list | tuple) or len(values) != 2:
        raise InvalidConfig(key, values, "two integers, for outliers and for the rest")
    if not all(isinstance(value, int) for value in values):
        raise InvalidConfig(key, values, "two integers, for outliers and for the rest")
    return values[0], values[1]


def _part(
    tensors: Arrays, part: str, dtype: type[np.generic], shape: tuple[int, ...]
) -> NDArray[Any]:
    values = tensors.get(part)
    if values is None:
        raise ValueError(f"{part} is missing")
    if values.dtype != np.dtype(dtype) or values.shape != shape:
        raise ValueError(
            f"{part} is {values.dtype} {values.shape}, but the layer's entry implies "
            f"{np.dtype(dtype).name} {shape}"
        )
    return np.ascontiguousarray(values)


def _halves(tensors: Arrays, part: str, shape: tuple[int, ...]) -> NDArray[np.float16]:
    values = _part(tensors, part, np.float16, shape)
    if not np.isfinite(values).all():
        raise ValueError(f"{part} holds NaN or infinite values")
    return values


def _indices(
    tensors: Arrays, out_features: int, in_features: int, spec: VptqSpec
) -> tuple[NDArray[np.uint16], NDArray[np.uint16] | None]:
    """Main and residual indices, each (groups, ceil(out / v), columns per group)."""
    group_size = spec.group_size(in_features)
    rows = -(-out_features // spec.vector_length)
    shape = (spec.num_groups, rows, words_per_row(group_size, spec.element_bits))
    words = _part(tensors, "indices", np.int32, shape)
    elements = unpack_elements(words, spec.element_bits, group_size)
    main = (elements & np.uint32(spec.num_centroids - 1)).astype(np.uint16)
    if not spec.num_res_centroids:
        return main, None
    return main, (elements >> np.uint32(spec.index_bits)).astype(np.uint16)


def _codebook(tensors: Arrays, part: str, num_entries: int, spec: VptqSpec) -> NDArray[np.float16]:
    flat = _halves(tensors, part, (spec.num_groups, num_entries * spec.vector_length))
    return flat.reshape(spec.num_groups, num_entries, spec.vector_length)


def _outliers(
    tensors: Arrays, out_features: int, spec: VptqSpec
) -> tuple[NDArray[np.uint16], NDArray[np.float16]]:
    entries, length = spec.num_outlier_centroids, spec.outlier_vector_length
    shape = (1, -(-out_features // length), spec.num_outliers)
    indices = _part(tensors, "outlier_indices", np.int16, shape)[0].view(np.uint16)
    if int(indices.max()) >= entries:
        raise ValueError("outlier_indices names a centroid that is not there")
    flat = _halves(tensors, "outlier_centroids.weight", (1, entries * length))
    return indices, flat.reshape(entries, length)


def _order(tensors: Arrays, in_features: int) -> NDArray[np.uint16]:
    order = _part(tensors, "perm", np.int16, (in_features,)).view(np.uint16)
    if not np.array_equal(np.sort(order), np.arange(in_features)):
        raise ValueError(f"perm is not a permutation of {in_features} columns")
    return order
