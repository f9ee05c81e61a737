"""SimVQ: a fixed codebook seen through one learned linear map, so that all codes move together.

Zhu et al., "Addressing Representation Collapse in Vector Quantized Models with One Linear Layer",
2024; layer by vector-quantize-pytorch. Ours starts the fixed codebook at k-means of the first
latents and the map at the identity, instead of random codes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from scq.codebook_init import kmeans
from scq.metrics import CodebookUsage
from scq.quantizers.base import Quantizer, QuantizerConfig, nearest
from scq.quantizers.codebook import seed_pool
from scq.quantizers.library import load_library


class SimQuantizer(Quantizer):
    """Nearest code of the mapped codebook; the map learns, the codes behind it do not."""

    def __init__(self, config: QuantizerConfig) -> None:
        super().__init__(config)
        transform = nn.Linear(config.code_dim, config.code_dim)
        nn.init.eye_(transform.weight)
        nn.init.zeros_(transform.bias)
        pull = max(config.codebook_pull, 1e-8)
        self.core: Any = load_library("simvq").SimVQ(
            dim=config.code_dim,
            codebook_size=config.num_codes,
            codebook_transform=transform,
            input_to_quantize_commit_loss_weight=config.commitment / pull,
            commitment_weight=pull,
        )

    @property
    def codebook(self) -> Tensor:
        """(K, F) codes as mapped now."""
        codebook: Tensor = self.core.codebook
        return codebook

    @property
    def alphabets(self) -> tuple[int, ...]:
        """One symbol: the index of the code."""
        return (self.config.num_codes,)

    def encode(self, latents: Tensor) -> Tensor:
        """(N, F) -> (N, 1) nearest codes."""
        self.check_latents(latents)
        return nearest(latents.detach(), self.codebook.detach()).unsqueeze(1)

    def decode(self, symbols: Tensor) -> Tensor:
        """(N, 1) -> (N, F) codes, differentiable in the map."""
        self.check_symbols(symbols)
        return self.codebook[symbols[:, 0]]

    def usage(self, symbols: Tensor) -> CodebookUsage:
        """Uses of the codes by (N, 1) indices."""
        usage = CodebookUsage(self.config.num_codes)
        usage.add(symbols, torch.ones(symbols.shape))
        return usage

    def _fit(self, latents: Tensor) -> None:
        pool = seed_pool(latents, self.config.num_codes, self.config.seed)
        generator = torch.Generator().manual_seed(self.config.seed)
        self.core.frozen_codebook.copy_(kmeans(pool, self.config.num_codes, generator))

    def _quantize(self, latents: Tensor, pictures: int) -> tuple[Tensor, Tensor, Tensor]:
        batched, indices, loss = self.core(latents.unsqueeze(0))
        symbols = indices[0].unsqueeze(1)
        if not self.training:
            # The library rotates latents onto codes, which rounds; the codec's value is exact.
            return self.decode(symbols), loss, symbols
        return batched[0], loss, symbols
