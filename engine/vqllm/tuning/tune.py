"""Distillation of a quantized model from its original: AdamW over scales, codebooks and norms.

Codes, permutations and the embedding stay. Some windows of the text are kept back: tuned
parameters, rounded to the stored precision, are taken only if they bring the student closer to the
teacher there, so that tuning never makes a model worse by that measure.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vqllm.calibration import Windows
from vqllm.decoder.block import forward_block
from vqllm.decoder.rope import RotaryTable
from vqllm.decoder.weights import BlockWeights
from vqllm.errors import CalibrationError, InvalidConfig
from vqllm.output_head import OutputHead
from vqllm.quantization.base import QuantizedLinear
from vqllm.quantization.memory import trim_heap
from vqllm.quantization.workers import Workers, one_thread_each
from vqllm.sources import WeightSource
from vqllm.tuning.loss import divergence
from vqllm.tuning.student import Linears, Student, check_tunable

Norms = dict[str, NDArray[np.float32]]
Block = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class TuningConfig:
    """How to tune.

    Attributes:
        steps: of the optimizer; 0 changes nothing.
        batch_windows: windows per step.
        micro_windows: windows that are in memory at a time.
        learning_rate: of the relative change of a parameter.
        warmup: part of the steps over which the rate rises; then it falls along a cosine.
        bound: largest relative change of a parameter.
        max_norm: gradients longer than this are shortened.
        validation_windows: kept back to judge by, spread over the text.
        recompute: compute a block's activations again instead of keeping them.
        dtype: of the products with weights.
        device: where to run.
        seed: of the order of the windows.

    Raises:
        InvalidConfig: a value is outside its range.
    """

    steps: int = 100
    batch_windows: int = 4
    micro_windows: int = 1
    learning_rate: float = 3e-3
    warmup: float = 0.1
    bound: float = 0.5
    max_norm: float = 1.0
    validation_windows: int = 8
    recompute: bool = False
    dtype: torch.dtype = torch.bfloat16
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        for field in ("batch_windows", "micro_windows", "validation_windows"):
            if getattr(self, field) < 1:
                raise InvalidConfig(field, getattr(self, field), "at least 1")
        if self.steps < 0:
            raise InvalidConfig("steps", self.steps, "0 or more")
        for field in ("learning_rate", "bound", "max_norm"):
            if not getattr(self, field) > 0:
                raise InvalidConfig(field, getattr(self, field), "a positive number")
        if not 0 <= self.warmup < 1:
            raise InvalidConfig("warmup", self.warmup, "a number in [0, 1)")

    def rate(self, step: int) -> float:
        """Learning rate at a step, counted from 0."""
        rising = self.warmup * self.steps
        if step < rising:
            return self.learning_rate * (step + 1) / (rising + 1)
        part = (step - rising) / max(self.steps - rising, 1)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * part))


@dataclass(frozen=True)
class TuningStep:
    """Progress: which step is done, and its KL (nats per token) on the windows it used."""

    step: int
    divergence: float


@dataclass(frozen=True)
class TuningResult:
    """What tuning made.

    Attributes:
        linears: by full name; the given ones where tuning did not help.
        norms: (d,) float32 by name in the file; empty where tuning did not help.
        before, after: KL (nats per token) on the windows kept back, of the given model and of
            `linears` with `norms`.
        accepted: whether tuned parameters were taken.
    """

    linears: dict[str, QuantizedLinear]
    norms: Norms
    before: float
    after: float
    accepted: bool


Report = Callable[[TuningStep], None]


def _ignore(step: TuningStep) -> None:
    """The report of callers who want none."""


def tune(
    source: WeightSource,
    linears: Linears,
    windows: Windows,
    config: TuningConfig,
    report: Report = _ignore,
    workers: Workers | None = None,
) -> TuningResult:
    """Bring the model with the quantized `linears` closer to `source`.

    Args:
        source: the model in full precision, transformed as it was for quantization.
        linears: by full name; those left out stay in full precision.
        windows: tokens (num_windows, window_length), none of them used for a test.
        workers: share out the windows; the result does not depend on how many there are.

    Raises:
        CalibrationError: there are too few windows.
        UnsupportedModel: a linear is none of the model's or of a method that cannot be tuned.
    """
    check_tunable(linears, source)
    _check_windows(windows, config)
    with one_thread_each():
        return _tune(source, linears, windows, config, report, workers or Workers())


def _tune(
    source: WeightSource,
    linears: Linears,
    windows: Windows,
    config: TuningConfig,
    report: Report,
    workers: Workers,
) -> TuningResult:
    kept_back = np.arange(config.validation_windows) * len(windows) // config.validation_windows
    order = _order(np.setdiff1d(np.arange(len(windows)), kept_back), config)
    head = OutputHead.of(source, config.dtype, config.device)
    chosen = np.concatenate([kept_back, np.unique(order)])
    frames = _Frames(source, linears)
    judge = _Judge(head, _Targets(frames, head, windows, chosen, workers), config.dtype, workers)
    student = Student(frames, linears, head, config.recompute, workers)
    run = _Run(student, judge, config, workers)
    before = judge.validate(student, kept_back)
    for step in range(config.steps):
        rows = order[step * config.batch_windows : (step + 1) * config.batch_windows]
        report(TuningStep(step + 1, run.step(step, rows)))
    tuned, norms = student.tuned_linears(), student.tuned_norms()
    del student, run  # the one of the stored values takes as much memory
    reloaded = Student(frames, tuned, head, False, workers)
    for name, norm in reloaded.norms.items():
        norm.start_at(norms[name])
    after = judge.validate(reloaded, kept_back)
    if not after < before:
        return TuningResult(dict(linears), {}, before, before, accepted=False)
    return TuningResult(tuned, norms, before, after, accepted=True)


def _check_windows(windows: Windows, config: TuningConfig) -> None:
    if len(windows) <= config.validation_windows:
        raise CalibrationError(
            f"tuning keeps {config.validation_windows} windows back to judge by and got "
            f"{len(windows)} in all; use a longer text or shorter windows"
        )


def _order(windows: NDArray[np.int64], config: TuningConfig) -> NDArray[np.int64]:
    """Windows in the order of use, every one once before any twice."""
    rng = np.random.default_rng(config.seed)
    needed = config.steps * config.batch_windows
    epochs = [rng.permutation(windows) for _ in range(-(-needed // len(windows)))]
    return np.concatenate([np.empty(0, np.int64), *epochs])[:needed]


def _mixed(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Attention and rotations in `dtype` as well, where that is a short one."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


class _Frames:
    """A source that is read once: afterwards its blocks come without the linears to be tuned."""

    def __init__(self, source: WeightSource, linears: Linears) -> None:
        self._source, self._linears = source, linears
        self._frames: dict[int, BlockWeights] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def block(self, layer: int) -> BlockWeights:
        """The block with all its linears the first time, then without those to be tuned."""
        if layer in self._frames:
            return replace(self._frames[layer])
        weights, prefix = self._source.block(layer), f"model.layers.{layer}."
        kept = {p: w for p, w in weights.linears.items() if prefix + p not in self._linears}
        self._frames[layer] = replace(weights, linears=kept)
        return weights


class _Targets:
    """What the teacher's output projection reads, computed once, block by block."""

    def __init__(
        self,
        source: WeightSource,
        head: OutputHead,
        windows: Windows,
        chosen: NDArray[np.int64],
        workers: Workers,
    ) -> None:
        """`chosen` are the indices of the windows that will be asked for."""
        self._place = {int(index): place for place, index in enumerate(chosen)}
        self._tokens = torch.from_numpy(windows[chosen])
        device, dtype = head.table.device, head.table.dtype
        rotary = RotaryTable.build(source.config, windows.shape[1], device)

        def advance(row: Tensor, block: Block) -> None:
            with _mixed(device, dtype):  # a setting of every thread for itself
                row.copy_(block(row.to(device)))

        with torch.no_grad():
            self._normed = source.embed(self._tokens).clone()
            rows = torch.split(self._normed, 2)
            for weights in workers.map(source.block, range(source.config.num_layers)):
                weights.to(device, dtype)
                forward = partial(
                    forward_block, weights=weights, config=source.config, rotary=rotary
                )
                workers.run(partial(advance, block=forward), rows)
                trim_heap()
            workers.run(partial(advance, block=head.normed), rows)
        # The projection reads them in its own precision: kept in it they are half as large.
        self._normed = self._normed.to(dtype)

    def tokens(self, index: int) -> Tensor:
        """Tokens (t,) of a window."""
        return self._tokens[self._place[index]]

    def normed(self, index: int) -> Tensor:
        """(t, d) in the dtype of the output projection."""
        return self._normed[self._place[index]]


class _Judge:
    """Tells how far a student is from the teacher."""

    def __init__(
        self, head: OutputHead, targets: _Targets, dtype: torch.dtype, workers: Workers
    ) -> None:
        self._head, self._targets, self._dtype, self._workers = head, targets, dtype, workers

    def divergence(self, student: Student, rows: NDArray[np.int64]) -> Tensor:
        """Mean KL per token of some windows."""
        tokens = torch.stack([self._targets.tokens(int(row)) for row in rows])
        teacher = torch.cat([self._targets.normed(int(row)) for row in rows])
        with _mixed(self._head.table.device, self._dtype):
            hidden = student.hidden(tokens).flatten(0, 1)
        teacher = teacher.to(hidden.device)
        return divergence(self._head, teacher, hidden, student.final_norm) / len(hidden)

    def validate(self, student: Student, rows: NDArray[np.int64]) -> float:
        """KL per token of some windows, one by one and without gradients."""
        student.begin()
        with torch.no_grad():
            found = self._workers.map(partial(self.divergence, student), rows[:, None])
            total = sum(map(float, found))
        trim_heap()
        return total / len(rows)


class _Run:
    """A student on its way."""

    def __init__(
        self, student: Student, judge: _Judge, config: TuningConfig, workers: Workers
    ) -> None:
        self._student, self._judge, self._workers = student, judge, workers
        self._config = config
        self._changes = [tunable.change for tunable in student.tunables]
        self._optimizer = torch.optim.AdamW(
            self._changes, lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0
        )

    def step(self, step: int, rows: NDArray[np.int64]) -> float:
        """One step on the given windows; returns their KL per token before it."""
        self._optimizer.zero_grad()
        self._student.begin()
        total = self._collect(rows)
        self._student.finish()
        torch.nn.utils.clip_grad_norm_(self._changes, self._config.max_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = self._config.rate(step)
        self._optimizer.step()
        with torch.no_grad():
            for change in self._changes:
                change.clamp_(-self._config.bound, self._config.bound)
        return total

    def _collect(self, rows: NDArray[np.int64]) -> float:
        """Sum the gradients of some windows, in their order; returns their KL per token."""
        size = self._config.micro_windows
        parts = [rows[start : start + size] for start in range(0, len(rows), size)]
        leaves, total = self._student.leaves, 0.0
        work = partial(self._gradients, leaves=leaves, num_windows=len(rows))
        for loss, gradients in self._workers.map(work, parts):
            total += loss
            for leaf, gradient in zip(leaves, gradients, strict=True):
                if gradient is not None:
                    leaf.grad = gradient if leaf.grad is None else leaf.grad.add_(gradient)
            trim_heap()  # threads keep what they freed to themselves
        return total

    def _gradients(
        self, rows: NDArray[np.int64], leaves: list[Tensor], num_windows: int
    ) -> tuple[float, tuple[Tensor | None, ...]]:
        """The part of some windows in the mean KL of a step, and its gradients.

        None for parameters inside of a core: `finish` gives them theirs.
        """
        loss = self._judge.divergence(self._student, rows) * (len(rows) / num_windows)
        return float(loss.detach()), torch.autograd.grad(loss, leaves, allow_unused=True)
