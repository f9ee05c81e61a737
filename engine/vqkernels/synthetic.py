"""Random weights of every format, for benchmarks and tests.

A maker gives the same weights for the same (outputs, columns, seed). Knows no native library.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from vqkernels.matrix_weights import (
    DenseWeights,
    GridWeights,
    LayeredWeights,
    TcqWeights,
    VqColumns,
    VqWeights,
    Weights,
    count_groups,
)

Maker = Callable[[int, int, int], Weights]
VqMaker = Callable[[int, int, int], VqWeights]


def halves(random: np.random.Generator, *shape: int) -> npt.NDArray[np.float16]:
    """Scales like those of a trained linear."""
    return random.uniform(1e-3, 2e-2, shape).astype(np.float16)


def grid(bits: int, group_size: int = 128, asymmetric: bool = False) -> Maker:
    """Uniform codes."""

    def make(out: int, columns: int, seed: int) -> Weights:
        random = np.random.default_rng(seed)
        groups = count_groups(columns, group_size)
        codes = random.integers(0, 1 << bits, (columns, out), dtype=np.uint8)
        zeros = random.integers(0, 1 << bits, (groups, out), dtype=np.uint8)
        scales = halves(random, groups, out)
        return GridWeights(codes, scales, zeros if asymmetric else None, bits, group_size)

    return make


def dense(group_size: int = 0, dtype: Any = np.float32) -> Maker:
    """Normal weights, the first row all 0."""

    def make(out: int, columns: int, seed: int) -> Weights:
        weight = np.random.default_rng(seed).standard_normal((out, columns)) * 0.05
        weight[0] = 0.0
        return DenseWeights(weight.astype(dtype), group_size)

    return make


def layered(dtype: Any = np.float32) -> Maker:
    """As `dense`, or with random codes and scales for int8."""

    def make(out: int, columns: int, seed: int) -> Weights:
        if np.dtype(dtype) != np.int8:
            weights = dense(0, dtype)(out, columns, seed)
            assert isinstance(weights, DenseWeights)
            return LayeredWeights(weights.weight)
        random = np.random.default_rng(seed)
        codes = random.integers(-128, 128, (out, columns), dtype=np.int8)
        return LayeredWeights(codes, halves(random, out))

    return make


def tcq(bits: int, trellis_bits: int = 12, group_size: int = 0, num_levels: int = 256) -> Maker:
    """Random streams, table and multiplier; levels repeat in neighbouring entries of the table."""

    def make(out: int, columns: int, seed: int) -> Weights:
        random = np.random.default_rng(seed)
        return TcqWeights(
            codes=random.integers(0, 256, (columns, -(-out * bits // 8)), dtype=np.uint8),
            scales=halves(random, count_groups(columns, group_size), out),
            table=np.repeat(random.integers(-128, 128, num_levels), 256 // num_levels).astype(
                np.int8
            ),
            multiplier=int(random.integers(0, 1 << 15)) * 2 + 1,
            bits=bits,
            trellis_bits=trellis_bits,
            group_size=group_size,
        )

    return make


def vq(length: int, *sizes: int) -> VqMaker:
    """Indices that use all entries alike: the worst case for large codebooks."""

    def make(out: int, columns: int, seed: int) -> VqWeights:
        random = np.random.default_rng(seed)
        rows = -(-out // length)
        return VqWeights(
            tuple(random.integers(0, k, (rows, columns), dtype=np.uint16) for k in sizes),
            tuple((random.standard_normal((k, length)) * 0.05).astype(np.float16) for k in sizes),
            out,
        )

    return make


def beside(*makers: VqMaker) -> Maker:
    """Parts over runs of columns of growing width, as many of them as there are columns for."""

    def make(out: int, columns: int, seed: int) -> Weights:
        shares = np.arange(1, len(makers) + 1) ** 2
        ends = columns * np.cumsum(shares) // shares.sum()
        widths = [int(width) for width in np.diff(ends, prepend=0) if width]
        chosen = makers[-len(widths) :]
        parts = tuple(
            maker(out, width, seed + i)
            for i, (maker, width) in enumerate(zip(chosen, widths, strict=True))
        )
        return VqColumns(parts) if len(parts) > 1 else parts[0]

    return make
