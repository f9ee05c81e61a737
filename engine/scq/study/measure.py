"""What a trained run is worth: error of the coded pictures, measured bytes, codebook use.

Pictures pass through symbols and back, as a receiver would see them. Bytes are those of the
packed test set, divided by its pictures: RAW, and rANS with static tables fitted on training
pictures (the tables are not counted, they ship with the codebook).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scq.errors import InvalidCodebook
from scq.quantizers import Quantizer
from scq.quantizers.none import Unquantized
from scq.study.autoencoder import LATENTS_PER_IMAGE, StudyAutoencoder
from scq.study.rate_aware import encode_with_rate, fit_choice

_CHUNK = 250


@dataclass(frozen=True)
class Measurement:
    """Means over the test set.

    mse: of samples in [0, 1], clamped. forward_mse: the same without coding, which differs where
    real weights have to be rounded. latent_mse: of coded latents, whose variance is one before
    training. raw_bytes, rans_bytes: per picture, NaN where there is no code or no table.
    top1_usage 0..1, perplexity of heaviest codes, mass_perplexity of weights.
    """

    mse: float
    forward_mse: float
    latent_mse: float
    raw_bits_per_latent: float
    raw_bytes: float
    rans_bytes: float
    top1_usage: float
    perplexity: float
    mass_perplexity: float

    @property
    def psnr_db(self) -> float:
        """Peak signal-to-noise ratio of the mean squared error."""
        return -10 * math.log10(self.mse) if self.mse else math.inf


class QuantizedAutoencoder(nn.Module):
    """The study's autoencoder with a quantizer between its halves."""

    def __init__(self, autoencoder: StudyAutoencoder, quantizer: Quantizer) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.quantizer = quantizer


@torch.no_grad()
def encode_pictures(model: StudyAutoencoder, pictures: Tensor) -> Tensor:
    """(N, 3, 32, 32) uint8 -> latents (N * 16, F)."""
    parts = [model.encode(chunk.float().div_(255)) for chunk in torch.split(pictures, _CHUNK)]
    return torch.cat(parts).flatten(0, 2)


@torch.no_grad()
def measure(
    model: QuantizedAutoencoder, train: Tensor, test: Tensor, rate_weight: float = 0.0
) -> Measurement:
    """Measure on `test` (N, 3, 32, 32) uint8; entropy tables come from `train`.

    rate_weight: squared latent error that a bit is worth to an encoder that minds the rate.
    """
    autoencoder, quantizer = model.autoencoder, model.quantizer
    latents = encode_pictures(autoencoder, test)
    if isinstance(quantizer, Unquantized):
        mse, nan = _error(autoencoder, latents, test), math.nan
        return Measurement(mse, mse, 0.0, math.inf, nan, nan, nan, nan, nan)
    coded = _code(quantizer, encode_pictures(autoencoder, train), latents, rate_weight)
    decoded, usage = quantizer.decode(coded.symbols), quantizer.usage(coded.symbols)
    return Measurement(
        mse=_error(autoencoder, decoded, test),
        forward_mse=_error(autoencoder, _forward(quantizer, latents), test),
        latent_mse=float((decoded - latents).square().mean()),
        raw_bits_per_latent=quantizer.raw_bits_per_latent,
        raw_bytes=len(quantizer.pack(coded.symbols)) / len(test),
        rans_bytes=coded.rans_bytes / len(test),
        top1_usage=usage.top1_usage,
        perplexity=usage.perplexity,
        mass_perplexity=usage.mass_perplexity,
    )


@dataclass(frozen=True)
class _Coded:
    """Symbols (N, S) of the test latents and the bytes of their rANS stream, NaN without tables."""

    symbols: Tensor
    rans_bytes: float


def _code(quantizer: Quantizer, train: Tensor, test: Tensor, rate_weight: float) -> _Coded:
    if rate_weight:
        tables = fit_choice(quantizer, train, rate_weight)
        symbols = encode_with_rate(quantizer, test, tables, rate_weight)
        return _Coded(symbols, len(quantizer.pack(symbols, tables)))
    symbols = quantizer.encode(test)
    try:
        tables = quantizer.fit_tables(quantizer.encode(train))
    except InvalidCodebook:
        # An alphabet beyond 16-bit tables can only be packed RAW.
        return _Coded(symbols, math.nan)
    return _Coded(symbols, len(quantizer.pack(symbols, tables)))


def _forward(quantizer: Quantizer, latents: Tensor) -> Tensor:
    """What the decoder saw while training, (N, F)."""
    grids = latents.reshape(-1, 1, LATENTS_PER_IMAGE, latents.shape[1])
    return torch.cat(
        [quantizer(part).quantized.flatten(0, 2) for part in torch.split(grids, _CHUNK)]
    )


def _error(model: StudyAutoencoder, latents: Tensor, pictures: Tensor) -> float:
    width = latents.shape[1]
    grids = torch.split(latents.reshape(len(pictures), -1, width), _CHUNK)
    side = math.isqrt(LATENTS_PER_IMAGE)
    total = 0.0
    for grid, chunk in zip(grids, torch.split(pictures, _CHUNK), strict=True):
        decoded = model.decode(grid.reshape(len(grid), side, side, width)).clamp(0, 1)
        total += float((decoded - chunk.float().div_(255)).square().double().sum())
    return total / pictures.numel()
