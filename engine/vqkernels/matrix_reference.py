"""Plain numpy versions of the packed matrices: the definition the kernels are tested against.

Slow and clear on purpose; needs no native library. Must not import the loader.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vqkernels.matrix_weights import (
    WORD_BITS,
    DenseWeights,
    GridWeights,
    LayeredWeights,
    TcqWeights,
    Transform,
    VqColumns,
    VqWeights,
    Weights,
    count_groups,
)

ACTIVATION_GROUP = 128
INT8_MAX = np.float32(127.0)
SMALLEST_MAX = np.float32(1e-30)
NO_TRANSFORM = Transform()

Floats = npt.NDArray[np.float32]
Steps = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class QuantizedActivations:
    """int8 activations with one scale per 128 columns: value ~ scales[k // 128] * q[k].

    Attributes:
        q: int8 (in,), values -127..127.
        scales: float32 (ceil(in / 128),).
    """

    q: npt.NDArray[np.int8]
    scales: Floats


def quantize_activations(x: Floats) -> QuantizedActivations:
    """float32 (in,) -> int8, as vqkernels.h defines it.

    Every operation is one binary32 rounding, so the native code must give the same bits.
    """
    q = np.zeros(x.size, dtype=np.int8)
    scales = np.zeros(-(-x.size // ACTIVATION_GROUP), dtype=np.float32)
    for g in range(scales.size):
        span = slice(g * ACTIVATION_GROUP, (g + 1) * ACTIVATION_GROUP)
        amax = np.abs(x[span]).max()
        if amax < SMALLEST_MAX:
            continue
        scales[g] = amax / INT8_MAX
        q[span] = np.rint(x[span] * (INT8_MAX / amax)).astype(np.int8)
    return QuantizedActivations(q, scales)


def stages(
    weights: GridWeights | DenseWeights | LayeredWeights | TcqWeights | VqWeights,
) -> Iterator[tuple[Steps, Floats, int]]:
    """Integer weights int32 (out, in), scales float32 (groups, out) and columns per group."""
    if isinstance(weights, GridWeights):
        yield _grid_stage(weights)
    elif isinstance(weights, DenseWeights):
        yield _dense_stage(weights)
    elif isinstance(weights, LayeredWeights):
        yield _layered_stage(weights)
    elif isinstance(weights, TcqWeights):
        values = weights.table[tcq_indices(weights)].astype(np.int32)
        yield values, weights.scales.astype(np.float32), _group_columns(weights)
    else:
        yield from _vq_stages(weights)


def dequantize(weights: Weights) -> Floats:
    """float32 (out, in) as the checkpoint means it; DENSE as rounded to 8 bits."""
    if isinstance(weights, VqColumns):
        return np.concatenate([dequantize(part) for part in weights.parts], axis=1)
    if isinstance(weights, VqWeights):
        parts = [
            _along_outputs(codebook.astype(np.float32)[index], weights.out_features)
            for index, codebook in zip(weights.indices, weights.codebooks, strict=True)
        ]
        return np.asarray(sum(parts[1:], parts[0]), dtype=np.float32)
    ((steps, scales, columns),) = stages(weights)
    group = np.arange(steps.shape[1]) // columns
    return np.asarray(steps.astype(np.float32) * scales[group].T, dtype=np.float32)


def matmul_float(
    parts: Sequence[Weights], x: Floats, transform: Transform = NO_TRANSFORM
) -> Floats:
    """The product in float64: x (batch, in) -> (batch, out of all parts)."""
    weight = np.concatenate([dequantize(part) for part in parts]).astype(np.float64)
    y = transform_input(x.astype(np.float64), transform) @ weight.T
    if transform.column_bias is not None:
        y = y + (x.astype(np.float64) @ transform.column_bias.astype(np.float64))[:, None]
    if transform.row_bias is not None:
        y = y + transform.row_bias.astype(np.float64)
    return np.asarray(y, dtype=np.float32)


def matmul_int8(parts: Sequence[Weights], x: Floats, transform: Transform = NO_TRANSFORM) -> Floats:
    """The kernels' arithmetic, operation by operation: x (batch, in) -> (batch, out)."""
    rows = []
    for row in x:
        seen = transform_input(row, transform)
        y = np.concatenate([_part_int8(part, seen) for part in parts])
        if transform.column_bias is not None:
            y = y + dot_in_kernel_order(row, transform.column_bias.astype(np.float32))
        if transform.row_bias is not None:
            y = y + transform.row_bias.astype(np.float32)
        rows.append(y)
    return np.stack(rows)


def transform_input(x: npt.NDArray[Any], transform: Transform) -> npt.NDArray[Any]:
    """x (..., in) as the columns of the weights read it."""
    if transform.column_scales is not None:
        x = x * transform.column_scales.astype(x.dtype)
    if transform.permutation is not None:
        x = x[..., transform.permutation]
    return np.ascontiguousarray(x)


def dot_in_kernel_order(a: Floats, b: Floats) -> np.float32:
    """Eight partial sums over every eighth product, added up from the first."""
    partial = np.zeros(8, dtype=np.float32)
    whole = a.size // 8 * 8
    for k in range(0, whole, 8):
        partial = partial + a[k : k + 8] * b[k : k + 8]
    rest = a.size - whole
    partial[:rest] = partial[:rest] + a[whole:] * b[whole:]
    total = np.float32(0)
    for value in partial:
        total = np.float32(total + value)
    return total


def unpack_words(words: npt.NDArray[np.int32], bits: int) -> npt.NDArray[np.uint8]:
    """int32 (in * bits / 32, out) -> codes uint8 (in, out), lowest bits first."""
    num_words, num_outputs = words.shape
    shifts = np.arange(WORD_BITS, dtype=np.uint32)
    stream = (np.ascontiguousarray(words).view(np.uint32)[:, None, :] >> shifts[:, None]) & 1
    count = num_words * WORD_BITS // bits
    planes = stream.reshape(-1, num_outputs)[: count * bits].reshape(count, bits, num_outputs)
    values = (planes << np.arange(bits, dtype=np.uint32)[:, None]).sum(axis=1)
    return np.asarray(values, dtype=np.uint8)


def tcq_indices(weights: TcqWeights) -> npt.NDArray[np.int64]:
    """Table indices int64 (out, in) of every weight, by walking the bit streams."""
    out, bits, width = weights.out_features, weights.bits, weights.trellis_bits
    stream = np.unpackbits(weights.codes, axis=1, bitorder="little")[:, : out * bits]
    symbols = stream.reshape(-1, out, bits).astype(np.int64) @ (1 << np.arange(bits))
    state = np.zeros(weights.in_features, dtype=np.int64)
    indices = np.empty((out, weights.in_features), dtype=np.int64)
    for row in range(out):
        state = (state >> bits) | (symbols[:, row] << (width - bits))
        indices[row] = ((state * weights.multiplier) & ((1 << width) - 1)) >> (width - 8)
    return indices


def round_codebook(codebook: npt.NDArray[np.float16]) -> tuple[Steps, Floats]:
    """Codebook (k, v) -> int8 values as int32 and one scale per component, float32 (v,)."""
    values = codebook.astype(np.float32)
    scales = np.abs(values).max(axis=0) / INT8_MAX
    safe = np.where(scales > 0, scales, np.float32(1))
    steps = np.clip(np.rint(values / safe), -127, 127)
    return np.where(scales > 0, steps, 0).astype(np.int32), scales


def _group_columns(weights: GridWeights | DenseWeights | TcqWeights) -> int:
    return weights.group_size or weights.in_features


def _grid_stage(weights: GridWeights) -> tuple[Steps, Floats, int]:
    codes = weights.codes
    if codes.dtype == np.int32:
        codes = unpack_words(codes, weights.bits)
    columns = _group_columns(weights)
    group = np.arange(weights.in_features) // columns
    zeros: Any = 1 << (weights.bits - 1)
    if weights.zeros is not None:
        zeros = weights.zeros.astype(np.int32)[group]
    return (codes.astype(np.int32) - zeros).T, weights.scales.astype(np.float32), columns


def _layered_stage(weights: LayeredWeights) -> tuple[Steps, Floats, int]:
    if weights.scales is None:
        return _dense_stage(DenseWeights(weights.weight))
    scales = weights.scales.astype(np.float32)[None]
    return weights.weight.astype(np.int32), scales, weights.in_features


def _dense_stage(weights: DenseWeights) -> tuple[Steps, Floats, int]:
    columns = _group_columns(weights)
    weight = weights.weight.astype(np.float32)
    groups = count_groups(weights.in_features, weights.group_size)
    scales = np.zeros((groups, weights.out_features), dtype=np.float32)
    steps = np.zeros(weight.shape, dtype=np.int32)
    for g in range(groups):
        span = slice(g * columns, (g + 1) * columns)
        largest = np.abs(weight[:, span]).max(axis=1)
        scales[g] = (largest / INT8_MAX).astype(np.float16).astype(np.float32)
        safe = np.where(scales[g] > 0, scales[g], np.float32(1))
        inverse = np.where(scales[g] > 0, np.float32(1) / safe, np.float32(0))
        steps[:, span] = np.clip(np.rint(weight[:, span] * inverse[:, None]), -127, 127)
    return steps, scales, columns


def _vq_stages(weights: VqWeights) -> Iterator[tuple[Steps, Floats, int]]:
    for index, codebook in zip(weights.indices, weights.codebooks, strict=True):
        values, component_scales = round_codebook(codebook)
        steps = _along_outputs(values[index], weights.out_features)
        scales = np.resize(component_scales, weights.out_features)[None, :]
        yield steps, scales, weights.in_features


def _along_outputs(vectors: npt.NDArray[Any], out_features: int) -> npt.NDArray[Any]:
    """(rows, in, v) -> (out, in)."""
    return vectors.transpose(0, 2, 1).reshape(-1, vectors.shape[1])[:out_features]


def _part_int8(weights: Weights, x: Floats) -> Floats:
    y: Floats | None = None
    parts = weights.parts if isinstance(weights, VqColumns) else (weights,)
    for part in parts:
        seen, x = x[: part.in_features], x[part.in_features :]
        activations = quantize_activations(seen)
        for steps, scales, columns in stages(part):
            sums = _stage_int8(steps, scales, columns, activations)
            y = sums if y is None else y + sums
    assert y is not None
    return y


def _stage_int8(
    steps: Steps, scales: Floats, columns: int, activations: QuantizedActivations
) -> Floats:
    y = np.zeros(steps.shape[0], dtype=np.float32)
    length = min(ACTIVATION_GROUP, columns)
    q = activations.q.astype(np.int32)
    for start in range(0, steps.shape[1], length):
        span = slice(start, start + length)
        dots = steps[:, span] @ q[span]
        scale = scales[start // columns] * activations.scales[start // ACTIVATION_GROUP]
        y = y + dots.astype(np.float32) * scale
    return y
