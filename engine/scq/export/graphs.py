"""The three graphs of a bundle as torch modules: encoder, decoder and recognizer.

Each wraps parts of a `ScqAutoencoder` between plain tensors, so that what is exported is what the
server runs. Knows nothing of files.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from scq.errors import UnsupportedOperation
from scq.export.coder import DEFAULT_CANDIDATES, LatticeCoder
from scq.model import ScqAutoencoder


class EncoderGraph(nn.Module):
    """Image (1, 3, H, W) float32 in [0, 1] -> indices and numerators, (H/f * W/f, s) int64."""

    def __init__(self, model: ScqAutoencoder, candidates: int = DEFAULT_CANDIDATES) -> None:
        super().__init__()
        self.encoder = model.encoder
        self.code_dim = model.config.code_dim
        codebook = model.quantizer.codebook.detach().clone()
        self.coder = LatticeCoder(codebook, model.config.lattice, candidates)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        latents = self.encoder(image * 2 - 1).permute(0, 2, 3, 1)
        indices, numerators = self.coder(latents.reshape(-1, self.code_dim))
        return indices, numerators


class _FromCodes(nn.Module):
    """Indices and numerators (h, w, s) int64 -> latents (1, F, h, w), exactly as SCQ1 decodes."""

    def __init__(self, model: ScqAutoencoder) -> None:
        super().__init__()
        integers, exponent = model.codebook_int16()
        self.integers = nn.Buffer(torch.from_numpy(integers).to(torch.int32))
        # Denominator and scale are powers of two: this product is exact.
        self.scale = 2.0**-exponent / model.config.denominator

    def forward(self, indices: Tensor, numerators: Tensor) -> Tensor:
        """See the class."""
        terms = self.integers[indices] * numerators.to(torch.int32).unsqueeze(-1)
        latents = terms.sum(dim=2, dtype=torch.int32).to(torch.float32) * self.scale
        return latents.permute(2, 0, 1).unsqueeze(0)


class DecoderGraph(nn.Module):
    """Indices and numerators (h, w, s) int64 -> image (1, 3, h*f, w*f) float32 in [0, 1]."""

    def __init__(self, model: ScqAutoencoder) -> None:
        super().__init__()
        self.from_codes = _FromCodes(model)
        self.decoder = model.decoder

    def forward(self, indices: Tensor, numerators: Tensor) -> Tensor:
        """See the class."""
        image: Tensor = self.decoder(self.from_codes(indices, numerators))
        return (image * 0.5 + 0.5).clamp(0, 1)


class RecognizerGraph(nn.Module):
    """Indices and numerators (h, w, s) int64 -> class probabilities (1, num_classes).

    Raises UnsupportedOperation for a model without a head.
    """

    def __init__(self, model: ScqAutoencoder) -> None:
        super().__init__()
        if model.head is None:
            raise UnsupportedOperation(f"model {model.config.name!r} has no classifier head")
        self.from_codes = _FromCodes(model)
        self.head = model.head

    def forward(self, indices: Tensor, numerators: Tensor) -> Tensor:
        """See the class."""
        logits: Tensor = self.head(self.from_codes(indices, numerators))
        return logits.softmax(dim=1)
