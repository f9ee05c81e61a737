"""Plain vector quantization: nearest code, straight-through gradient, two pull losses.

van den Oord et al., "Neural Discrete Representation Learning", 2017, section 3.
"""

from __future__ import annotations

from torch import Tensor

from scq.quantizers.base import nearest, pull_losses, straight_through
from scq.quantizers.codebook import CodebookQuantizer


class VectorQuantizer(CodebookQuantizer):
    """The VQ-VAE layer; its codebook learns from the codebook loss alone."""

    def encode(self, latents: Tensor) -> Tensor:
        """(N, F) -> (N, 1) nearest codes."""
        self.check_latents(latents)
        return nearest(latents.detach(), self.codebook.detach()).unsqueeze(1)

    def decode(self, symbols: Tensor) -> Tensor:
        """(N, 1) -> (N, F) codes, differentiable in the codebook."""
        self.check_symbols(symbols)
        return self.codebook[symbols[:, 0]]

    def _quantize(self, latents: Tensor, pictures: int) -> tuple[Tensor, Tensor, Tensor]:
        self._begin_step(latents)
        symbols = self.encode(latents)
        self._count(symbols)
        codes = self.decode(symbols)
        loss = pull_losses(latents, codes, self.config)
        return straight_through(latents, codes.detach()), loss, symbols
