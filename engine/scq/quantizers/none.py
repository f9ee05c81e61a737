"""No quantization at all: the bound that an autoencoder reaches without a bottleneck of bits."""

from __future__ import annotations

import math

from torch import Tensor

from scq.errors import UnsupportedOperation
from scq.metrics import CodebookUsage
from scq.quantizers.base import Quantizer


class Unquantized(Quantizer):
    """Identity. It has no symbols, so it cannot be packed."""

    @property
    def alphabets(self) -> tuple[int, ...]:
        """No symbols."""
        return ()

    @property
    def raw_bits_per_latent(self) -> float:
        """Infinity: real numbers."""
        return math.inf

    def encode(self, latents: Tensor) -> Tensor:
        """Always raises UnsupportedOperation."""
        raise UnsupportedOperation(_REASON)

    def decode(self, symbols: Tensor) -> Tensor:
        """Always raises UnsupportedOperation."""
        raise UnsupportedOperation(_REASON)

    def pack(self, symbols: Tensor, tables: object = None) -> bytes:
        """Always raises UnsupportedOperation."""
        raise UnsupportedOperation(_REASON)

    def usage(self, symbols: Tensor) -> CodebookUsage:
        """Always raises UnsupportedOperation."""
        raise UnsupportedOperation(_REASON)

    def _quantize(self, latents: Tensor, pictures: int) -> tuple[Tensor, Tensor, Tensor]:
        symbols = latents.new_empty(latents.shape[0], 0).long()
        return latents, latents.new_zeros(()), symbols


_REASON = "the unquantized bound has no code and no bytes; choose another quantizer to code with"
