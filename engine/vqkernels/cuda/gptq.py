"""GPTQ's uniform grids on a GPU, in the layout of the checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vqkernels.cuda.driver import Argument
from vqkernels.cuda.gpu import Gpu, integers, pointers
from vqkernels.cuda.weights import TILE_INPUTS, TILE_OUTPUTS, CudaWeights, TileFormat
from vqkernels.errors import LayoutError

_UNIT = 32
_COLUMNS_PER_BLOCK = 128
_BLOCKS_PER_PROCESSOR = 4


@dataclass(frozen=True)
class GptqArrays:
    """A GPTQ layer as numpy: int32 words (in * bits / 32, out), the rest (groups, out) or None."""

    words: NDArray[np.int32]
    scales: NDArray[np.float16]
    zeros: NDArray[np.uint8] | None
    bits: int
    group_size: int


class GptqWeights(CudaWeights):
    """Uniform grids of 2, 3, 4 or 8 bits in GPTQ's own layout, groups of neighbouring columns."""

    batches = (1, 2, 4)

    def __init__(self, gpu: Gpu, arrays: GptqArrays) -> None:
        """Raises LayoutError for sizes that the kernel cannot take."""
        if arrays.bits not in (2, 3, 4, 8):
            raise LayoutError(f"the CUDA kernel has 2, 3, 4 and 8 bits, not {arrays.bits}")
        in_features = arrays.words.shape[0] * 32 // arrays.bits
        super().__init__(gpu, in_features, arrays.words.shape[1])
        group_size = min(arrays.group_size, in_features)
        if in_features % _UNIT or group_size % _UNIT or self.out_features % 4:
            raise LayoutError(
                f"inputs {in_features} and group size {group_size} must be multiples of 32, "
                f"outputs {self.out_features} of 4"
            )
        self.bits, self.group_size = arrays.bits, group_size
        self.kernel = f"vq_gptq{arrays.bits}"
        # Words, then the scales and the zeros of two units of inputs.
        bits_per_output = TILE_INPUTS * arrays.bits + TILE_INPUTS // _UNIT * (16 + 8)
        self.tiles = TileFormat(False, 0, TILE_OUTPUTS * bits_per_output // 8)
        self._words = gpu.upload(arrays.words)
        self._scales = gpu.upload(arrays.scales)
        self._zeros = None if arrays.zeros is None else gpu.upload(arrays.zeros)

    def arguments(self) -> Sequence[Argument]:
        sizes = integers(self.in_features, self.out_features, self.group_size)
        return [*pointers(self._words, self._scales, self._zeros), *sizes]

    def gemv(self, x: Tensor, y: Tensor) -> None:
        batch, units = len(x), self.in_features // _UNIT
        blocks = -(-self.out_features // _COLUMNS_PER_BLOCK)
        slices = self.gpu.slices(blocks, y.numel(), max(1, units // 8), _BLOCKS_PER_PROCESSOR)
        staged = -(-units // slices) * (_UNIT * 2 + 4) * batch
        self.gpu.launch(
            f"{self.kernel}_b{batch}",
            (blocks, slices),
            max(staged, 8 * _COLUMNS_PER_BLOCK * 4 * batch),
            [*self.arguments(), *pointers(x, y), *self.gpu.scratch()],
        )
