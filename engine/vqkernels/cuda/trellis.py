"""Trellis-coded weights on a GPU, bitstreams along the outputs."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vqkernels.cuda.driver import Argument
from vqkernels.cuda.gpu import Gpu, integers, pointers
from vqkernels.cuda.weights import TILE_INPUTS, TILE_OUTPUTS, CudaWeights, TileFormat
from vqkernels.errors import LayoutError

_TABLE_BYTES = 32 * 1024
_CHUNK = 64  # inputs that the GEMV stages at a time
_BLOCKS_PER_PROCESSOR = 4


@dataclass(frozen=True)
class TrellisArrays:
    """Trellis-coded weights as numpy.

    Attributes:
        codes: uint8 (in, ceil(out * bits / 8)), one bitstream per input.
        table: int8 (256,).
        scales: float16 (groups, out).
        group_size: inputs per scale, 0 for one group.
        column_scales: float16 (in,) or None.
        multiplier, trellis_bits: the hash of the states.
    """

    codes: NDArray[np.uint8]
    table: NDArray[np.int8]
    scales: NDArray[np.float16]
    bits: int
    multiplier: int
    trellis_bits: int
    group_size: int = 0
    column_scales: NDArray[np.float16] | None = None


class TrellisWeights(CudaWeights):
    """Bitshift trellis along the outputs, 1 to 4 bits."""

    def __init__(self, gpu: Gpu, arrays: TrellisArrays) -> None:
        """Raises LayoutError for widths that have no kernel."""
        if arrays.bits not in (1, 2, 3, 4):
            raise LayoutError(f"the CUDA trellis kernel has 1 to 4 bits, not {arrays.bits}")
        super().__init__(gpu, arrays.codes.shape[0], arrays.scales.shape[1])
        self.bits = arrays.bits
        self.batches = (1, 2) if arrays.bits in (2, 4) else (1,)
        self.kernel = f"vq_trellis{arrays.bits}"
        words_per_input = 4 + TILE_OUTPUTS * arrays.bits // 32
        self.tiles = TileFormat(True, _TABLE_BYTES, 4 * TILE_INPUTS * words_per_input)
        self.group_size = arrays.group_size or self.in_features
        shift = 32 - arrays.trellis_bits
        self._multiplier = (arrays.multiplier << shift) & 0xFFFFFFFF
        self._trellis_bits = arrays.trellis_bits
        words = pack_streams(arrays.codes, self.out_features, self.bits)
        self.stride = words.shape[1]
        self._streams = gpu.upload(words)
        self._table = gpu.upload(arrays.table)
        self._scales = gpu.upload(arrays.scales)
        columns = arrays.column_scales
        self._column_scales = None if columns is None else gpu.upload(columns)

    def prepare(self, x: Tensor) -> Tensor:
        return x if self._column_scales is None else x * self._column_scales

    def arguments(self) -> Sequence[Argument]:
        sizes = (self.in_features, self.out_features, self.stride, self.group_size)
        hashing = (ctypes.c_uint(self._multiplier), ctypes.c_int(self._trellis_bits))
        return [
            *pointers(self._streams, self._table, self._scales),
            *integers(*sizes),
            *hashing,
        ]

    def gemv(self, x: Tensor, y: Tensor) -> None:
        lanes = -(-self.out_features // rows_per_lane(self.bits))
        blocks, most = -(-lanes // 32), max(1, self.in_features // _CHUNK)
        slices = self.gpu.slices(blocks, y.numel(), most, _BLOCKS_PER_PROCESSOR)
        self.gpu.launch(
            f"{self.kernel}_b{len(x)}",
            (blocks, slices),
            _TABLE_BYTES + _CHUNK * 4 * len(x),
            [*self.arguments(), *pointers(x, y), *self.gpu.scratch()],
        )


def rows_per_lane(bits: int) -> int:
    """Outputs whose symbols fill whole words: one word, or three at 3 bits."""
    return 32 if bits == 3 else 32 // bits


def pack_streams(codes: NDArray[np.uint8], out_features: int, bits: int) -> NDArray[np.int32]:
    """Bitstreams (in, bytes) as words of whole lanes, int32 (in, words), a multiple of 16 bytes."""
    num_words = -(-out_features // rows_per_lane(bits)) * (3 if bits == 3 else 1)
    padded = np.zeros((codes.shape[0], -(-num_words // 4) * 16), dtype=np.uint8)
    padded[:, : codes.shape[1]] = codes
    return padded.view("<i4")
