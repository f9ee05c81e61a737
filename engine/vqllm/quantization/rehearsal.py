"""Quantizes blocks of true shapes and random weights: does a machine bear a model it lacks?

Memory and time depend on shapes alone, so a rehearsal of one block tells what a real run will take
long before the weights are downloaded. Knows shapes, no file of any model.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vqllm.decoder.config import DecoderConfig
from vqllm.decoder.weights import BlockWeights
from vqllm.outlier.transform import ModelTransform
from vqllm.quantization.mappers import LocalMapper
from vqllm.quantization.memory import peak_bytes, plan_memory, reset_peak
from vqllm.quantization.parts import QuantizedPart
from vqllm.quantization.pipeline import Surroundings, quantize_model
from vqllm.quantization.recipe import Recipe
from vqllm.quantization.workers import Workers
from vqllm.sources import Tensors


@dataclass(frozen=True)
class Rehearsal:
    """What one block took.

    Attributes:
        is_lean: whether weights and states had to lie on disk.
        expected_bytes, peak_bytes: estimate before, measurement after.
        seconds: wall time of the block.
        worst_error: largest relative error of its linears; random weights say little more.
    """

    is_lean: bool
    expected_bytes: int
    peak_bytes: int
    seconds: float
    worst_error: float


class RandomSource:
    """A weight source of Gaussian weights that are made when they are read."""

    def __init__(self, config: DecoderConfig, seed: int = 0) -> None:
        self.config, self._seed = config, seed

    @property
    def transform(self) -> ModelTransform:
        return ModelTransform()

    @property
    def config_changes(self) -> dict[str, Any]:
        return {}

    def embed(self, token_ids: Tensor) -> Tensor:
        """Hidden states that depend on the tokens; there is no table."""
        generator = torch.Generator().manual_seed(int(token_ids.sum()) + self._seed)
        return torch.randn(*token_ids.shape, self.config.hidden_size, generator=generator)

    def block(self, layer: int) -> BlockWeights:
        generator = torch.Generator().manual_seed(self._seed + layer)
        linears = {
            part: torch.randn(rows, columns, generator=generator).mul_(columns**-0.5)
            for part, (rows, columns) in self.config.linear_shapes(layer).items()
        }
        inner = {
            name: torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator)
            for name, shape in self.config.inner_shapes(layer).items()
        }
        ones = torch.ones(self.config.hidden_size)
        biases = {part: torch.zeros(linears[part].shape[0]) for part in self.config.biases}
        return BlockWeights(ones, ones, linears, biases=biases, inner=inner, layer=layer)

    def logits(self, hidden: Tensor) -> Tensor:
        """Raises NotImplementedError: there is no head."""
        raise NotImplementedError("a rehearsal ends behind the last block")

    def linear_names(self) -> list[str]:
        return self.config.linear_names()

    def other_tensors(self) -> Tensors:
        return {}


def rehearse(
    config: DecoderConfig,
    recipe: Recipe,
    windows_shape: tuple[int, int],
    max_memory: int | None,
    report: Callable[[QuantizedPart], None],
    workers: Workers | None = None,
) -> Rehearsal:
    """Quantize the first block of `config` with random weights.

    Args:
        windows_shape: calibration windows and tokens per window.
        max_memory: bytes that must not be exceeded, or None.
        workers: share the work where they fit into the memory.

    Raises:
        OverBudget: the limit cannot be kept, or was not.
        UnsupportedModel: a linear does not fit the format of its method.
    """
    config = replace(config, num_layers=1)
    reset_peak()
    workers = workers or Workers()
    plan = plan_memory(config, windows_shape, recipe, max_memory, workers.count)
    workers = workers if plan.num_workers > 1 else Workers()
    windows: NDArray[np.int64] = np.random.default_rng(0).integers(
        0, config.vocab_size, windows_shape
    )
    errors, start = [], time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        surroundings = Surroundings(LocalMapper(workers), workers, None, plan, Path(folder))
        for part in quantize_model(RandomSource(config), windows, recipe, surroundings):
            report(part)
            errors.append(part.relative_error)
    seconds = time.perf_counter() - start
    return Rehearsal(plan.is_lean, plan.expected_bytes, peak_bytes(), seconds, max(errors))
