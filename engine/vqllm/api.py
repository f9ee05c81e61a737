"""Quantizing in three calls from Python; the command line uses the same ones.

quantizer = AutoQuantizer.from_pretrained("path/to/folder")
quantizer.quantize(method="gptq", bits=4, group_size=128)
quantizer.save_pretrained("path/to/quantized")
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vqllm.calibration import CalibrationConfig, Windows, calibration_windows
from vqllm.checkpoint import Checkpoint
from vqllm.errors import UnsupportedModel, VqllmError
from vqllm.fetch import SOURCES, default_cache, fetch
from vqllm.quantization.artefacts import WorkFolder
from vqllm.quantization.mapper import LocalMapper, Mapper
from vqllm.quantization.parts import QuantizedPart
from vqllm.quantization.pipeline import quantize_model
from vqllm.quantization.presets import QuantizeConfig, make_recipe
from vqllm.quantization.recipe import Recipe, hash_of
from vqllm.quantization.saving import CheckpointWriter, FolderPlan
from vqllm.runtime.tokenizer import ChatTokenizer
from vqllm.sources import PlainSource, WeightSource

Report = Callable[[QuantizedPart], None]


def _ignore(part: QuantizedPart) -> None:
    """The report of callers who want none."""


@dataclass(frozen=True)
class RunOptions:
    """How to run, which does not change the result.

    Attributes:
        resume: go on with an unfinished run of the same settings; else start over.
        mapper: where linears are quantized.
        report: called with every finished linear.
    """

    resume: bool = True
    mapper: Mapper = field(default_factory=LocalMapper)
    report: Report = _ignore


class AutoQuantizer:
    """Quantizes one Hugging Face folder."""

    def __init__(self, checkpoint: Checkpoint, tokenizer: ChatTokenizer) -> None:
        self.checkpoint = checkpoint
        self._tokenizer = tokenizer
        self._job: _Job | None = None
        self._parts: list[QuantizedPart] = []

    @classmethod
    def from_pretrained(cls, model: str | Path, cache: Path | None = None) -> AutoQuantizer:
        """Open a folder, or a model that `vqllm fetch` knows by name.

        Raises:
            UnknownModel, UnsupportedModel, CorruptCheckpoint, FetchError: it cannot be opened.
        """
        folder = resolve_model(model, cache)
        return cls(Checkpoint(folder), ChatTokenizer.from_folder(folder))

    @property
    def num_linears(self) -> int:
        return len(self.checkpoint.linear_names())

    def quantize(
        self,
        calibration: CalibrationConfig | None = None,
        report: Report = _ignore,
        **settings: Any,
    ) -> AutoQuantizer:
        """Quantize every decoder linear and keep the result in memory.

        `settings` are the fields of `QuantizeConfig`: method, bits, bpw, group_size, ... For
        models whose quantized form does not fit in memory use `quantize_to`.

        Raises:
            InvalidConfig, CalibrationError, CorruptCheckpoint, UnsupportedModel: names the cause.
        """
        if settings.get("bpw") is not None:
            settings.setdefault("bits", None)
        job = self._prepare(QuantizeConfig(**settings), calibration or CalibrationConfig())
        self._parts = []
        for part in job.run(RunOptions(), None):
            report(part)
            self._parts.append(part)
        self._job = job
        return self

    def save_pretrained(self, target: str | Path) -> Path:
        """Write what `quantize` made as a folder, and return its path.

        Raises:
            VqllmError: nothing was quantized yet, or `target` exists.
        """
        if self._job is None:
            raise VqllmError("nothing to save: call quantize() first")
        return self._job.write(Path(target), iter(self._parts))

    def quantize_to(
        self,
        target: str | Path,
        config: QuantizeConfig,
        calibration: CalibrationConfig,
        options: RunOptions | None = None,
    ) -> Path:
        """Quantize straight into a folder; a run that was stopped goes on where it was.

        Finished linears lie in `<target>.partial` until the folder is complete.

        Raises:
            VqllmError: `target` exists; else as `quantize`.
            ResumeMismatch, CorruptArtefact: an unfinished run is in the way or damaged.
            DiskFull: finished linears are kept.
        """
        target, options = Path(target), options or RunOptions()
        if target.exists():
            raise VqllmError(f"{target} exists already; remove it or choose another folder")
        job = self._prepare(config, calibration)
        work = WorkFolder(target, job.key, options.resume)
        for part in job.run(options, work):
            options.report(part)
        job.write(target, work.parts(job.source.linear_names()))
        work.remove()
        return target

    def _prepare(self, config: QuantizeConfig, calibration: CalibrationConfig) -> _Job:
        if self.checkpoint.quantization is not None:
            raise UnsupportedModel(
                f"{self.checkpoint.folder} is quantized already; quantize the original"
            )
        source = PlainSource(self.checkpoint)
        shapes = {name: self.checkpoint.linear_shape(name) for name in source.linear_names()}
        return _Job(
            checkpoint=self.checkpoint,
            source=source,
            windows=calibration_windows(self._tokenizer, calibration),
            recipe=make_recipe(config, shapes),
            config=config,
            text="the default text" if calibration.path is None else f"`{calibration.path.name}`",
        )


@dataclass(frozen=True)
class _Job:
    """Everything a run depends on."""

    checkpoint: Checkpoint
    source: WeightSource
    windows: Windows
    recipe: Recipe
    config: QuantizeConfig
    text: str

    @property
    def key(self) -> dict[str, Any]:
        """What finished linears depend on."""
        return {
            "recipe": self.recipe.to_dict(),
            "preprocess": self.config.preprocess,
            "source": _revision(self.checkpoint),
            "calibration": _hash_of_windows(self.windows),
        }

    def run(self, options: RunOptions, work: WorkFolder | None) -> Iterator[QuantizedPart]:
        return quantize_model(self.source, self.windows, self.recipe, options.mapper, work)

    def write(self, target: Path, parts: Iterator[QuantizedPart]) -> Path:
        plan = FolderPlan(
            recipe=self._sentence(),
            meta=self._facts(),
            transform=self.source.transform.to_dict(),
            others=self.source.other_tensors(),
        )
        with CheckpointWriter(self.checkpoint, target, plan) as writer:
            for part in parts:
                writer.add(part)
        return target

    def _facts(self) -> dict[str, Any]:
        recipe = self.recipe
        return {
            "recipe_hash": hash_of(self.key),
            "calibration_hash": _hash_of_windows(self.windows),
            "calibration_tokens": int(self.windows.size),
            "method": self.config.method,
            "preprocess": self.config.preprocess,
            "alpha": recipe.alpha,
            "dampings": list(recipe.dampings),
            "seed": recipe.seed,
        }

    def _sentence(self) -> str:
        num_windows, length = self.windows.shape
        recipe = self.recipe
        return (
            f"{num_windows} windows of {length} tokens of {self.text}; inputs computed with the "
            f"already quantized layers; correction towards full precision {recipe.alpha:g}; "
            f"damping {', '.join(f'{damping:g}' for damping in recipe.dampings)}."
        )


def _hash_of_windows(windows: Windows) -> str:
    return hash_of([list(windows.shape), hashlib.sha256(windows.tobytes()).hexdigest()])


def _revision(checkpoint: Checkpoint) -> str:
    """16 hexadecimal digits of the source's bytes."""
    digest = hashlib.sha256()
    for path in (checkpoint.folder / "config.json", *checkpoint.store.files):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def resolve_model(model: str | Path, cache: Path | None = None) -> Path:
    """Folder of a model given by path or by a name that `vqllm fetch` knows.

    A known name is fetched on first use.

    Raises:
        UnknownModel: neither a folder nor a known name.
        FetchError: a known model could not be downloaded.
    """
    if Path(model).is_dir() or str(model) not in SOURCES:
        return Path(model)
    return fetch(str(model), cache or default_cache())
