"""Packed weights on a GPU: y = x W' through our kernels, chosen by the number of rows.

A few rows go through a GEMV kernel, more through a product of decoded tiles by the matrix units,
and very many through torch after one dequantizing kernel, because decoding every tile again for
every block of rows then costs more than writing the weights once. Half precision in and out, sums
in float. `csrc/cuda` has the other half of every contract here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vqkernels.cuda.driver import Argument
from vqkernels.cuda.gpu import BLOCKS_PER_PROCESSOR, Gpu, integers, pointers
from vqkernels.errors import ShapeError

GEMM_TILES = (16, 32, 64)
"""Rows of activations per block that the tensor-core kernels are compiled for."""

MAX_GEMM_ROWS = 256
"""More rows are multiplied by torch, after dequantizing. Not yet measured: a model's guess."""

# Constants of tile.cuh and gemm.cuh.
TILE_OUTPUTS, TILE_INPUTS = 128, 64
_PADDING = 8
_SLOTS = 4
# A slice of fewer tiles would not fill the pipeline.
_TILES_PER_SLICE = 4


@dataclass(frozen=True)
class TileFormat:
    """What the kernels on decoded tiles keep in shared memory.

    Attributes:
        by_input: whether a row of a decoded tile is one input; dequantized weights then are
            (in, out).
        table_bytes: tables beside the tiles.
        packed_bytes: one packed tile.
    """

    by_input: bool
    table_bytes: int
    packed_bytes: int

    @property
    def decoded_bytes(self) -> int:
        """One decoded tile, with its padding."""
        rows, columns = TILE_OUTPUTS, TILE_INPUTS
        if self.by_input:
            rows, columns = columns, rows
        return 2 * rows * (columns + _PADDING)

    def gemm_bytes(self, tile: int) -> int:
        """Shared memory of a product with `tile` rows per block."""
        inputs = 2 * tile * (TILE_INPUTS + _PADDING)
        return self.table_bytes + _SLOTS * (self.packed_bytes + inputs) + 2 * self.decoded_bytes

    @property
    def dequantize_bytes(self) -> int:
        """Shared memory of dequantizing."""
        return self.table_bytes + 2 * self.packed_bytes + self.decoded_bytes


@dataclass(frozen=True)
class Choice:
    """The kernel for a number of rows: `gemv` or `gemm` and the rows it is made for, or `torch`."""

    kind: str
    rows: int = 0


class CudaWeights(ABC):
    """One linear layer on one device.

    Attributes:
        kernel: beginning of the names of its kernels.
        batches: rows that one GEMV launch may take, ascending.
        tiles: its tiles in shared memory.
    """

    kernel: str
    batches: tuple[int, ...]
    tiles: TileFormat

    def __init__(self, gpu: Gpu, in_features: int, out_features: int) -> None:
        self.gpu = gpu
        self.in_features = in_features
        self.out_features = out_features

    def choose(self, rows: int) -> Choice:
        """Which kernel multiplies so many rows; the only place that decides it."""
        if rows <= self.batches[-1]:
            return Choice("gemv", next(size for size in self.batches if size >= rows))
        limit = self.gpu.module.shared_bytes
        fitting = [tile for tile in GEMM_TILES if self.tiles.gemm_bytes(tile) <= limit]
        if rows > MAX_GEMM_ROWS or not fitting:
            return Choice("torch")
        return Choice("gemm", next((tile for tile in fitting if tile >= rows), fitting[-1]))

    def linear(self, x: Tensor) -> Tensor:
        """(rows, in_features) float16 on the weights' device to (rows, out_features) float16.

        Raises:
            ShapeError: another shape or dtype.
        """
        return self.product(x, self.choose(len(x)))

    def product(self, x: Tensor, choice: Choice) -> Tensor:
        """`linear` by a given kernel, which must take so many rows."""
        if x.ndim != 2 or x.shape[1] != self.in_features or x.dtype != torch.float16:
            raise ShapeError(
                f"x is {x.dtype} {tuple(x.shape)}, expected float16 (rows, {self.in_features})"
            )
        if not len(x):  # an expert without tokens
            return self.gpu.empty(0, self.out_features)
        x = self.prepare(x).contiguous()
        if choice.kind == "torch":
            return x[:, : self.in_features] @ self.dequantize().T
        if choice.kind == "gemm":
            return self._gemm(x, choice.rows)
        rows = len(x)
        if choice.rows > rows:
            x = torch.cat([x, x.new_zeros(choice.rows - rows, x.shape[1])])
        y = self.gpu.empty(choice.rows, self.out_features)
        self.gemv(x, y)
        return y[:rows]

    def prepare(self, x: Tensor) -> Tensor:
        """What is folded into the activations before the kernel sees them."""
        return x

    def dequantize(self) -> Tensor:
        """Weights (out_features, in_features) float16, without what `prepare` folds in."""
        shape = (self.out_features, self.in_features)
        weights = self.gpu.empty(*(reversed(shape) if self.tiles.by_input else shape))
        self.gpu.launch(
            f"{self.kernel}_dequantize",
            self._tiled_grid(1, 0, -(-self.in_features // TILE_INPUTS)),
            self.tiles.dequantize_bytes,
            [*self.arguments(), *pointers(weights)],
        )
        return weights.T if self.tiles.by_input else weights

    @abstractmethod
    def arguments(self) -> Sequence[Argument]:
        """What every kernel of the format takes first."""

    @abstractmethod
    def gemv(self, x: Tensor, y: Tensor) -> None:
        """Launch the GEMV kernel for len(x) prepared rows."""

    def _gemm(self, x: Tensor, tile: int) -> Tensor:
        # Rows of 16-byte pieces that begin at multiples of 16 bytes.
        if x.shape[1] % 8:
            x = torch.nn.functional.pad(x, (0, -x.shape[1] % 8))
        if x.data_ptr() % 16:
            x = x.clone()
        y = self.gpu.empty(len(x), self.out_features)
        most = max(1, -(-self.in_features // TILE_INPUTS) // _TILES_PER_SLICE)
        self.gpu.launch(
            f"{self.kernel}_gemm{tile}",
            self._tiled_grid(-(-len(x) // tile), y.numel(), most),
            self.tiles.gemm_bytes(tile),
            [*self.arguments(), *pointers(x, y), *self.gpu.scratch(), *integers(*x.shape)],
        )
        return y

    def _tiled_grid(self, row_blocks: int, size: int, most: int) -> tuple[int, int]:
        blocks = -(-self.out_features // TILE_OUTPUTS) * row_blocks
        return blocks, self.gpu.slices(blocks, size, most, BLOCKS_PER_PROCESSOR)
