"""Packed weights on a GPU: y = x W' through our kernels.

Rows of up to four activations go through a GEMV kernel; more are multiplied by torch after one
dequantizing kernel, because a library's matrix product is then the faster one. Half precision in
and out, sums in float.
"""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vqkernels.cuda.driver import CudaModule
from vqkernels.errors import ShapeError

_BLOCKS_PER_PROCESSOR = 4


def pointers(*tensors: Tensor | None) -> list[ctypes.c_void_p]:
    """Kernel arguments that are arrays; None is a null pointer."""
    return [ctypes.c_void_p(0 if t is None else t.data_ptr()) for t in tensors]


def integers(*values: int) -> list[ctypes.c_int]:
    """Kernel arguments that are sizes."""
    return [ctypes.c_int(value) for value in values]


def current_stream(tensor: Tensor) -> int:
    """Handle of torch's current stream on a tensor's device."""
    return int(torch.cuda.current_stream(tensor.device).cuda_stream)


def to_device(
    values: NDArray[np.float16] | NDArray[np.int64] | None, device: torch.device
) -> Tensor | None:
    """An optional array as a tensor."""
    return None if values is None else torch.from_numpy(np.ascontiguousarray(values)).to(device)


class CudaWeights(ABC):
    """One linear layer on one device."""

    batches: tuple[int, ...]
    """Rows that one launch may take, ascending."""

    def __init__(self, module: CudaModule, in_features: int, out_features: int) -> None:
        self.module = module
        self.in_features = in_features
        self.out_features = out_features

    def linear(self, x: Tensor) -> Tensor:
        """(rows, in_features) float16 on the weights' device to (rows, out_features) float16.

        Raises:
            ShapeError: another shape or dtype.
        """
        if x.ndim != 2 or x.shape[1] != self.in_features or x.dtype != torch.float16:
            raise ShapeError(
                f"x is {x.dtype} {tuple(x.shape)}, expected float16 (rows, {self.in_features})"
            )
        x = self.prepare(x.contiguous())
        if x.shape[0] > self.batches[-1]:
            return x[:, : self.in_features] @ self.dequantize().T
        batch = next(size for size in self.batches if size >= x.shape[0])
        padded = (
            x if batch == x.shape[0] else torch.cat([x, x.new_zeros(batch - len(x), x.shape[1])])
        )
        y = x.new_empty(batch, self.out_features)
        self.gemv(padded, y)
        return y[: x.shape[0]]

    def prepare(self, x: Tensor) -> Tensor:
        """What is folded into the activations before the kernel sees them."""
        return x

    @abstractmethod
    def gemv(self, x: Tensor, y: Tensor) -> None:
        """Launch the kernel for x.shape[0] prepared rows."""

    @abstractmethod
    def dequantize(self) -> Tensor:
        """Weights (out_features, in_features) float16, without what `prepare` folds in."""


class Splits:
    """Partial sums and counters of kernels that cut the inputs into slices."""

    def __init__(self, device: torch.device, num_slices: int, num_blocks: int, size: int) -> None:
        self.num_slices = num_slices
        self.partial = torch.empty(num_slices * size, dtype=torch.float32, device=device)
        self.counters = torch.zeros(num_blocks, dtype=torch.int32, device=device)

    @staticmethod
    def count(device: torch.device, num_blocks: int, most: int) -> int:
        """Slices that give every multiprocessor some blocks."""
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        return max(1, min(most, -(-_BLOCKS_PER_PROCESSOR * processors // num_blocks)))
