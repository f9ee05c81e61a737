"""The VQ-VAE (van den Oord et al., 2017) and its two-level form VQ-VAE-2 (Razavi et al., 2019).

A picture becomes one or two grids of codes, coarsest first. With two levels the top grid is
quantized first; its decoded features stand beside the picture's own when the bottom latents are
made, so that the bottom codes only what the top left open, and both feed the decoder.

Training minimises |x - x^|^2 / pixel_variance + |sg(z) - q|^2 + beta |z - sg(q)|^2, each a mean
over its elements, the last two summed over levels and taken from the quantizer; the gradient
passes the quantizer straight through. Knows no files and no prior.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from scq.backbones import ResidualBlock
from scq.errors import CorruptCodes, InvalidImage, InvalidLatents
from scq.quantizers import Quantizer, SymbolTables, build_quantizer
from scq.vqvae.config import VqVaeConfig

# Rows and columns of the bottom grid, bytes of the top level's payload.
_HEADER = struct.Struct("<HHI")
# Hostile headers must not make us allocate more than this many codes.
_MAX_POSITIONS = 1 << 22


@dataclass(frozen=True)
class VqVaeLosses:
    """One training pass. total = reconstruction / pixel_variance + quantization.

    reconstruction: mean squared error over pixels in [0, 1]. quantization: codebook and
    commitment terms of all levels. images: (B, 3, H, W), not clamped.
    """

    total: Tensor
    reconstruction: Tensor
    quantization: Tensor
    images: Tensor


class VqVae(nn.Module):
    """Pictures (B, 3, H, W) in [0, 1] to grids of symbols and back.

    Grids are (B, h, w, S) int64, S symbols a latent as the quantizer has them, in a tuple of
    `levels` entries, coarsest first. Raises InvalidImage for sides off the stride.
    """

    def __init__(self, config: VqVaeConfig) -> None:
        super().__init__()
        self.config = config
        width, dim, blocks = config.width, config.quantization.code_dim, config.blocks
        self.encoder = _encoder(3, width, config.halvings, blocks)
        self.quantizers = nn.ModuleList(
            build_quantizer(config.quantizer, config.quantization) for _ in range(config.levels)
        )
        if config.levels == 2:
            self.top_encoder = _encoder(width, width, 1, blocks)
            self.top_latents = nn.Conv2d(width, dim, 1)
            self.top_decoder = _decoder(dim, width, width, 1, blocks)
            self.top_upsampler = nn.ConvTranspose2d(dim, dim, 4, stride=2, padding=1)
        extra = width if config.levels == 2 else 0
        self.bottom_latents = nn.Conv2d(width + extra, dim, 1)
        self.decoder = _decoder(dim * config.levels, 3, width, config.halvings, blocks)

    def level_quantizer(self, level: int) -> Quantizer:
        """The quantizer of a level, 0 the coarsest."""
        quantizer = self.quantizers[level]
        assert isinstance(quantizer, Quantizer)
        return quantizer

    def forward(self, images: Tensor) -> VqVaeLosses:
        """Losses of a batch; in training mode quantizers also adapt to it."""
        features = self._features(images)
        if self.config.levels == 1:
            quantized, penalty, _ = self._quantize(0, self.bottom_latents(features))
            return self._losses(images, self.decoder(quantized), penalty)
        top, top_penalty, _ = self._quantize(0, self.top_latents(self.top_encoder(features)))
        latents = self._bottom_latents(features, top)
        bottom, bottom_penalty, _ = self._quantize(1, latents)
        decoded = self._decode_both(top, bottom)
        return self._losses(images, decoded, top_penalty + bottom_penalty)

    @torch.no_grad()
    def encode(self, images: Tensor) -> tuple[Tensor, ...]:
        """Grids of symbols, coarsest first."""
        features = self._features(images)
        if self.config.levels == 1:
            return (self._symbols(0, self.bottom_latents(features)),)
        top_symbols = self._symbols(0, self.top_latents(self.top_encoder(features)))
        latents = self._bottom_latents(features, self._points(0, top_symbols))
        return (top_symbols, self._symbols(1, latents))

    @torch.no_grad()
    def decode(self, grids: tuple[Tensor, ...]) -> Tensor:
        """Grids of symbols -> images (B, 3, H, W) clamped to [0, 1]. Raises InvalidLatents."""
        self._check_grids(grids)
        points = [self._points(level, symbols) for level, symbols in enumerate(grids)]
        decoded = self.decoder(points[0]) if len(points) == 1 else self._decode_both(*points)
        images: Tensor = (decoded * 0.5 + 0.5).clamp(0, 1)
        return images

    def fit_tables(self, grids: tuple[Tensor, ...]) -> tuple[SymbolTables, ...]:
        """Static entropy tables per level from training grids."""
        return tuple(
            self.level_quantizer(level).fit_tables(symbols.flatten(0, 2))
            for level, symbols in enumerate(grids)
        )

    def pack(
        self, grids: tuple[Tensor, ...], tables: tuple[SymbolTables, ...] | None = None
    ) -> bytes:
        """One picture's grids (batch of 1) as bytes: sizes, then the levels, coarsest first."""
        self._check_grids(grids)
        if len(grids[0]) != 1:
            raise InvalidLatents(f"bytes hold one picture, the grids hold {len(grids[0])}")
        parts = [
            self.level_quantizer(level).pack(symbols.flatten(0, 2), _of_level(tables, level))
            for level, symbols in enumerate(grids)
        ]
        rows, columns = grids[-1].shape[1:3]
        return _HEADER.pack(rows, columns, len(parts[0])) + b"".join(parts)

    def unpack(
        self, data: bytes, tables: tuple[SymbolTables, ...] | None = None
    ) -> tuple[Tensor, ...]:
        """Inverse of `pack`. Raises CorruptCodes."""
        if len(data) < _HEADER.size:
            raise CorruptCodes(f"codes have {len(data)} bytes, their header {_HEADER.size}")
        rows, columns, top_bytes = _HEADER.unpack_from(data)
        factor = 2 ** (self.config.levels - 1)
        if not rows or not columns or rows % factor or columns % factor:
            raise CorruptCodes(f"a bottom grid of {rows}x{columns} does not fit the levels")
        if rows * columns > _MAX_POSITIONS:
            raise CorruptCodes(f"a grid of {rows}x{columns} exceeds {_MAX_POSITIONS} codes")
        payload = data[_HEADER.size :]
        grids = []
        for level in range(self.config.levels):
            side = 2 ** (self.config.levels - 1 - level)
            part = payload[:top_bytes] if level == 0 else payload[top_bytes:]
            grids.append(self._unpack_level(level, part, (rows // side, columns // side), tables))
        if self.config.levels == 1 and top_bytes != len(payload):
            raise CorruptCodes(f"codes say {top_bytes} bytes of payload, there are {len(payload)}")
        return tuple(grids)

    def _unpack_level(
        self,
        level: int,
        part: bytes,
        grid: tuple[int, int],
        tables: tuple[SymbolTables, ...] | None,
    ) -> Tensor:
        quantizer = self.level_quantizer(level)
        symbols = quantizer.unpack(part, grid[0] * grid[1], _of_level(tables, level))
        return symbols.reshape(1, *grid, -1)

    def _features(self, images: Tensor) -> Tensor:
        stride = self.config.stride
        if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
            raise InvalidImage(f"images must be (B, 3, H, W), got {tuple(images.shape)}")
        if images.shape[2] % stride or images.shape[3] % stride:
            raise InvalidImage(
                f"{images.shape[3]}x{images.shape[2]} is not a multiple of {stride}; crop or pad it"
            )
        features: Tensor = self.encoder(images * 2 - 1)
        return features

    def _bottom_latents(self, features: Tensor, top: Tensor) -> Tensor:
        context = torch.cat([features, self.top_decoder(top)], dim=1)
        latents: Tensor = self.bottom_latents(context)
        return latents

    def _decode_both(self, top: Tensor, bottom: Tensor) -> Tensor:
        decoded: Tensor = self.decoder(torch.cat([self.top_upsampler(top), bottom], dim=1))
        return decoded

    def _quantize(self, level: int, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, F, h, w) -> quantized of the same shape, penalty, symbols."""
        output = self.quantizers[level](latents.permute(0, 2, 3, 1))
        return output.quantized.permute(0, 3, 1, 2), output.loss, output.symbols

    def _symbols(self, level: int, latents: Tensor) -> Tensor:
        batch, dim, rows, columns = latents.shape
        flat = latents.permute(0, 2, 3, 1).reshape(-1, dim)
        return self.level_quantizer(level).encode(flat).reshape(batch, rows, columns, -1)

    def _points(self, level: int, symbols: Tensor) -> Tensor:
        flat = self.level_quantizer(level).decode(symbols.flatten(0, 2))
        return flat.reshape(*symbols.shape[:3], -1).permute(0, 3, 1, 2)

    def _losses(self, images: Tensor, decoded: Tensor, penalty: Tensor) -> VqVaeLosses:
        restored = decoded * 0.5 + 0.5
        error = functional.mse_loss(restored, images)
        return VqVaeLosses(error / self.config.pixel_variance + penalty, error, penalty, restored)

    def _check_grids(self, grids: tuple[Tensor, ...]) -> None:
        if len(grids) != self.config.levels or any(grid.ndim != 4 for grid in grids):
            shapes = [tuple(grid.shape) for grid in grids]
            raise InvalidLatents(f"need {self.config.levels} grids (B, h, w, S), got {shapes}")
        if len(grids) == 2:
            top, bottom = grids[0].shape[:3], grids[1].shape[:3]
            if (top[0], 2 * top[1], 2 * top[2]) != tuple(bottom):
                raise InvalidLatents(f"the bottom grid {tuple(bottom)} is not twice {tuple(top)}")


def _of_level(tables: tuple[SymbolTables, ...] | None, level: int) -> SymbolTables | None:
    return None if tables is None else tables[level]


def _encoder(inputs: int, width: int, halvings: int, blocks: int) -> nn.Sequential:
    """Strided 4x4 convolutions, one per halving, then residual blocks."""
    layers: list[nn.Module] = []
    for step in range(halvings):
        layers += [nn.Conv2d(inputs if step == 0 else width, width, 4, stride=2, padding=1)]
        layers += [nn.SiLU()]
    layers += [nn.Conv2d(width, width, 3, padding=1)]
    layers += [ResidualBlock(width) for _ in range(blocks)]
    return nn.Sequential(*layers, nn.SiLU())


def _decoder(inputs: int, outputs: int, width: int, halvings: int, blocks: int) -> nn.Sequential:
    """The encoder's mirror image with transposed convolutions."""
    layers: list[Any] = [nn.Conv2d(inputs, width, 3, padding=1)]
    layers += [ResidualBlock(width) for _ in range(blocks)]
    for step in range(halvings):
        last = step == halvings - 1
        layers += [nn.SiLU()]
        layers += [nn.ConvTranspose2d(width, outputs if last else width, 4, stride=2, padding=1)]
    return nn.Sequential(*layers)
