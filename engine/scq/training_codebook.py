"""The codebook's life in a training run: its first fit to latents, and codes that must move.

Knows the training state and its data, nothing of losses or phases.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from scq.checkpoint import TrainingState
from scq.codebook_init import kmeans, refine
from scq.data import ImageSet, sample_batch
from scq.lattice import reconstruct, search
from scq.training_config import TrainConfig

_SEED_LATENTS = 20_000


def fit_codebook(state: TrainingState, config: TrainConfig, images: ImageSet) -> None:
    """Codebook from the latents of random crops: k-means, then lattice least squares."""
    rng = np.random.default_rng((config.seed, config.total_steps))
    per_batch = config.batch_size * (config.crop.size // config.model.stride) ** 2
    wanted = min(_SEED_LATENTS, 80 * config.model.num_codes)
    with torch.no_grad():
        latents = torch.cat(
            [_latents(state, config, images, rng) for _ in range(math.ceil(wanted / per_batch))]
        )
        generator = torch.Generator().manual_seed(config.seed)
        codebook = kmeans(latents, config.model.num_codes, generator)
        codebook = refine(latents, codebook, config.model.lattice)
        state.model.quantizer.codebook.copy_(codebook)
        state.average.quantizer.codebook.copy_(codebook)


def place_codes(state: TrainingState, config: TrainConfig, images: ImageSet, dead: Tensor) -> None:
    """Put the codes numbered `dead` onto latents that are coded badly, and reset their moments."""
    rng = np.random.default_rng((config.seed, state.step, 1))
    codebook = state.model.quantizer.codebook
    with torch.no_grad():
        latents = _latents(state, config, images, rng)
        points = reconstruct(search(latents, codebook, config.model.lattice), codebook)
        errors = (latents - points).square().sum(dim=1).double().cpu().numpy()
        count = min(len(dead), len(latents))
        chosen = rng.choice(len(latents), count, replace=False, p=errors / errors.sum())
        codebook[dead[:count]] = latents[chosen]
        state.average.quantizer.codebook[dead[:count]] = latents[chosen]
    for moment in ("exp_avg", "exp_avg_sq"):
        state.optimizer.state[codebook][moment][dead[:count]] = 0


def _latents(
    state: TrainingState, config: TrainConfig, images: ImageSet, rng: np.random.Generator
) -> Tensor:
    crops = sample_batch(images, config.crop, config.batch_size, rng).images
    return state.model.encode(crops.to(state.usage.device)).flatten(0, 2)
