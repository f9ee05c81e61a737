"""Trellis-coded weights on a GPU, bitstreams along the outputs."""

from __future__ import annotations

import ctypes
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
    to_device,
)
from vqkernels.errors import LayoutError

_TABLE_BYTES = 32 * 1024


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

    def __init__(self, module: CudaModule, arrays: TrellisArrays, device: torch.device) -> None:
        """Raises LayoutError for widths that have no kernel."""
        super().__init__(module, arrays.codes.shape[0], arrays.scales.shape[1])
        if arrays.bits not in (1, 2, 3, 4):
            raise LayoutError(f"the CUDA trellis kernel has 1 to 4 bits, not {arrays.bits}")
        self.bits = arrays.bits
        self.batches = (1, 2) if arrays.bits in (2, 4) else (1,)
        self.group_size = arrays.group_size or self.in_features
        self._shift = 32 - arrays.trellis_bits
        self._multiplier = (arrays.multiplier << self._shift) & 0xFFFFFFFF
        self._trellis_bits = arrays.trellis_bits
        words = pack_streams(arrays.codes, self.out_features, self.bits)
        self.stride = words.shape[1]
        self._streams = torch.from_numpy(words).to(device)
        self._table = torch.from_numpy(arrays.table).to(device)
        self._scales = torch.from_numpy(arrays.scales).to(device)
        self._column_scales = to_device(arrays.column_scales, device)
        lanes = self.stride // (3 if self.bits == 3 else 1)
        blocks = -(-lanes // 32)
        slices = Splits.count(device, blocks, max(1, self.in_features // 64))
        self._splits = Splits(device, slices, blocks, self.batches[-1] * self.out_features)

    def prepare(self, x: Tensor) -> Tensor:
        return x if self._column_scales is None else x * self._column_scales

    def _facts(self) -> list[ctypes.c_int | ctypes.c_uint]:
        sizes = (self.in_features, self.out_features, self.stride, self.group_size)
        hashing = (ctypes.c_uint(self._multiplier), ctypes.c_int(self._trellis_bits))
        return [*integers(*sizes), *hashing]

    def gemv(self, x: Tensor, y: Tensor) -> None:
        self.module.launch(
            f"vq_trellis{self.bits}_b{x.shape[0]}",
            (len(self._splits.counters), self._splits.num_slices),
            _TABLE_BYTES + 64 * 4 * x.shape[0],
            current_stream(x),
            [
                *pointers(self._streams, self._table, self._scales, x, y),
                *pointers(self._splits.partial, self._splits.counters),
                *self._facts(),
            ],
        )

    def dequantize(self) -> Tensor:
        weights = self._scales.new_empty(self.out_features, self.in_features)
        lanes = self.stride // (3 if self.bits == 3 else 1)
        self.module.launch(
            f"vq_trellis{self.bits}_dequantize",
            (-(-lanes * self.in_features // 256), 1),
            0,
            current_stream(weights),
            [
                *pointers(self._streams, self._table, self._scales, weights),
                *self._facts(),
            ],
        )
        return weights


def pack_streams(codes: NDArray[np.uint8], out_features: int, bits: int) -> NDArray[np.int32]:
    """Bitstreams (in, bytes) as whole words of whole lanes: int32 (in, words)."""
    words_per_lane = 3 if bits == 3 else 1
    rows_per_lane = 32 * words_per_lane // bits
    num_words = -(-out_features // rows_per_lane) * words_per_lane
    padded = np.zeros((codes.shape[0], 4 * num_words), dtype=np.uint8)
    padded[:, : codes.shape[1]] = codes
    return padded.view("<i4")
