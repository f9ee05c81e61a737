"""Quantizing in three calls from Python; the command line uses the same ones.

quantizer = AutoQuantizer.from_pretrained("path/to/folder")
quantizer.quantize(method="tcq", bpw=2.25)
quantizer.save_pretrained("path/to/quantized")
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from vqllm.calibration import CalibrationConfig, calibration_windows, tuning_windows
from vqllm.checkpoint import Checkpoint
from vqllm.errors import VqllmError
from vqllm.fetch import SOURCES, default_cache, fetch
from vqllm.quantization.artefacts import WorkFolder
from vqllm.quantization.job import Norms, QuantizeJob, TuningReport
from vqllm.quantization.mappers import LocalMapper, Mapper
from vqllm.quantization.memory import plan_memory
from vqllm.quantization.parts import QuantizedPart
from vqllm.quantization.pipeline import Surroundings
from vqllm.quantization.presets import QuantizeConfig
from vqllm.quantization.recipe import Recipe
from vqllm.quantization.sensitivity import MeasuringReport, no_report
from vqllm.quantization.workers import Workers
from vqllm.runtime.tokenizer import ChatTokenizer
from vqllm.sources import PlainSource
from vqllm.tuning.tune import TuningStep

Report = Callable[[QuantizedPart], None]


def _ignore(part: QuantizedPart) -> None:
    """The report of callers who want none."""


def _ignore_step(step: TuningStep) -> None:
    """The same for tuning."""


class Hub(Protocol):
    """What `push_to_hub` needs of a hub client; `huggingface_hub.HfApi` is one."""

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> Any: ...

    def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> Any: ...


@dataclass(frozen=True)
class RunOptions:
    """How to run, which does not change the result.

    Attributes:
        resume: go on with an unfinished run of the same settings; else start over.
        max_memory: bytes that must not be exceeded, or None.
        workers: threads of this process that share the work.
        mapper: where linears are quantized; None is on the workers.
        report: called with every finished linear.
        report_tuning: called after every step of tuning.
        report_measuring: called after every block, forwards and backwards, where a bit budget
            has the linears' sensitivities measured first.
    """

    resume: bool = True
    max_memory: int | None = None
    workers: Workers = field(default_factory=lambda: Workers(0))
    mapper: Mapper | None = None
    report: Report = _ignore
    report_tuning: TuningReport = _ignore_step
    report_measuring: MeasuringReport = no_report


class AutoQuantizer:
    """Quantizes one Hugging Face folder."""

    def __init__(self, checkpoint: Checkpoint, tokenizer: ChatTokenizer) -> None:
        self.checkpoint = checkpoint
        self._tokenizer = tokenizer
        self._done: _Done | None = None

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

    @property
    def num_blocks(self) -> int:
        return self.checkpoint.config.num_layers

    def quantize(
        self,
        calibration: CalibrationConfig | None = None,
        report: Report = _ignore,
        **settings: Any,
    ) -> AutoQuantizer:
        """Quantize every decoder linear and keep the result in memory.

        `settings` are the fields of `QuantizeConfig`: method, bits, bpw, group_size, preprocess
        and so on. For models whose quantized form does not fit in memory use `quantize_to`.

        Raises:
            InvalidConfig, CalibrationError, CorruptCheckpoint, UnsupportedModel: names the cause.
            OverBudget: the bit budget cannot be met.
        """
        job = self._job(QuantizeConfig(**settings), calibration or CalibrationConfig())
        with Workers(0) as workers:
            recipe, parts = job.recipe(workers), {}
            for part in job.run(recipe, Surroundings(LocalMapper(workers), workers)):
                report(part)
                parts[part.name] = part
            tuned, norms = job.tuned(parts, _ignore_step, workers)
        self._done = _Done(job, recipe, tuned, norms)
        return self

    def save_pretrained(self, target: str | Path) -> Path:
        """Write what `quantize` made as a folder, and return its path.

        Raises:
            VqllmError: nothing was quantized yet, or `target` exists.
        """
        if self._done is None:
            raise VqllmError("nothing to save: call quantize() first")
        done, target = self._done, Path(target)
        done.job.write(target, iter(done.parts.values()), done.recipe, done.norms)
        return target

    def push_to_hub(self, repo_id: str, private: bool = False, hub: Hub | None = None) -> None:
        """Upload what `quantize` made to a repository of the Hugging Face hub.

        Args:
            repo_id: `owner/name`; made where it does not exist.
            hub: client to use; by default one with the credentials that `hf auth login` stored.

        Raises:
            VqllmError: nothing was quantized yet.
            huggingface_hub.errors.HfHubHTTPError: the hub refused.
        """
        if hub is None:
            from huggingface_hub import HfApi

            hub = HfApi()
        with tempfile.TemporaryDirectory() as folder:
            target = self.save_pretrained(Path(folder) / repo_id.rsplit("/", 1)[-1])
            hub.create_repo(repo_id, private=private, exist_ok=True)
            hub.upload_folder(
                repo_id=repo_id, folder_path=str(target), commit_message="Add quantized weights"
            )

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
            OverBudget: neither the bits nor the memory allowed suffice.
            ResumeMismatch, CorruptArtefact: an unfinished run is in the way or damaged.
            DiskFull: finished linears are kept.
        """
        target, options = Path(target), options or RunOptions()
        if target.exists():
            raise VqllmError(f"{target} exists already; remove it or choose another folder")
        job = self._job(config, calibration)
        work = WorkFolder(target, job.key, options.resume)
        recipe = work.recipe(partial(job.recipe, options.workers, options.report_measuring))
        for part in job.run(recipe, self._surroundings(job, recipe, options, work)):
            options.report(part)
        self._complete(job, recipe, work, target, options)
        work.remove()
        return target

    def _complete(
        self, job: QuantizeJob, recipe: Recipe, work: WorkFolder, target: Path, options: RunOptions
    ) -> None:
        parts, norms = work.parts(job.source.linear_names()), Norms()
        if job.config.tune_steps:
            found = {p.name: p for p in parts}
            tuned, norms = job.tuned(found, options.report_tuning, options.workers)
            parts = iter(tuned.values())
        job.write(target, parts, recipe, norms)

    def _surroundings(
        self, job: QuantizeJob, recipe: Recipe, options: RunOptions, work: WorkFolder
    ) -> Surroundings:
        config, shape = self.checkpoint.config, job.windows.shape
        windows, limit = (shape[0], shape[1]), options.max_memory
        memory = plan_memory(config, windows, recipe, limit, options.workers.count)
        workers = options.workers if memory.num_workers > 1 else Workers()
        return Surroundings(
            mapper=options.mapper or LocalMapper(workers),
            workers=workers,
            store=work,
            memory=memory,
            spill=work.path / "spill",
            release=self.checkpoint.store.release,
        )

    def _job(self, config: QuantizeConfig, calibration: CalibrationConfig) -> QuantizeJob:
        PlainSource(self.checkpoint)  # refuses a quantized folder before the text is read
        text = "the default text" if calibration.path is None else f"`{calibration.path.name}`"
        windows = calibration_windows(self._tokenizer, calibration)
        more = tuning_windows(self._tokenizer, calibration) if config.tune_steps else None
        return QuantizeJob(self.checkpoint, config, windows, text, more)


@dataclass(frozen=True)
class _Done:
    """What `quantize` keeps for `save_pretrained`."""

    job: QuantizeJob
    recipe: Recipe
    parts: dict[str, QuantizedPart]
    norms: Norms


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
