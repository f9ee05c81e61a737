"""Residual vector quantization: each stage codes what the stages before it left over.

Zeghidour et al., "SoundStream", 2021, algorithm 1; training by vector-quantize-pytorch (moving
averages, k-means start, expiry of unused codes). Encoding is ours: a beam search over the stages,
exact and deterministic, which greedy encoding (beam 1) falls short of.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from scq.metrics import CodebookUsage
from scq.quantizers.base import CHUNK_LATENTS, Quantizer, QuantizerConfig, straight_through
from scq.quantizers.codebook import seed_pool
from scq.quantizers.library import load_library

_KMEANS_ROUNDS = 15


class ResidualQuantizer(Quantizer):
    """`num_stages` codebooks whose codes add up. The library's expiry is set to our terms.

    Its own threshold counts uses a batch, which would expire every code of a large codebook in a
    small batch; here a code needs `dead_code_share` of the mean use, and starts with the mean.
    """

    def __init__(self, config: QuantizerConfig) -> None:
        super().__init__(config)
        self._settled = False
        self.core: Any = load_library("rvq").ResidualVQ(
            dim=config.code_dim,
            num_quantizers=config.num_stages,
            codebook_size=config.num_codes,
            beam_size=config.beam_size if config.beam_size > 1 else None,
            decay=config.decay,
            kmeans_init=True,
            kmeans_iters=_KMEANS_ROUNDS,
            threshold_ema_dead_code=1,
            rotation_trick=False,
            # Its commitment loss is also the score of its beam; we use our own as the loss.
            commitment_weight=1.0,
        )

    @property
    def codebooks(self) -> Tensor:
        """(S, K, F), one codebook per stage."""
        codebooks: Tensor = self.core.codebooks
        return codebooks

    @property
    def alphabets(self) -> tuple[int, ...]:
        """One index per stage."""
        return (self.config.num_codes,) * self.config.num_stages

    def encode(self, latents: Tensor) -> Tensor:
        """(N, F) -> (N, S) indices, best of a beam."""
        self.check_latents(latents)
        beam = self.config.beam_size
        chunks = torch.split(latents.detach(), max(1, CHUNK_LATENTS // beam))
        return torch.cat([beam_search(chunk, self.codebooks, beam) for chunk in chunks])

    def decode(self, symbols: Tensor) -> Tensor:
        """(N, S) -> (N, F) sums of codes, added in stage order."""
        self.check_symbols(symbols)
        codebooks = self.codebooks
        total = codebooks[0][symbols[:, 0]]
        for stage in range(1, len(codebooks)):
            total = total + codebooks[stage][symbols[:, stage]]
        return total

    def usage(self, symbols: Tensor) -> CodebookUsage:
        """Uses of all stages' codes together, S * K of them."""
        usage = CodebookUsage(self.config.num_codes * self.config.num_stages)
        firsts = torch.arange(self.config.num_stages) * self.config.num_codes
        codes = (symbols.cpu() + firsts).reshape(-1, 1)
        usage.add(codes, torch.ones(codes.shape))
        return usage

    def settle(self) -> None:
        """Stop expiring codes."""
        self._settled = True

    def _fit(self, latents: Tensor) -> None:
        pool = seed_pool(latents, self.config.num_codes, self.config.seed)
        devices = [latents.device] if latents.is_cuda else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(self.config.seed)
            self.core.train()
            self._set_expiry(len(pool))
            self.core(pool.unsqueeze(0))
        self.core.train(self.training)

    def _quantize(self, latents: Tensor, pictures: int) -> tuple[Tensor, Tensor, Tensor]:
        if self.training:
            self._set_expiry(len(latents))
            with torch.no_grad():
                batched, indices, _ = self.core(latents.detach().unsqueeze(0))
            codes, symbols = batched[0], indices[0].reshape(len(latents), -1)
        else:
            symbols = self.encode(latents)
            codes = self.decode(symbols)
        # One loss on the sum, not one per stage: only the sum reaches the decoder.
        loss = self.config.commitment * torch.nn.functional.mse_loss(latents, codes)
        return straight_through(latents, codes), loss, symbols

    def _set_expiry(self, batch: int) -> None:
        mean_use = batch / self.config.num_codes
        for layer in self._layers():
            codebook = layer._codebook
            codebook.threshold_ema_dead_code = self.config.dead_code_share * mean_use
            codebook.reset_cluster_size = mean_use
            codebook.has_dead_code_replacement = not self._settled

    def _layers(self) -> list[Any]:
        return list(self.core.layers)


def beam_search(latents: Tensor, codebooks: Tensor, beam: int) -> Tensor:
    """(N, F), (S, K, F) -> (N, S) int64: the best sum among `beam` partial sums kept per stage."""
    residuals = latents.unsqueeze(1)
    paths = torch.empty(len(latents), 1, 0, dtype=torch.int64, device=latents.device)
    for stage, codebook in enumerate(codebooks):
        kept = 1 if stage == len(codebooks) - 1 else beam
        scores = codebook.square().sum(dim=1) - 2 * residuals @ codebook.T
        scores = scores + residuals.square().sum(dim=2, keepdim=True)
        count = min(kept, scores[0].numel())
        chosen = scores.flatten(1).topk(count, dim=1, largest=False).indices
        parents, codes = chosen // len(codebook), chosen % len(codebook)
        rows = torch.arange(len(latents), device=latents.device).unsqueeze(1)
        paths = torch.cat([paths[rows, parents], codes.unsqueeze(2)], dim=2)
        residuals = residuals[rows, parents] - codebook[codes]
    return paths[:, 0]
