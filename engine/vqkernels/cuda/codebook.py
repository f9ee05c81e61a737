"""Vector-quantized weights on a GPU, vectors along the outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vqkernels.cuda.driver import Argument
from vqkernels.cuda.gpu import Gpu, integers, pointers
from vqkernels.cuda.weights import TILE_INPUTS, TILE_OUTPUTS, Choice, CudaWeights, TileFormat
from vqkernels.errors import LayoutError

_MAX_SMALL = 256  # entries that a byte names
_ENTRY_BYTES = 128  # all copies of one entry of a small codebook
_HOT_BYTES = 64 * 1024  # of a large one, in shared memory
_BLOCKS_PER_PROCESSOR = 2


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
    """VPTQ-like weights: one or two stages of up to 65,536 entries, fast up to 256."""

    def __init__(self, gpu: Gpu, arrays: CodebookArrays) -> None:
        """Raises LayoutError for combinations that have no kernel."""
        self.stages, self._rows, in_features = arrays.indices.shape
        self.num_entries, self.v = arrays.entries.shape[1:]
        super().__init__(gpu, in_features, self._rows * self.v)
        is_large = self.num_entries > _MAX_SMALL
        if (self.v, self.stages) not in {(4, 1), (8, 1), (8, 2)}:
            raise LayoutError(
                f"no CUDA kernel for vectors of {self.v} with {self.stages} stages of "
                f"{self.num_entries} entries"
            )
        self.batches = (1, 2) if is_large else (1, 2, 4)
        self.kernel = f"vq_{'large' if is_large else 'codebook'}{self.v}x{self.stages}"
        hot_entries = _HOT_BYTES // (2 * self.v * self.stages)
        self._num_hot = min(self.num_entries, hot_entries) if is_large else 0
        self.tiles = self._tile_format(is_large)
        self.stride = -(-in_features // 16) * 16
        packed, entries = pack_indices(arrays.indices, arrays.entries, self.stride)
        self._indices, self._entries = gpu.upload(packed), gpu.upload(entries)
        self._scale, self._bias, self._permutation = (
            None if values is None else gpu.upload(values)
            for values in (arrays.input_scale, arrays.input_bias, arrays.permutation)
        )

    def _tile_format(self, is_large: bool) -> TileFormat:
        row_bytes = TILE_INPUTS * (2 if is_large else 1) + 16
        packed = self.stages * (TILE_OUTPUTS // self.v) * row_bytes
        if is_large:
            hot = -(-2 * self.stages * self._num_hot * self.v // 128) * 128
            return TileFormat(True, hot, packed)
        return TileFormat(True, self.stages * self.num_entries * _ENTRY_BYTES, packed)

    def product(self, x: Tensor, choice: Choice) -> Tensor:
        y = super().product(x, choice)
        if self._bias is not None:
            y = y + (x.float() @ self._bias.float())[:, None].to(y.dtype)
        return y

    def prepare(self, x: Tensor) -> Tensor:
        if self._scale is not None:
            x = x * self._scale
        if self._permutation is not None:
            x = x[:, self._permutation]
        missing = self.stride - x.shape[1]
        return torch.nn.functional.pad(x, (0, missing)) if missing else x

    def arguments(self) -> Sequence[Argument]:
        sizes = (self.in_features, self.stride, self.out_features, self.num_entries, self._num_hot)
        return [*pointers(self._indices, self._entries), *integers(*sizes)]

    def gemv(self, x: Tensor, y: Tensor) -> None:
        blocks = min(_BLOCKS_PER_PROCESSOR * self.gpu.module.processors, -(-self._rows // 8))
        self.gpu.launch(
            f"{self.kernel}_b{len(x)}",
            (max(1, blocks), 1),
            self.tiles.table_bytes,
            [*self.arguments(), *pointers(x, y)],
        )


def pack_indices(
    indices: NDArray[np.int64], entries: NDArray[np.float16], stride: int
) -> tuple[NDArray[np.uint8] | NDArray[np.int16], NDArray[np.float16]]:
    """Indices padded to `stride` columns, one byte each, or two bytes ordered by frequency.

    More than 256 entries are renumbered, every stage for itself, so that the most used come first:
    those lie in shared memory (VQ-LLM's codebook cache). uint16 is returned as int16 bits, which
    torch has.
    """
    padded = np.zeros((*indices.shape[:2], stride), dtype=np.int64)
    padded[..., : indices.shape[2]] = indices
    if entries.shape[1] <= _MAX_SMALL:
        return padded.astype(np.uint8), np.ascontiguousarray(entries)
    stages = range(len(indices))
    order = np.stack([_by_frequency(indices[stage], entries.shape[1]) for stage in stages])
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.arange(order.shape[1])[None], axis=1)
    renumbered = np.stack([rank[stage][padded[stage]] for stage in stages])
    sorted_entries = np.take_along_axis(entries, order[..., None], axis=1)
    return renumbered.astype(np.uint16).view(np.int16), sorted_entries


def _by_frequency(indices: NDArray[np.int64], num_entries: int) -> NDArray[np.int64]:
    counts = np.bincount(indices.ravel(), minlength=num_entries)
    return np.argsort(-counts, kind="stable")
