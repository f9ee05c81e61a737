"""Linears of a checkpoint as the native library packs them: which can be, and how.

Knows the classes of quantized linears and the weight classes of vqkernels; no executor.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vqkernels.matrix_weights import (
    GRID_BITS,
    MAX_PARTS,
    MAX_VECTOR,
    DenseWeights,
    GridWeights,
    TcqWeights,
    Transform,
    VqColumns,
    VqWeights,
    Weights,
)
from vqllm.checkpoint import Checkpoint
from vqllm.errors import UnsupportedModel
from vqllm.formats.gptq import GptqFormat, sampled_zeros
from vqllm.packing import unpack_columns
from vqllm.quantization.base import GroupedLinear, QuantizedLinear, contiguous_groups
from vqllm.quantization.vptq_linear import VptqLinear

CHUNK = 128
SMALL_GROUPS = (32, 64)
Packable = tuple[Weights, Transform]
VectorPart = tuple[tuple[NDArray[Any], ...], tuple[NDArray[Any], ...]]


def packable(checkpoint: Checkpoint, name: str) -> Packable:
    """The linear `name`, with its bias, as the native library takes it.

    Float linears are rounded to 8 bits.

    Raises:
        UnsupportedModel: no kernel has this format; names the linear and the feature.
        CorruptCheckpoint: a tensor is missing, misshapen, not finite or contradicts config.json.
    """
    weights, transform = _without_bias(checkpoint, name)
    bias = f"{name}.bias"
    if bias not in checkpoint.store:
        return weights, transform
    row_bias = checkpoint.dense(bias, (weights.out_features,))
    return weights, replace(transform, row_bias=row_bias)


def _without_bias(checkpoint: Checkpoint, name: str) -> Packable:
    words = _stored_words(checkpoint, name)
    if words is not None:
        return words, Transform()
    linear = checkpoint.linear(name)
    if isinstance(linear, np.ndarray):
        return DenseWeights(linear), Transform()
    return pack_quantized(linear, name)


def pack_quantized(linear: QuantizedLinear, name: str) -> Packable:
    """A quantized linear as the native library takes it.

    Raises:
        UnsupportedModel: no kernel has this format; names the linear and the feature.
    """
    if isinstance(linear, GroupedLinear):
        return _grid(linear, name)
    if isinstance(linear, VptqLinear):
        return _vectors(linear, name)
    if linear.method == "tcq":
        return _trellis(linear)
    raise UnsupportedModel(f"{name}: no native kernel for {linear.method!r}; {_REMEDY}")


_REMEDY = "use the executor onnx or torch"


def _stored_words(checkpoint: Checkpoint, name: str) -> GridWeights | None:
    """GPTQ codes straight from the file, where nothing has to be looked into."""
    form, store = checkpoint.quantization, checkpoint.store
    if not isinstance(form, GptqFormat) or f"{name}.qweight" not in store:
        return None
    spec = form.spec
    out_features, in_features = checkpoint.linear_shape(name)
    groups = spec.num_groups(in_features)
    shapes = {
        "qweight": (in_features * spec.bits // 32, out_features),
        "qzeros": (groups, out_features * spec.bits // 32),
        "scales": (groups, out_features),
    }
    if any(store.shape(f"{name}.{part}") != shape for part, shape in shapes.items()):
        return None  # the checkpoint's own reader says what is wrong
    words, scales = store.raw(f"{name}.qweight"), store.raw(f"{name}.scales")
    group_size, plain = _group_size(spec.group_size, in_features), _plain_groups(checkpoint, name)
    if scales.dtype != np.float16 or group_size is None or plain is None:
        return None
    stored = unpack_columns(store.raw(f"{name}.qzeros"), spec.bits)
    zeros = sampled_zeros(stored, words, plain, form, name)
    return None if zeros is None else GridWeights(words, scales, zeros, spec.bits, group_size)


def _plain_groups(checkpoint: Checkpoint, name: str) -> NDArray[np.int32] | None:
    """The group (in,) of every column; None where groups are no runs of columns."""
    form, store = checkpoint.quantization, checkpoint.store
    assert isinstance(form, GptqFormat)
    expected = contiguous_groups(checkpoint.linear_shape(name)[1], form.spec)
    has_index = f"{name}.g_idx" in store
    is_plain = not has_index or np.array_equal(store.raw(f"{name}.g_idx"), expected)
    return expected if is_plain else None


def _group_size(group_size: int, in_features: int) -> int | None:
    """The kernels' spelling of a group size, or None where they have none."""
    if group_size >= in_features:
        return 0
    return group_size if group_size in SMALL_GROUPS or group_size % CHUNK == 0 else None


def _grid(linear: GroupedLinear, name: str) -> Packable:
    spec = linear.spec
    group_size = _group_size(spec.group_size, linear.in_features)
    if spec.bits not in GRID_BITS or group_size is None:
        raise UnsupportedModel(
            f"{name}: no native kernel for {spec.bits} bits in groups of {spec.group_size}; "
            f"group sizes are 32, 64 and multiples of {CHUNK}; {_REMEDY}"
        )
    codes, transform = linear.codes, Transform()
    if not linear.has_contiguous_groups:
        order = np.argsort(linear.group_index, kind="stable")
        if not np.array_equal(
            linear.group_index[order], contiguous_groups(linear.in_features, spec)
        ):
            raise UnsupportedModel(f"{name}: groups of unequal size; {_REMEDY}")
        codes, transform = np.ascontiguousarray(codes[order]), Transform(permutation=order)
    zeros = None if linear.is_symmetric else linear.zeros
    return GridWeights(codes, linear.scales, zeros, spec.bits, group_size), transform


def _trellis(linear: Any) -> Packable:
    """`linear` is a TcqLinear, whose module imports torch."""
    codebook = linear.codebook
    group_size = _group_size(linear.group_size, linear.in_features) if linear.group_size else 0
    if group_size is None:
        raise UnsupportedModel(
            f"tcq with groups of {linear.group_size}; native kernels have 32, 64 and multiples "
            f"of {CHUNK}; {_REMEDY}"
        )
    weights = TcqWeights(
        codes=linear.codes,
        scales=linear.scales,
        table=np.ascontiguousarray(codebook.table, dtype=np.int8),
        multiplier=codebook.multiplier,
        bits=codebook.bits,
        trellis_bits=codebook.trellis_bits,
        group_size=group_size,
    )
    return weights, Transform(column_scales=linear.column_scales)


def _vectors(linear: VptqLinear, name: str) -> Packable:
    parts = _vector_parts(linear)
    longest = max(codebooks[0].shape[1] for _, codebooks in parts)
    if longest > MAX_VECTOR or len(parts) > MAX_PARTS:
        raise UnsupportedModel(
            f"{name}: no native kernel for vectors of {longest} in {len(parts)} runs of columns; "
            f"at most {MAX_VECTOR} in {MAX_PARTS}; {_REMEDY}"
        )
    weights = tuple(VqWeights(*part, linear.out_features) for part in parts)
    order: NDArray[Any] | None = linear.order
    transform = Transform(
        permutation=None if order is None else order.astype(np.int32),
        column_scales=linear.column_scales,
        column_bias=linear.column_biases,
    )
    return weights[0] if len(weights) == 1 else VqColumns(weights), transform


def _vector_parts(linear: VptqLinear) -> list[VectorPart]:
    """Indices and codebooks of the outliers, then of every group of columns, stage by stage."""
    parts: list[VectorPart] = []
    if linear.outlier_indices is not None and linear.outlier_centroids is not None:
        parts.append(((linear.outlier_indices,), (linear.outlier_centroids,)))
    for group in range(linear.spec.num_groups):
        indices, codebooks = [linear.indices[group]], [linear.centroids[group]]
        if linear.res_indices is not None and linear.res_centroids is not None:
            indices.append(linear.res_indices[group])
            codebooks.append(linear.res_centroids[group])
        parts.append((tuple(indices), tuple(codebooks)))
    return parts
