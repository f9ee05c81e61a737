"""Plain numpy versions of every native op: the definition the kernels are tested against.

Slow and clear on purpose; needs no native library. Must not import the loader.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vqkernels.layout import CODES_PER_WORD, SYMMETRIC_ZERO, GptqTensors

SMALLEST_MAX = np.float32(1e-30)
INT8_MAX = np.float32(127.0)


@dataclass(frozen=True, eq=False)
class QuantizedActivations:
    """int8 activations with one scale per group: value ~ scales[g] * q[k].

    Attributes:
        q: int8 [in_features], values -127..127.
        scales: float32 [num_groups].
        sums: int32 [num_groups], the sum of q over each group.
    """

    q: npt.NDArray[np.int8]
    scales: npt.NDArray[np.float32]
    sums: npt.NDArray[np.int32]


def unpack_codes(qweight: npt.NDArray[np.int32]) -> npt.NDArray[np.uint8]:
    """int32 [in / 8, out] -> codes uint8 [in, out], values 0..15."""
    shifts = np.arange(CODES_PER_WORD, dtype=np.uint32) * 4
    nibbles = (qweight.view(np.uint32)[:, None, :] >> shifts[None, :, None]) & 15
    return nibbles.reshape(-1, qweight.shape[1]).astype(np.uint8)


def unpack_zeros(tensors: GptqTensors) -> npt.NDArray[np.uint8]:
    """Zero points uint8 [num_groups, out], values 0..15, with the format's offset applied."""
    shape = (tensors.num_groups, tensors.out_features)
    if tensors.qzeros is None:
        return np.full(shape, SYMMETRIC_ZERO, dtype=np.uint8)
    shifts = np.arange(CODES_PER_WORD, dtype=np.uint32) * 4
    nibbles = (np.ascontiguousarray(tensors.qzeros).view(np.uint32)[:, :, None] >> shifts) & 15
    stored = nibbles.reshape(tensors.num_groups, -1)[:, : tensors.out_features]
    return ((stored + tensors.zero_offset) & 15).astype(np.uint8)


def dequantize(tensors: GptqTensors) -> npt.NDArray[np.float32]:
    """The weight as float32 [in, out]: (code - zero) * scale."""
    group = np.arange(tensors.in_features) // tensors.group_size
    codes = unpack_codes(np.ascontiguousarray(tensors.qweight)).astype(np.float32)
    zeros = unpack_zeros(tensors).astype(np.float32)
    return (codes - zeros[group]) * tensors.scales.astype(np.float32)[group]


def quantize_activations(x: npt.NDArray[np.float32], group_size: int) -> QuantizedActivations:
    """float32 [in] -> int8 with one scale per group, as ``vq_q8_quantize`` defines it.

    Every operation is one binary32 rounding, so the native code must give the same bits.
    """
    num_groups = -(-x.size // group_size)
    q = np.zeros(x.size, dtype=np.int8)
    scales = np.zeros(num_groups, dtype=np.float32)
    for g in range(num_groups):
        span = slice(g * group_size, min(x.size, (g + 1) * group_size))
        amax = np.abs(x[span]).max()
        if amax < SMALLEST_MAX:
            continue
        scales[g] = amax / INT8_MAX
        q[span] = np.rint(x[span] * (INT8_MAX / amax)).astype(np.int8)
    sums = np.add.reduceat(q.astype(np.int32), np.arange(num_groups) * group_size)
    return QuantizedActivations(q=q, scales=scales, sums=sums.astype(np.int32))


def q4_gemv_float(tensors: GptqTensors, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """y[n] = sum_k x[k] * weight[k, n] with exact weights and activations. x is [..., in]."""
    y = x.astype(np.float64) @ dequantize(tensors).astype(np.float64)
    return np.asarray(y, dtype=np.float32)


def q4_gemv_int8(tensors: GptqTensors, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The arithmetic of ``vq_q4_gemv`` for one row x [in], operation by operation."""
    activations = quantize_activations(x, tensors.group_size)
    codes = unpack_codes(np.ascontiguousarray(tensors.qweight)).astype(np.int32)
    zeros = unpack_zeros(tensors).astype(np.int32)
    scales = tensors.scales.astype(np.float32)
    y = np.zeros(tensors.out_features, dtype=np.float32)
    for g in range(tensors.num_groups):
        span = slice(g * tensors.group_size, min(x.size, (g + 1) * tensors.group_size))
        dots = activations.q[span].astype(np.int32) @ (codes[span] - zeros[g])
        y = y + dots.astype(np.float32) * (scales[g] * activations.scales[g])
    return y
