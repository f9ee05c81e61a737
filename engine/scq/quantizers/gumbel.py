"""Vector quantization by sampling: Gumbel-softmax over codes, annealed to the nearest code.

Jang et al., "Categorical Reparameterization with Gumbel-Softmax", 2017. The logits are negative
squared distances times a learned precision, so that the deterministic code is the nearest one and
k-means can start it; the reference form with free logits has neither.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from scq.quantizers.base import QuantizerConfig, nearest, pull_losses
from scq.quantizers.vq import VectorQuantizer


class GumbelQuantizer(VectorQuantizer):
    """Trains on one sampled code a latent, with the relaxed sample's gradient; codes like VQ."""

    def __init__(self, config: QuantizerConfig) -> None:
        super().__init__(config)
        self.log_precision = nn.Parameter(torch.zeros(()))

    @property
    def temperature(self) -> float:
        """Of the next training step: exponential from `temperature` to `final_temperature`."""
        done = min(1.0, int(self.steps) / self.config.temperature_steps)
        fall = math.log(self.config.final_temperature / self.config.temperature)
        return self.config.temperature * math.exp(fall * done)

    def _fit(self, latents: Tensor) -> None:
        super()._fit(latents)
        codes = self.codebook[nearest(latents, self.codebook)]
        error = (latents - codes).square().mean().clamp(min=1e-8)
        # Precision of a Gaussian mixture whose components spread as the clusters do.
        self.log_precision.copy_(-torch.log(2 * error))

    def _quantize(self, latents: Tensor, pictures: int) -> tuple[Tensor, Tensor, Tensor]:
        if not self.training:
            return super()._quantize(latents, pictures)
        self._begin_step(latents)
        distances = torch.cdist(latents, self.codebook).square()
        logits = -self.log_precision.exp() * distances
        sample = functional.gumbel_softmax(logits, tau=self.temperature, hard=True)
        symbols = sample.detach().argmax(dim=1, keepdim=True)
        self._count(symbols)
        return sample @ self.codebook, self._loss(latents, logits, symbols), symbols

    def _loss(self, latents: Tensor, logits: Tensor, symbols: Tensor) -> Tensor:
        """Pull of latent and sampled code, and KL(posterior | uniform) in nats."""
        log_posterior = functional.log_softmax(logits, dim=1)
        divergence = (log_posterior.exp() * log_posterior).sum(dim=1).mean()
        divergence = divergence + math.log(self.config.num_codes)
        pulls = pull_losses(latents, self.decode(symbols), self.config)
        return pulls + self.config.entropy_weight * divergence
