"""VQ-VAE and VQ-VAE-2 with any quantizer, and an autoregressive prior over their code grids."""

from __future__ import annotations

from scq.vqvae.config import VqVaeConfig
from scq.vqvae.model import VqVae, VqVaeLosses
from scq.vqvae.prior import CodePrior, PriorConfig
from scq.vqvae.prior_codec import PriorCodec

__all__ = ["CodePrior", "PriorCodec", "PriorConfig", "VqVae", "VqVaeConfig", "VqVaeLosses"]
