"""Random layers of every format with their weights in double precision, for checks and benchmarks.

The weights are worked out from the formats' definitions in numpy, never by a kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vqkernels.cuda.codebook import CodebookArrays, CodebookWeights
from vqkernels.cuda.gptq import GptqArrays, GptqWeights
from vqkernels.cuda.gpu import Gpu
from vqkernels.cuda.trellis import TrellisArrays, TrellisWeights
from vqkernels.cuda.weights import CudaWeights

Dense = NDArray[np.float64]
MULTIPLIER, TRELLIS_BITS = 1917, 12


@dataclass(frozen=True)
class Sample:
    """A random layer: `weights` uploads it, `dense` gives the (out, in) float64 of its product."""

    weights: Callable[[Gpu], CudaWeights]
    dense: Callable[[], Dense]


def gptq_sample(
    shape: tuple[int, int], bits: int, group_size: int = 128, has_zeros: bool = False, seed: int = 0
) -> Sample:
    """A uniform grid; `shape` is (out, in) here and below."""
    random, (outputs, inputs) = np.random.default_rng(seed), shape
    groups = -(-inputs // group_size)
    words = random.integers(0, 2**32, (inputs * bits // 32, outputs), np.uint32)
    scales = (0.1 * random.normal(size=(groups, outputs))).astype(np.float16)
    zeros = random.integers(0, 1 << bits, (groups, outputs), np.uint8) if has_zeros else None
    arrays = GptqArrays(words.view(np.int32), scales, zeros, bits, group_size)

    def dense() -> Dense:
        stream = ((words[:, None, :] >> np.arange(32, dtype=np.uint32)[:, None]) & 1).astype(
            np.int64
        )
        planes = stream.reshape(inputs, bits, outputs)
        codes = (planes << np.arange(bits)[:, None]).sum(1)
        group = np.arange(inputs) // group_size
        zero = 1 << (bits - 1) if zeros is None else zeros[group].astype(np.int64)
        return np.asarray((codes - zero).T * scales[group].T.astype(np.float64))

    return Sample(lambda gpu: GptqWeights(gpu, arrays), dense)


def codebook_sample(
    shape: tuple[int, int],
    v: int,
    stages: int,
    entries: int,
    has_transform: bool = False,
    seed: int = 0,
) -> Sample:
    """Vectors along the outputs; `has_transform` adds column scales, biases and an order."""
    random, (outputs, inputs) = np.random.default_rng(seed), shape
    indices = random.integers(0, entries, (stages, outputs // v, inputs))
    table = (0.1 * random.normal(size=(stages, entries, v))).astype(np.float16)
    extras: dict[str, NDArray[Any]] = {}
    if has_transform:
        extras["input_scale"] = (1 + 0.1 * random.normal(size=inputs)).astype(np.float16)
        extras["input_bias"] = (0.01 * random.normal(size=inputs)).astype(np.float16)
        extras["permutation"] = random.permutation(inputs)
    arrays = CodebookArrays(indices, table, **extras)

    def dense() -> Dense:
        packed = np.zeros((outputs // v, v, inputs))
        for stage in range(stages):
            packed += table[stage].astype(np.float64)[indices[stage]].transpose(0, 2, 1)
        if not has_transform:
            return packed.reshape(outputs, inputs)
        natural = np.empty((outputs, inputs))
        natural[:, extras["permutation"]] = packed.reshape(outputs, inputs)
        scale, bias = (extras[name].astype(np.float64) for name in ("input_scale", "input_bias"))
        return np.asarray(natural * scale + bias)

    return Sample(lambda gpu: CodebookWeights(gpu, arrays), dense)


def trellis_sample(
    shape: tuple[int, int],
    bits: int,
    group_size: int = 0,
    has_column_scales: bool = False,
    seed: int = 0,
) -> Sample:
    """A bitshift trellis along the outputs."""
    random, (outputs, inputs) = np.random.default_rng(seed), shape
    codes = random.integers(0, 256, (inputs, -(-outputs * bits // 8)), dtype=np.uint8)
    table = random.integers(-127, 128, 256).astype(np.int8)
    group = np.arange(inputs) // (group_size or inputs)
    scales = (0.01 * random.normal(size=(group[-1] + 1, outputs))).astype(np.float16)
    columns = (1 + 0.1 * random.normal(size=inputs)).astype(np.float16)
    arrays = TrellisArrays(
        codes,
        table,
        scales,
        bits,
        MULTIPLIER,
        TRELLIS_BITS,
        group_size,
        columns if has_column_scales else None,
    )

    def dense() -> Dense:
        stream = np.unpackbits(codes, axis=1, bitorder="little")
        stream = np.pad(stream, ((0, 0), (TRELLIS_BITS, 0)))
        weights = np.empty((outputs, inputs))
        for row in range(outputs):
            window = stream[:, (row + 1) * bits :][:, :TRELLIS_BITS].astype(np.int64)
            state = (window << np.arange(TRELLIS_BITS)).sum(1)
            index = (state * MULTIPLIER) % (1 << TRELLIS_BITS) >> (TRELLIS_BITS - 8)
            weights[row] = table[index] * scales[group, row].astype(np.float64)
        return np.asarray(weights * columns.astype(np.float64) if has_column_scales else weights)

    return Sample(lambda gpu: TrellisWeights(gpu, arrays), dense)


def odd_samples(inputs: int = 1120, outputs: int = 1540) -> dict[str, Sample]:
    """Every kernel family over sizes that are no multiples of any tile.

    `inputs` is a multiple of 32 and `outputs` of 4, which GPTQ's layout asks for.
    """
    shape, uneven = (outputs, inputs), (outputs + 1, inputs - 19)
    return {
        **{f"gptq {b} bit": gptq_sample(shape, b) for b in (2, 3, 4, 8)},
        **{f"gptq {b} bit, zeros": gptq_sample(shape, b, 96, True) for b in (2, 3, 4, 8)},
        "vq v4 k256": codebook_sample((outputs, inputs - 7), 4, 1, 256, True),
        "vq v8 k64": codebook_sample((outputs + 4, inputs - 7), 8, 1, 64),
        "vq v8 k256+256": codebook_sample((outputs + 4, inputs - 6), 8, 2, 256, True),
        "vq v4 k4096": codebook_sample((outputs, inputs - 13), 4, 1, 4096),
        "vq v8 k4096+4096": codebook_sample((outputs + 4, inputs - 9), 8, 2, 4096),
        "vq v8 k65536": codebook_sample((outputs + 4, inputs - 8), 8, 1, 65536, True),
        **{f"trellis {b} bit": trellis_sample(uneven, b, 0, True) for b in (1, 2, 3, 4)},
        **{f"trellis {b} bit, groups": trellis_sample(uneven, b, 80) for b in (1, 2, 3, 4)},
    }
