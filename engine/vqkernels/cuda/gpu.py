"""One GPU as the packed weights see it: kernels, where arrays lie, scratch memory, streams.

Knows no format.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vqkernels.cuda.driver import Argument, CudaModule

# Blocks that the products by decoded tiles start per multiprocessor, over all slices.
BLOCKS_PER_PROCESSOR = 2
# Outputs times rows of the largest block of those.
_BLOCK_OUTPUTS = 128 * 64


class Gpu:
    """One device with loaded kernels. All launches go to one stream at a time: scratch is shared.

    Attributes:
        device: where torch keeps the arrays.
        module: the kernels.
    """

    def __init__(
        self,
        module: CudaModule,
        device: torch.device,
        current_stream: Callable[[], int] | None = None,
    ) -> None:
        """`current_stream` gives the handle to launch on; None asks torch."""
        self.module = module
        self.device = device
        self._current_stream = current_stream or self._torch_stream
        self._partial = self.empty(
            BLOCKS_PER_PROCESSOR * module.processors * _BLOCK_OUTPUTS, dtype=torch.float32
        )
        self._counters = torch.zeros(8 * module.processors, dtype=torch.int32, device=device)

    def _torch_stream(self) -> int:
        return int(torch.cuda.current_stream(self.device).cuda_stream)

    def upload(self, values: NDArray[Any]) -> Tensor:
        """A contiguous copy on the device, whatever the array's strides and whoever owns it."""
        return torch.from_numpy(np.require(values, requirements=("C", "W"))).to(self.device)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
        """An array with whatever is in memory."""
        return torch.empty(*shape, dtype=dtype, device=self.device)

    def launch(
        self,
        name: str,
        grid: tuple[int, int],
        shared_bytes: int,
        arguments: Sequence[Argument],
    ) -> None:
        """Start a kernel on the current stream."""
        self.module.launch(name, grid, shared_bytes, self._current_stream(), arguments)

    def scratch(self) -> list[ctypes.c_void_p]:
        """Arguments of kernels that add up slices: partial sums and counters, zero at rest."""
        return pointers(self._partial, self._counters)

    def slices(self, num_blocks: int, size: int, most: int, per_processor: int) -> int:
        """Slices of the inputs that bring blocks to `per_processor` for each multiprocessor.

        Args:
            num_blocks: blocks of one slice, each with a counter.
            size: outputs of one slice, all rows; 0 where slices are not added up.
            most: more slices would have nothing to do.
            per_processor: blocks wanted, over all slices; not exceeded.
        """
        if size and num_blocks > len(self._counters):
            return 1
        wanted = per_processor * self.module.processors // num_blocks
        return max(1, min(most, wanted, len(self._partial) // max(1, size)))


def pointers(*tensors: Tensor | None) -> list[ctypes.c_void_p]:
    """Kernel arguments that are arrays; None is a null pointer."""
    return [ctypes.c_void_p(0 if t is None else t.data_ptr()) for t in tensors]


def integers(*values: int) -> list[ctypes.c_int]:
    """Kernel arguments that are sizes."""
    return [ctypes.c_int(value) for value in values]
