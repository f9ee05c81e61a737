"""Vector-quantized weights on a GPU, vectors along the outputs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vqkernels.cuda.driver import CudaModule
from vqkernels.cuda.weights import (
    CudaWeights,
    current_stream,
    integers,
    pointers,
    to_device,
)
from vqkernels.errors import LayoutError

_HOT_BYTES = 64 * 1024


@dataclass(frozen=True)
class CodebookArrays:
    """Vectors along the outputs as numpy.

    Attributes:
        indices: (stages, out / v, in) integers below num_entries.
        entries: float16 (stages, num_entries, v).
        input_scale: what multiplies each input, float16 (in,), or None.
        input_bias: added to every weight of an input's column, float16 (in,), or None.
        permutation: column of the indices that reads input permutation[i], or None.
    """

    indices: NDArray[np.int64]
    entries: NDArray[np.float16]
    input_scale: NDArray[np.float16] | None = None
    input_bias: NDArray[np.float16] | None = None
    permutation: NDArray[np.int64] | None = None


class CodebookWeights(CudaWeights):
    """VPTQ-like weights: one or two stages of at most 256 entries, or one stage of up to 65,536."""

    def __init__(self, module: CudaModule, arrays: CodebookArrays, device: torch.device) -> None:
        """Raises LayoutError for combinations that have no kernel."""
        self.stages, rows, in_features = arrays.indices.shape
        self.num_entries, self.v = arrays.entries.shape[1:]
        super().__init__(module, in_features, rows * self.v)
        self.is_large = self.num_entries > 256
        self.batches = (1, 2) if self.is_large else (1, 2, 4)
        known = {(4, 1), (8, 1)} if self.is_large else {(4, 1), (8, 1), (8, 2)}
        if (self.v, self.stages) not in known:
            raise LayoutError(
                f"no CUDA kernel for vectors of {self.v} with {self.stages} stages of "
                f"{self.num_entries} entries"
            )
        self.stride = -(-in_features // 16) * 16
        packed, entries = pack_indices(arrays.indices, arrays.entries, self.stride)
        self._indices = torch.from_numpy(packed).to(device)
        self._entries = torch.from_numpy(entries).to(device)
        self._scale = to_device(arrays.input_scale, device)
        self._bias = to_device(arrays.input_bias, device)
        self._permutation = to_device(arrays.permutation, device)
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        self._blocks = max(1, min(2 * processors, -(-rows // 8)))
        self._num_hot = min(self.num_entries, _HOT_BYTES // (2 * self.v))

    def linear(self, x: Tensor) -> Tensor:
        y = super().linear(x)
        if self._bias is not None:
            y = y + (x.float() @ self._bias.float())[:, None].to(y.dtype)
        return y

    def prepare(self, x: Tensor) -> Tensor:
        if self._scale is not None:
            x = x * self._scale
        if self._permutation is not None:
            x = x[:, self._permutation]
        return torch.nn.functional.pad(x, (0, self.stride - x.shape[1])).contiguous()

    def gemv(self, x: Tensor, y: Tensor) -> None:
        sizes = [self.in_features, self.stride, self.out_features, self.num_entries]
        if self.is_large:
            name, shared = f"vq_large{self.v}", self._num_hot * self.v * 2
            sizes.append(self._num_hot)
        else:
            name = f"vq_codebook{self.v}x{self.stages}"
            shared = self.stages * self.num_entries * 128
        self.module.launch(
            f"{name}_b{x.shape[0]}",
            (self._blocks, 1),
            shared,
            current_stream(x),
            [
                *pointers(self._indices, self._entries, x, y),
                *integers(*sizes),
            ],
        )

    def dequantize(self) -> Tensor:
        weights = self._entries.new_empty(self.out_features, self.in_features)
        sizes = (self.in_features, self.stride, self.out_features, self.num_entries)
        self.module.launch(
            f"vq_{'large' if self.is_large else 'codebook'}_dequantize",
            (-(-self.out_features // self.v * self.in_features // 256) + 1, 1),
            0,
            current_stream(weights),
            [
                *pointers(self._indices, self._entries, weights),
                *integers(*sizes, self.v, self.stages),
            ],
        )
        return weights


def pack_indices(
    indices: NDArray[np.int64], entries: NDArray[np.float16], stride: int
) -> tuple[NDArray[np.uint8] | NDArray[np.int16], NDArray[np.float16]]:
    """Indices padded to `stride` columns, one byte each, or two bytes ordered by frequency.

    More than 256 entries are renumbered so that the most used come first: those lie in shared
    memory (VQ-LLM's codebook cache). uint16 is returned as int16 bits, which torch has.
    """
    padded = np.zeros((*indices.shape[:2], stride), dtype=np.int64)
    padded[..., : indices.shape[2]] = indices
    if entries.shape[1] <= 256:
        return padded.astype(np.uint8), np.ascontiguousarray(entries)
    order = np.argsort(-np.bincount(indices.ravel(), minlength=entries.shape[1]), kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    renumbered = rank[padded].astype(np.uint16).view(np.int16)
    return renumbered, np.ascontiguousarray(entries[:, order])
