"""Training a VQ-VAE on pictures and priors on its code grids, at small size, from one seed.

Every step draws from a generator seeded by (seed, step). Knows no files and no command line.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from scq.data import CropConfig, ImageSet, sample_batch
from scq.errors import ScqError
from scq.vqvae.config import VqVaeConfig
from scq.vqvae.model import VqVae
from scq.vqvae.prior import NO_CONDITIONS, Allowed, CodePrior, Conditions, PriorConfig, allow_all

# Dead codes move in the first part of training only, so that the last ones placed settle.
_MOVING_SHARE = 0.7
_WARMUP_STEPS = 50

# step, total steps, phase, note.
Progress = Callable[[int, int, str, str], None]


@dataclass(frozen=True)
class VqVaeTraining:
    """How long and how fast. crop: pixels of the square training crops.

    prior_steps: optimizer steps of each level's prior, 0 for none. Raises ScqError.
    """

    steps: int = 2000
    batch_size: int = 16
    learning_rate: float = 1e-3
    crop: int = 64
    prior_steps: int = 1000
    prior_channels: int = 64
    prior_layers: int = 6
    prior_learning_rate: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "crop", "prior_channels", "prior_layers"):
            if getattr(self, name) < 1:
                raise ScqError(f"{name} is out of range: {getattr(self, name)!r}")
        for name in ("learning_rate", "prior_learning_rate"):
            if not getattr(self, name) > 0:
                raise ScqError(f"{name} is out of range: {getattr(self, name)!r}")
        if self.prior_steps < 0:
            raise ScqError(f"prior_steps is out of range: {self.prior_steps!r}")


def train_vqvae(
    config: VqVaeConfig, training: VqVaeTraining, images: ImageSet, progress: Progress | None = None
) -> VqVae:
    """A model trained on random crops, frozen. Raises ScqError when a loss is not finite."""
    if training.crop % config.stride:
        raise ScqError(f"crop {training.crop} is not a multiple of the stride {config.stride}")
    torch.manual_seed(training.seed)
    model = VqVae(config).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=training.learning_rate, betas=(0.9, 0.99))
    crop = CropConfig(training.crop)
    for step in range(training.steps):
        rng = np.random.default_rng((training.seed, step))
        torch.manual_seed(int(rng.integers(2**31)))
        _set_rate(optimizer, training.learning_rate, step, training.steps)
        if step == round(_MOVING_SHARE * training.steps):
            _settle(model)
        batch = sample_batch(images, crop, training.batch_size, rng).images
        losses = model(batch)
        _update(optimizer, losses.total, step)
        _forget_moved_codes(model, optimizer)
        if progress is not None:
            error = float(losses.reconstruction.detach())
            progress(step + 1, training.steps, "pictures", f"{_psnr_db(error):.2f} dB")
    return model.eval().requires_grad_(False)


@torch.no_grad()
def training_grids(
    model: VqVae, images: ImageSet, training: VqVaeTraining, batches: int
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """Grids of random crops, coarsest level first, and their labels if there are any."""
    grids, labels = [], []
    for number in range(batches):
        rng = np.random.default_rng((training.seed, training.steps, number))
        batch = sample_batch(images, CropConfig(training.crop), training.batch_size, rng)
        grids.append(model.encode(batch.images))
        if batch.labels is not None:
            labels.append(batch.labels)
    joined = tuple(torch.cat(level) for level in zip(*grids, strict=True))
    return joined, torch.cat(labels) if labels else None


def train_priors(
    model: VqVae,
    images: ImageSet,
    training: VqVaeTraining,
    progress: Progress | None = None,
) -> tuple[CodePrior, ...]:
    """One prior per level; the bottom one is conditioned on the top grid, all on the labels."""
    batches = max(8, min(training.prior_steps, 4096 // training.batch_size))
    grids, labels = training_grids(model, images, training, batches)
    priors = []
    for level, grid in enumerate(grids):
        quantizer = model.level_quantizer(level)
        config = PriorConfig(
            quantizer.alphabets,
            model.level_quantizer(0).alphabets if level else (),
            num_classes=len(images.classes),
            channels=training.prior_channels,
            layers=training.prior_layers,
        )
        torch.manual_seed(training.seed)
        prior = CodePrior(config)
        conditions = Conditions(grids[0] if level else None, labels)
        note = f"prior {level + 1}"
        fit_prior(prior, grid, training, conditions, quantizer.allowed, (progress, note))
        priors.append(prior)
    return tuple(priors)


def fit_prior(
    prior: CodePrior,
    grids: Tensor,
    training: VqVaeTraining,
    conditions: Conditions = NO_CONDITIONS,
    allowed: Allowed = allow_all,
    report: tuple[Progress | None, str] = (None, ""),
) -> None:
    """Fit `prior` to (N, h, w, S) grids by maximum likelihood; leaves it frozen in eval mode."""
    prior.train().requires_grad_(True)
    rate = training.prior_learning_rate
    optimizer = torch.optim.AdamW(prior.parameters(), lr=rate, weight_decay=1e-4)
    for step in range(training.prior_steps):
        rng = np.random.default_rng((training.seed, step, 1))
        torch.manual_seed(int(rng.integers(2**31)))
        _set_rate(optimizer, rate, step, training.prior_steps)
        rows = torch.from_numpy(rng.integers(len(grids), size=training.batch_size))
        bits = prior.bits(grids[rows], _rows_of(conditions, rows), allowed).mean()
        symbols = grids[0, ..., 0].numel()
        _update(optimizer, bits * math.log(2) / symbols, step)
        progress, phase = report
        if progress is not None:
            note = f"{float(bits.detach()) / symbols:.3f} bits a code"
            progress(step + 1, training.prior_steps, phase, note)
    prior.eval().requires_grad_(False)


def _rows_of(conditions: Conditions, rows: Tensor) -> Conditions:
    return Conditions(
        None if conditions.grid is None else conditions.grid[rows],
        None if conditions.labels is None else conditions.labels[rows],
    )


def _set_rate(optimizer: torch.optim.Optimizer, rate: float, step: int, steps: int) -> None:
    """Linear warm-up, then a cosine to a twentieth."""
    ramp = min(1.0, (step + 1) / max(1, min(_WARMUP_STEPS, steps // 10)))
    falling = 0.05 + 0.95 * (1 + math.cos(math.pi * step / steps)) / 2
    for group in optimizer.param_groups:
        group["lr"] = rate * ramp * falling


def _update(optimizer: torch.optim.Optimizer, loss: Tensor, step: int) -> None:
    if not bool(torch.isfinite(loss)):
        raise ScqError(f"loss is not finite at step {step}; lower the learning rate")
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


def _settle(model: VqVae) -> None:
    for level in range(model.config.levels):
        model.level_quantizer(level).settle()


def _forget_moved_codes(model: VqVae, optimizer: torch.optim.Optimizer) -> None:
    """Zero the moments of codes that were moved: they belong to another place."""
    for level in range(model.config.levels):
        quantizer = model.level_quantizer(level)
        moved = quantizer.take_moved_codes()
        if len(moved):
            codebook = quantizer.get_parameter("codebook")
            for moment in ("exp_avg", "exp_avg_sq"):
                optimizer.state[codebook][moment][moved] = 0


def _psnr_db(squared_error: float) -> float:
    return -10 * math.log10(squared_error) if squared_error else math.inf
