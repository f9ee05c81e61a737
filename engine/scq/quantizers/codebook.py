"""Quantizers that own a codebook parameter: k-means start, and dead codes moved onto latents.

A code is dead when its use since the last check is below a small share of the mean use.
It moves onto a current latent, drawn in proportion to its squared quantization error, because
that is where codes are missing. Knows nothing of how codes are combined.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from scq.codebook_init import kmeans
from scq.metrics import CodebookUsage
from scq.quantizers.base import Quantizer, QuantizerConfig, synchronize

_JITTER = 1e-2


class CodebookQuantizer(Quantizer):
    """A quantizer with `codebook` (K, F) as a parameter, and uses counted per code."""

    uses: Tensor
    steps: Tensor

    def __init__(self, config: QuantizerConfig) -> None:
        super().__init__(config)
        self.codebook = nn.Parameter(torch.randn(config.num_codes, config.code_dim))
        self.register_buffer("uses", torch.zeros(config.num_codes, dtype=torch.float64))
        self.register_buffer("steps", torch.tensor(0, dtype=torch.int64))
        self._settled = False
        self._moved: list[Tensor] = []

    @property
    def alphabets(self) -> tuple[int, ...]:
        """One symbol: the index of the code."""
        return (self.config.num_codes,)

    def usage(self, symbols: Tensor) -> CodebookUsage:
        """Uses of the codes by (N, 1) indices."""
        usage = CodebookUsage(self.config.num_codes)
        usage.add(symbols, torch.ones(symbols.shape))
        return usage

    def settle(self) -> None:
        """Stop moving dead codes."""
        self._settled = True

    def take_moved_codes(self) -> Tensor:
        """Rows of `codebook` moved since the last call."""
        moved = torch.cat([torch.empty(0, dtype=torch.int64), *self._moved])
        self._moved.clear()
        return moved

    def _fit(self, latents: Tensor) -> None:
        pool = seed_pool(latents, self.config.num_codes, self.config.seed)
        generator = torch.Generator().manual_seed(self.config.seed)
        self.codebook.copy_(kmeans(pool, self.config.num_codes, generator))

    def _begin_step(self, latents: Tensor) -> None:
        """Count a training step and move dead codes when it is time; before codes are used."""
        if not self.training:
            return
        self.steps += 1
        interval = self.config.dead_code_interval
        if interval and not self._settled and int(self.steps) % interval == 0:
            self._move_dead_codes(latents.detach())

    def _count(self, indices: Tensor, weights: Tensor | None = None) -> None:
        """Add uses of codes, any shape int64, each once or by its weight."""
        if self.training:
            amounts = None if weights is None else weights.flatten().double()
            self.uses += torch.bincount(indices.flatten(), amounts, self.config.num_codes)

    @torch.no_grad()
    def _move_dead_codes(self, latents: Tensor) -> None:
        uses = all_reduced(self.uses)
        dead = (uses < self.config.dead_code_share * uses.mean()).nonzero().flatten()
        self.uses.zero_()
        dead = dead[: len(latents)]
        if not len(dead):
            return
        errors = (latents - self.decode(self.encode(latents))).square().sum(dim=1)
        chosen = torch.multinomial(errors.double() + 1e-12, len(dead))
        self.codebook[dead] = latents[chosen].to(self.codebook.dtype)
        synchronize(self)
        self._moved.append(dead.cpu())


def seed_pool(latents: Tensor, minimum: int, seed: int) -> Tensor:
    """`latents` (N, F), topped up to `minimum` rows by slightly noisy repeats."""
    missing = minimum - latents.shape[0]
    if missing <= 0:
        return latents
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(latents.shape[0], (missing,), generator=generator)
    noise = torch.randn(missing, latents.shape[1], generator=generator).to(latents)
    spread = latents.std(dim=0, correction=0).clamp(min=1e-6)
    return torch.cat([latents, latents[rows] + _JITTER * spread * noise])


def all_reduced(counts: Tensor) -> Tensor:
    """Counts of all processes of a distributed run added up; a copy."""
    total = counts.clone()
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(total)
    return total
