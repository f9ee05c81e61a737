"""Everything a quantized model depends on, gathered before the first weight is touched.

Knows recipes, sources and calibration windows; no codec and no progress bar.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vqllm.calibration import Windows
from vqllm.checkpoint import Checkpoint
from vqllm.outlier.quarot import QuarotOptions, RotatedSource
from vqllm.outlier.smoothquant import SmoothedSource, SmoothOptions
from vqllm.quantization.parts import QuantizedPart
from vqllm.quantization.pipeline import Surroundings, quantize_model
from vqllm.quantization.presets import QuantizeConfig, make_recipe
from vqllm.quantization.recipe import Recipe, hash_of
from vqllm.quantization.saving import CheckpointWriter, FolderPlan
from vqllm.quantization.sensitivity import (
    MeasuringReport,
    SensitivityConfig,
    no_report,
    sensitivities,
)
from vqllm.quantization.workers import Workers
from vqllm.sources import PlainSource, WeightSource
from vqllm.tuning.tune import TuningConfig, TuningStep, tune

TuningReport = Callable[[TuningStep], None]
SMOOTHING_WINDOWS = 8

Norms = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class QuantizeJob:
    """One model, what to make of it, and on which text.

    Attributes:
        text: what the text is called in the model card.
        more_windows: what to tune on; without it the calibration windows.
    """

    checkpoint: Checkpoint
    config: QuantizeConfig
    windows: Windows
    text: str
    more_windows: Windows | None = None

    @cached_property
    def source(self) -> WeightSource:
        """The weights, preprocessed.

        Raises:
            UnsupportedModel: the folder is quantized already, or a size has no rotation.
        """
        plain = PlainSource(self.checkpoint)
        match self.config.preprocessing:
            case "none":
                return plain
            case "quarot":
                return RotatedSource(plain, QuarotOptions(seed=self.config.seed))
            case "quarot-portable":
                return RotatedSource(plain, QuarotOptions(seed=self.config.seed, portable=True))
            case _:
                return self._smoothed(plain)

    def _smoothed(self, plain: WeightSource) -> WeightSource:
        options = SmoothOptions(bits=max(self.config.bits or 4, 2))
        return SmoothedSource.calibrated(plain, self.windows[:SMOOTHING_WINDOWS], options)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of every linear."""
        return {name: self.checkpoint.linear_shape(name) for name in self.source.linear_names()}

    @cached_property
    def key(self) -> dict[str, Any]:
        """What finished linears depend on, fit for JSON; reads the weights once.

        Settings that were not made are left out: a run goes on where a later version has more.
        """
        later = ("tune_steps", "embedding_bits")
        settings = self.config.to_dict().items()
        kept = {name: v for name, v in settings if name not in later and v is not None}
        return {
            "config": {**kept, "preprocess": self.config.preprocessing},
            "source": _revision(self.checkpoint),
            "calibration": self.calibration_hash,
        }

    @property
    def calibration_hash(self) -> str:
        """Of the tokens."""
        digest = hashlib.sha256(np.ascontiguousarray(self.windows).tobytes()).hexdigest()
        return hash_of([list(self.windows.shape), digest])

    def recipe(self, workers: Workers | None = None, report: MeasuringReport = no_report) -> Recipe:
        """Options of every linear; measures sensitivities where there is a bit budget.

        Args:
            report: called after every block that was measured, forwards and then backwards.

        Raises:
            OverBudget: the bit budget cannot be met.
        """
        if self.config.bpw is None:
            return make_recipe(self.config, self.shapes)
        make_recipe(self.config, self.shapes, dict.fromkeys(self.shapes, 1.0))  # fails early
        config = SensitivityConfig(seed=self.config.seed)
        found = sensitivities(self.source, self.windows, config, workers, report)
        return make_recipe(self.config, self.shapes, found)

    def run(self, recipe: Recipe, surroundings: Surroundings) -> Iterator[QuantizedPart]:
        """Quantize; see `quantize_model`."""
        return quantize_model(self.source, self.windows, recipe, surroundings)

    def tuned(
        self, parts: Mapping[str, QuantizedPart], report: TuningReport, workers: Workers
    ) -> tuple[dict[str, QuantizedPart], Norms]:
        """The parts with tuned scales and codebooks, and tuned norms by name in the file."""
        if not self.config.tune_steps:
            return dict(parts), {}
        # Activations of several windows at a time would be more memory than all else together.
        recompute = workers.count > 1
        config = TuningConfig(self.config.tune_steps, recompute=recompute, seed=self.config.seed)
        linears = {name: part.linear for name, part in parts.items()}
        windows = self.windows if self.more_windows is None else self.more_windows

        def release(step: TuningStep) -> None:
            self.checkpoint.store.release()  # pages of the file count as memory
            report(step)

        result = tune(self.source, linears, windows, config, release, workers)
        return {
            name: QuantizedPart(name, result.linears[name], part.relative_error, part.damping)
            for name, part in parts.items()
        }, dict(result.norms)

    def write(
        self, target: Path, parts: Iterator[QuantizedPart], recipe: Recipe, norms: Norms
    ) -> None:
        """Write the folder.

        Raises:
            VqllmError: `target` exists, or the disk is full.
        """
        plan = FolderPlan(
            recipe=self._sentence(recipe),
            meta=self._facts(recipe),
            transform=self.source.transform.to_dict(),
            others={**self.source.other_tensors(), **norms},
            config_changes=self.source.config_changes,
            embedding_bits=self.config.embedding_bits,
        )
        with CheckpointWriter(self.checkpoint, target, plan) as writer:
            for part in parts:
                writer.add(part)

    def _facts(self, recipe: Recipe) -> dict[str, Any]:
        return {
            "method": self.config.method,
            "preprocess": self.config.preprocessing,
            "recipe_hash": recipe.hash,
            "source_revision": self.key["source"],
            "calibration_hash": self.calibration_hash,
            "calibration_tokens": int(self.windows.size),
            "alpha": recipe.alpha,
            "dampings": list(recipe.dampings),
            "seed": recipe.seed,
            "tune_steps": self.config.tune_steps,
        }

    def _sentence(self, recipe: Recipe) -> str:
        num_windows, length = self.windows.shape
        words = [
            f"{num_windows} windows of {length} tokens of {self.text}",
            "inputs computed with the already quantized layers",
        ]
        if recipe.alpha:
            words.append(f"correction towards full-precision activations {recipe.alpha:g}")
        words.append(f"damping among {', '.join(f'{d:g}' for d in recipe.dampings)}")
        if self.config.tune_steps:
            words.append(f"{self.config.tune_steps} steps of tuning of scales and norms")
        return "; ".join(words) + "."


def _revision(checkpoint: Checkpoint) -> str:
    """16 hexadecimal digits of the folder's config and weights."""
    digest = hashlib.sha256()
    for path in (checkpoint.folder / "config.json", *checkpoint.store.files):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]
