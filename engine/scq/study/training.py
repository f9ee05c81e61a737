"""Training of the studies: the autoencoder alone, then with a quantizer between its halves.

Fixed steps, Adam with a cosine rate and an exponential average of the weights, everything a pure
function of pictures, settings and seed. Knows quantizers only through their interface.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from scq.errors import ScqError
from scq.study.autoencoder import AutoencoderConfig, StudyAutoencoder

Trained = TypeVar("Trained", bound=nn.Module)


@dataclass(frozen=True)
class Budget:
    """What one training run may spend.

    codebook_rate: learning rate of a quantizer's own parameters over `learning_rate`.
    average_decay: of the weights' running mean.
    """

    steps: int
    batch_size: int = 64
    learning_rate: float = 1e-3
    codebook_rate: float = 1.0
    average_decay: float = 0.98
    bfloat16: bool = True

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1:
            raise ScqError(f"steps and batch_size must be positive, got {self}")
        if not 0 < self.learning_rate < 1 or not 0 <= self.average_decay < 1:
            raise ScqError(f"learning_rate or average_decay out of range: {self}")

    def rate(self, step: int) -> float:
        """Learning rate of a step: 20 steps of warm-up, then a cosine to 2 % of the peak."""
        warmup = min(1.0, (step + 1) / 20)
        cosine = 0.51 + 0.49 * math.cos(math.pi * step / self.steps)
        return self.learning_rate * warmup * cosine


def batches(count: int, budget: Budget, seed: int) -> Iterator[Tensor]:
    """`budget.steps` batches of positions (B,) int64 in 0..count-1, shuffled epoch by epoch."""
    rng = np.random.default_rng((seed, 17))
    order = np.empty(0, np.int64)
    for _ in range(budget.steps):
        while len(order) < budget.batch_size:
            order = np.concatenate([order, rng.permutation(count)])
        chosen, order = order[: budget.batch_size], order[budget.batch_size :]
        yield torch.from_numpy(chosen)


def to_float(pictures: Tensor) -> Tensor:
    """uint8 samples -> float32 in [0, 1]."""
    return pictures.float().div_(255)


def pretrain(
    pictures: Tensor, config: AutoencoderConfig, budget: Budget, seed: int
) -> StudyAutoencoder:
    """An unquantized autoencoder of `pictures` (N, 3, 32, 32) uint8, latents of unit deviation."""
    torch.manual_seed(seed)
    model = StudyAutoencoder(config)

    def loss(chosen: Tensor, _: int) -> Tensor:
        images = to_float(pictures[chosen])
        with torch.autocast("cpu", torch.bfloat16, enabled=budget.bfloat16):
            decoded = model.decode(model.encode(images))
        return functional.mse_loss(decoded.float(), images)

    averaged = optimise(model, loss, batches(len(pictures), budget, seed), budget)
    averaged.normalise(to_float(pictures[:1000]))
    return averaged


def optimise(
    model: Trained, loss: Callable[[Tensor, int], Tensor], source: Iterator[Tensor], budget: Budget
) -> Trained:
    """Minimise `loss(positions, step)` over what `model` trains; returns the averaged model.

    Buffers of the average are those of the trained model. Raises ScqError on a loss that is not
    finite.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ScqError("nothing to train: every parameter is frozen")
    optimizer = torch.optim.Adam(_groups(model, budget))
    average = copy.deepcopy(model)
    for step, chosen in enumerate(source):
        for group in optimizer.param_groups:
            group["lr"] = budget.rate(step) * group["factor"]
        value = loss(chosen, step)
        if not bool(torch.isfinite(value)):
            raise ScqError(f"loss is not finite at step {step}; lower learning_rate")
        optimizer.zero_grad(set_to_none=True)
        value.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        _average(average, model, min(budget.average_decay, (1 + step) / (10 + step)))
    return average.eval()


def _groups(model: nn.Module, budget: Budget) -> list[dict[str, Any]]:
    """Parameters to train; those of the submodule `quantizer` apart."""
    named = [item for item in model.named_parameters() if item[1].requires_grad]
    codes = [parameter for name, parameter in named if name.startswith("quantizer.")]
    others = [parameter for name, parameter in named if not name.startswith("quantizer.")]
    groups = ((others, 1.0), (codes, budget.codebook_rate))
    return [{"params": params, "factor": factor} for params, factor in groups if params]


def _average(average: nn.Module, model: nn.Module, decay: float) -> None:
    with torch.no_grad():
        for parameter, weight in zip(average.parameters(), model.parameters(), strict=True):
            parameter.lerp_(weight, 1 - decay)
        for kept, buffer in zip(average.buffers(), model.buffers(), strict=True):
            kept.copy_(buffer)
