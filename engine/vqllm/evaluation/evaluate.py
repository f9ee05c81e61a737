"""One model folder against its reference on one text: the numbers of `vqllm evaluate`.

The folder is opened anew from disk and runs through an executor, so what is scored is what the
file holds. Knows no terminal and no quantization method.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vqllm.checkpoint import Checkpoint
from vqllm.errors import EvaluationError
from vqllm.evaluation.perplexity import (
    PairedScores,
    PerToken,
    TokenScores,
    compare_windows,
    score_windows,
)
from vqllm.evaluation.sizes import Sizes, measure_sizes
from vqllm.evaluation.statistics import bootstrap_mean, ratio_interval
from vqllm.evaluation.tasks import Item, read_task
from vqllm.evaluation.windows import EvaluationText, WindowConfig, read_windows
from vqllm.evaluation.zeroshot import TaskScores, score_task
from vqllm.runtime.engine import EngineConfig
from vqllm.runtime.executors.base import Executor
from vqllm.runtime.loading import make_executor
from vqllm.runtime.tokenizer import ChatTokenizer

REFERENCE_EXECUTOR = "torch"
TASK_CONTEXT = 1024  # tokens of a question and an answer


@dataclass(frozen=True)
class EvaluationOptions:
    """What to score and through what.

    Attributes:
        text: UTF-8 file; None is the text of the package.
        windows: which windows of it.
        executor: runs the model; the reference always runs in `torch`, float32.
        num_threads: threads of a matrix product; 0 leaves it to the library.
    """

    text: Path | None = None
    windows: WindowConfig = field(default_factory=WindowConfig)
    executor: str = REFERENCE_EXECUTOR
    num_threads: int = 0


@dataclass(frozen=True)
class Evaluation:
    """A scored folder, with what is needed to say what was measured.

    Attributes:
        model: name of the folder.
        method: as the folder tells it, `none` for an unquantized one.
        executor: what ran it.
        sizes: bytes and bits.
        text: the windows.
        scores: per token; `PairedScores` where there was a reference.
        seconds: wall clock of scoring, loading excluded.
    """

    model: str
    method: str
    executor: str
    sizes: Sizes
    text: EvaluationText
    scores: TokenScores
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Every number of the report, fit for JSON; those of a missing reference are absent."""
        facts = {"model": self.model, "method": self.method, "executor": self.executor}
        return {
            **facts,
            **summarize(self.scores),
            **asdict(self.sizes),
            "tokens": self.text.num_predicted,
            "windows": self.text.windows.shape[0],
            "window_length": self.text.windows.shape[1],
            "selection": self.text.selection,
            "text": self.text.name,
            "text_sha256": self.text.sha256,
            "seconds": round(self.seconds, 3),
        }


def summarize(scores: TokenScores) -> dict[str, float]:
    """Perplexity of scores, and the distances to the reference where they hold one."""
    perplexity = math.exp(scores.nll.mean(dtype=np.float64))
    if not isinstance(scores, PairedScores):
        return {"perplexity": perplexity}
    reference = math.exp(scores.reference_nll.mean(dtype=np.float64))
    return {
        "perplexity": perplexity,
        "reference_perplexity": reference,
        **_ratio(scores, perplexity / reference),
        **_divergence(scores),
        **_agreement(scores),
    }


def _ratio(scores: PairedScores, ratio: float) -> dict[str, float]:
    interval = ratio_interval(scores.nll.mean(axis=1), scores.reference_nll.mean(axis=1))
    return {"ratio": ratio, "ratio_low": interval.low, "ratio_high": interval.high}


def _divergence(scores: PairedScores) -> dict[str, float]:
    interval = bootstrap_mean(scores.kl.mean(axis=1))
    return {
        "mean_kl": float(scores.kl.mean(dtype=np.float64)),
        "mean_kl_low": interval.low,
        "mean_kl_high": interval.high,
        "median_kl": float(np.median(scores.kl)),
        "p99_kl": float(np.percentile(scores.kl, 99)),
    }


def _agreement(scores: PairedScores) -> dict[str, float]:
    """Top-1 agreement, flips, and the root mean square change of the token's probability."""
    change = _probability(scores.nll) - _probability(scores.reference_nll)
    interval = bootstrap_mean(scores.agrees.mean(axis=1))
    return {
        "top1_agreement": float(scores.agrees.mean()),
        "top1_agreement_low": interval.low,
        "top1_agreement_high": interval.high,
        "flips": float(scores.flips.mean()),
        "rms_probability_change": float(np.sqrt((change**2).mean())),
    }


def _probability(nll: PerToken) -> NDArray[np.float64]:
    return np.exp(-nll.astype(np.float64))


def evaluate_folder(
    folder: Path,
    reference: Path | None,
    options: EvaluationOptions,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Score a folder, beside a reference folder where one is given.

    `report(done, total)` counts windows.

    Raises:
        EvaluationError: the text is too short or unreadable, a window longer than the context, or
            the two vocabularies differ.
        UnknownModel, UnsupportedModel, CorruptCheckpoint, ExecutorUnavailable: a folder cannot
            be run.
    """
    checkpoint = Checkpoint(folder)
    tokenizer = ChatTokenizer.from_folder(folder)
    text = read_windows(tokenizer, options.text, options.windows)
    runner = open_executor(checkpoint, options.executor, options)
    other = None
    if reference is not None:
        other = open_executor(Checkpoint(reference), REFERENCE_EXECUTOR, options)
    count = _Counter(len(text.windows), report)
    start = time.perf_counter()
    if other is None:
        scores = score_windows(runner, text.windows, count)
    else:
        scores = compare_windows(runner, other, text.windows, count)
    return Evaluation(
        model=folder.resolve().name,
        method=checkpoint.info().method,
        executor=runner.name,
        sizes=measure_sizes(checkpoint),
        text=text,
        scores=scores,
        seconds=time.perf_counter() - start,
    )


@dataclass(frozen=True)
class TaskOptions:
    """Which zero-shot tasks to answer.

    Attributes:
        folder: local copies of the tasks, see `vqllm.evaluation.tasks`.
        names: which of them.
        limit: first items of each; 0 is all.
    """

    folder: Path
    names: tuple[str, ...]
    limit: int = 0


def evaluate_tasks(
    folder: Path,
    reference: Path | None,
    tasks: TaskOptions,
    options: EvaluationOptions,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, dict[str, Any]]:
    """Accuracies by task, beside a reference folder where one is given.

    `report(done, total)` counts questions of one model and task.

    Raises:
        EvaluationError: a task is unknown, missing or not in its official layout.
        VqllmError: a folder cannot be run.
    """
    items = read_items(tasks)
    ours = _answer(folder, options.executor, items, options, report)
    theirs: dict[str, TaskScores] = {}
    if reference is not None:
        theirs = _answer(reference, REFERENCE_EXECUTOR, items, options, report)
    return {name: scores.to_dict(theirs.get(name)) for name, scores in ours.items()}


def read_items(tasks: TaskOptions) -> dict[str, list[Item]]:
    """The questions of every task that is asked for.

    Raises:
        EvaluationError: a task is unknown, missing or not in its official layout.
    """
    items = {name: read_task(tasks.folder, name) for name in tasks.names}
    return {name: every[: tasks.limit or None] for name, every in items.items()}


def _answer(
    folder: Path,
    executor: str,
    items: dict[str, list[Item]],
    options: EvaluationOptions,
    report: Callable[[int, int], None],
) -> dict[str, TaskScores]:
    checkpoint, tokenizer = Checkpoint(folder), ChatTokenizer.from_folder(folder)
    length = min(checkpoint.config.context_length, TASK_CONTEXT)
    windows = WindowConfig(length)
    runner = open_executor(checkpoint, executor, replace(options, windows=windows))
    result = {}
    for name, questions in items.items():
        counter = _Counter(len(questions), report)
        result[name] = score_task(runner, tokenizer, questions, length, counter)
    return result


class _Counter:
    """Counts calls and reports them."""

    def __init__(self, total: int, report: Callable[[int, int], None]) -> None:
        self._done, self._total, self._report = 0, total, report

    def __call__(self) -> None:
        self._done += 1
        self._report(self._done, self._total)


def open_executor(checkpoint: Checkpoint, name: str, options: EvaluationOptions) -> Executor:
    """An executor with room for one window.

    Raises:
        EvaluationError: a window is longer than the model's context.
        ExecutorUnavailable, CorruptCheckpoint: it cannot be loaded.
    """
    length, context = options.windows.window_length, checkpoint.config.context_length
    if length > context:
        raise EvaluationError(
            f"windows of {length} tokens exceed the context of {context} of {checkpoint.folder}; "
            "use a smaller --window-length"
        )
    config = EngineConfig(max_num_sequences=1, context_length=length)
    return make_executor(checkpoint, name, config, options.num_threads)
