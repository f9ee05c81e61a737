"""GPTQ's uniform grids on a GPU, in the layout of the checkpoints."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vqkernels.cuda.driver import CudaModule
from vqkernels.cuda.weights import (
    CudaWeights,
    Splits,
    current_stream,
    integers,
    pointers,
)
from vqkernels.errors import LayoutError

_TILE = 32
_COLUMNS_PER_BLOCK = 128


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

    def __init__(self, module: CudaModule, arrays: GptqArrays, device: torch.device) -> None:
        """Raises LayoutError for sizes that the kernel cannot take."""
        in_features = arrays.words.shape[0] * 32 // arrays.bits
        super().__init__(module, in_features, arrays.words.shape[1])
        if arrays.bits not in (2, 3, 4, 8):
            raise LayoutError(f"the CUDA kernel has 2, 3, 4 and 8 bits, not {arrays.bits}")
        group_size = min(arrays.group_size, in_features)
        if in_features % _TILE or group_size % _TILE or self.out_features % 4:
            raise LayoutError(
                f"inputs {in_features} and group size {group_size} must be multiples of 32, "
                f"outputs {self.out_features} of 4"
            )
        self.bits, self.group_size = arrays.bits, group_size
        self._words = torch.from_numpy(arrays.words).to(device)
        self._scales = torch.from_numpy(arrays.scales).to(device)
        zeros = arrays.zeros
        self._zeros = None if zeros is None else torch.from_numpy(zeros).to(device)
        blocks = -(-self.out_features // _COLUMNS_PER_BLOCK)
        slices = Splits.count(device, blocks, max(1, in_features // _TILE // 8))
        self._splits = Splits(device, slices, blocks, self.batches[-1] * self.out_features)

    def gemv(self, x: Tensor, y: Tensor) -> None:
        batch = x.shape[0]
        tiles = -(-self.in_features // _TILE // self._splits.num_slices)
        shared = max(tiles * (64 + 4) * batch, 8 * _COLUMNS_PER_BLOCK * 4 * batch)
        self.module.launch(
            f"vq_gptq{self.bits}_b{batch}",
            (len(self._splits.counters), self._splits.num_slices),
            shared,
            current_stream(x),
            [
                *pointers(self._words, self._scales, self._zeros, x, y),
                *pointers(self._splits.partial, self._splits.counters),
                *integers(self.in_features, self.out_features, self.group_size),
            ],
        )

    def dequantize(self) -> Tensor:
        weights = self._scales.new_empty(self.out_features, self.in_features)
        threads = self.in_features // _TILE * self.out_features
        self.module.launch(
            f"vq_gptq{self.bits}_dequantize",
            (-(-threads // 256), 1),
            0,
            current_stream(weights),
            [
                *pointers(self._words, self._scales, self._zeros, weights),
                *integers(self.in_features, self.out_features, self.group_size),
            ],
        )
        return weights
