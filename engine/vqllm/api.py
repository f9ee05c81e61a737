"""Quantizing in three calls from Python; the command line uses the same ones.

quantizer = AutoQuantizer.from_pretrained("path/to/folder")
quantizer.quantize(bits=4, group_size=128)
quantizer.save_pretrained("path/to/quantized")
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from vqllm.calibration import CalibrationConfig, calibration_windows
from vqllm.checkpoint import Checkpoint, GptqFormat
from vqllm.errors import VqllmError
from vqllm.fetch import SOURCES, default_cache, fetch
from vqllm.quantization.base import GroupedSpec
from vqllm.quantization.gptq import GptqOptions
from vqllm.quantization.pipeline import QuantizedPart, quantize_model
from vqllm.quantization.saving import CheckpointWriter
from vqllm.runtime.tokenizer import ChatTokenizer

Report = Callable[[QuantizedPart], None]


def _ignore(part: QuantizedPart) -> None:
    """The report of callers who want none."""


class AutoQuantizer:
    """Quantizes one Hugging Face folder."""

    def __init__(self, checkpoint: Checkpoint, tokenizer: ChatTokenizer) -> None:
        self.checkpoint = checkpoint
        self._tokenizer = tokenizer
        self._plan: tuple[GptqOptions, CalibrationConfig] | None = None
        self._parts: list[QuantizedPart] | None = None

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
        bits: int = 4,
        group_size: int = 128,
        calibration: CalibrationConfig | None = None,
        report: Report = _ignore,
    ) -> AutoQuantizer:
        """Quantize every decoder linear by GPTQ and keep the result in memory.

        For models whose quantized form does not fit in memory use `quantize_to`.

        Raises:
            InvalidConfig, CalibrationError, CorruptCheckpoint, UnsupportedModel: names the cause.
        """
        self._plan = (
            GptqOptions(GroupedSpec(bits, group_size)),
            calibration or CalibrationConfig(),
        )
        self._parts = list(self._run(*self._plan, report))
        return self

    def save_pretrained(self, target: str | Path) -> Path:
        """Write what `quantize` made as a GPTQ folder, and return its path.

        Raises:
            VqllmError: nothing was quantized yet, or `target` exists.
        """
        if self._parts is None or self._plan is None:
            raise VqllmError("nothing to save: call quantize() first")
        return self._write(Path(target), self._parts, *self._plan)

    def quantize_to(
        self,
        target: str | Path,
        options: GptqOptions,
        calibration: CalibrationConfig,
        report: Report = _ignore,
    ) -> Path:
        """Quantize straight into a folder: parts go to disk in shards as they are made.

        Raises:
            VqllmError: `target` exists; else as `quantize`.
        """
        parts = self._run(options, calibration, report)
        return self._write(Path(target), parts, options, calibration)

    def _run(
        self, options: GptqOptions, calibration: CalibrationConfig, report: Report
    ) -> Iterable[QuantizedPart]:
        windows = calibration_windows(self._tokenizer, calibration)
        for part in quantize_model(self.checkpoint, windows, options):
            report(part)
            yield part

    def _write(
        self,
        target: Path,
        parts: Iterable[QuantizedPart],
        options: GptqOptions,
        calibration: CalibrationConfig,
    ) -> Path:
        text = "the default text" if calibration.path is None else f"`{calibration.path.name}`"
        recipe = (
            f"Up to {calibration.num_windows} windows of {calibration.window_length} tokens of "
            f"{text}; inputs computed with the already quantized layers; damping "
            f"{options.damping:g}."
        )
        form = GptqFormat(options.spec)
        with CheckpointWriter(self.checkpoint, target, form, recipe) as writer:
            for part in parts:
                writer.add(part)
        return target


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
