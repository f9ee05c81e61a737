"""Quantizes linears that share their input: damping by held-out error, correction, then the method.

Knows moments and weights, no model and no activations. A job is self-contained and picklable, so
that any machine can run it.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from vqllm.quantization.base import MethodOptions, QuantizedLinear
from vqllm.quantization.correction import corrected
from vqllm.quantization.hessian import BLOCKED_FROM, HessianFactor, factorize
from vqllm.quantization.mappers import Mapper
from vqllm.quantization.methods import method_of
from vqllm.quantization.moments import Moments, MomentSums
from vqllm.quantization.workers import Workers

Factors = Mapping[float, HessianFactor]

TRIAL_ROWS = 128
_GRAM_COLUMNS = 4096
_TRIAL_RUN = 16  # neighbouring rows of a trial, a multiple of every vector length


@dataclass(frozen=True)
class LinearTask:
    """A linear to quantize: its weight (out, in) float32 and how."""

    weight: Tensor
    options: MethodOptions


@dataclass(frozen=True)
class LinearResult:
    """A finished linear.

    Attributes:
        relative_error: tr(D H D') / tr(W H W') for the rounding error D against the corrected
            weight W: what the codes lose of the outputs, squared.
        damping: what was added to the diagonal of the hessian, as part of its mean.
    """

    linear: QuantizedLinear
    relative_error: float
    damping: float


@dataclass(frozen=True)
class GroupQuantizer:
    """Quantizes the linears of one input after the other.

    Attributes:
        alpha: strength of the correction.
        dampings: parts of the mean hessian diagonal to choose from.
        mapper: where the jobs run.
        workers: of this process, for what comes before the jobs.
    """

    alpha: float
    dampings: tuple[float, ...]
    mapper: Mapper
    workers: Workers = field(default_factory=Workers)

    def run(self, tasks: Mapping[str, LinearTask], sums: MomentSums) -> dict[str, LinearResult]:
        """Results by part.

        With several dampings each linear gets the one with the smallest held-out output error.

        Raises:
            CalibrationError: the hessian is not finite or cannot be factored.
            UnsupportedModel: the weights exceed what the format can express.
        """
        chosen = self._chosen_dampings(tasks, sums)
        moments = sums.merged()
        hessian = moments.hessian.total
        diagonal = hessian.diagonal().clone()
        results: dict[str, LinearResult] = {}
        for dampings in _shared_rounds(sorted(set(chosen.values())), hessian):
            hessian.diagonal().copy_(diagonal)
            factors = self._factors(hessian, dampings, overwrite=len(hessian) >= BLOCKED_FROM)
            parts = [part for part in tasks if chosen[part] in dampings]

            def job(part: str, factors: Factors = factors) -> _Job:
                return self._job(part, tasks[part], moments, factors, chosen[part])

            jobs = list(self.workers.map(job, parts))
            if len(results) + len(parts) == len(tasks):
                moments.cross = None  # as large as a weight in float64
            for part, (linear, error) in zip(
                parts, self.mapper.map(_run, factors, jobs), strict=True
            ):
                results[part] = LinearResult(linear, error, chosen[part])
        return results

    def _factors(self, hessian: Tensor, dampings: Sequence[float], overwrite: bool) -> Factors:
        found = self.workers.map(partial(factorize, hessian, overwrite=overwrite), dampings)
        return dict(zip(dampings, found, strict=True))

    def _chosen_dampings(
        self, tasks: Mapping[str, LinearTask], sums: MomentSums
    ) -> dict[str, float]:
        """The best damping of every linear, judged on a sample of its rows.

        Rows of a weight do not meet in the objective, so a sample ranks dampings at a part of the
        cost.
        """
        if sums.held_out is None or len(self.dampings) == 1:
            return dict.fromkeys(tasks, self.dampings[0])
        training, held_out = sums.training.hessian.total, sums.held_out.hessian.total
        errors: list[float] = []
        for dampings in _shared_rounds(self.dampings, training):
            factors = self._factors(training, dampings, overwrite=False)

            def trial(pair: tuple[float, str], factors: Factors = factors) -> _Trial:
                return self._trial(pair[1], tasks[pair[1]], sums, factors, pair[0])

            trials = list(self.workers.map(trial, itertools.product(dampings, tasks)))
            errors += self.mapper.map(_trial_error, (factors, held_out), trials)
        by_damping = torch.tensor(errors, dtype=torch.float64).view(len(self.dampings), -1)
        best = by_damping.argmin(0).tolist()
        return {part: self.dampings[index] for part, index in zip(tasks, best, strict=True)}

    def _job(
        self,
        part: str,
        task: LinearTask,
        moments: Moments,
        factors: Factors,
        damping: float,
        rows: slice | Tensor = slice(None),
    ) -> _Job:
        """The weight, or rows of it, moved towards the full-precision outputs."""
        cross = moments.cross_of(part, rows)
        if cross is None or not self.alpha:
            return _Job(task.weight[rows], task.options, damping)
        target = corrected(task.weight[rows], cross, factors[damping], self.alpha)
        return _Job(target, task.options, damping)

    def _trial(
        self, part: str, task: LinearTask, sums: MomentSums, factors: Factors, damping: float
    ) -> _Trial:
        rows = _sampled_rows(task.weight.shape[0])
        held_out = None if sums.held_out is None else sums.held_out.cross_of(part, rows)
        job = self._job(part, task, sums.training, factors, damping, rows)
        return _Trial(
            job, task.weight[rows], None if held_out is None else 2 * self.alpha * held_out
        )


@dataclass(frozen=True)
class _Job:
    """What to round to codes: a target (out, in) float32, and the damping of its hessian."""

    weight: Tensor
    options: MethodOptions
    damping: float


@dataclass(frozen=True)
class _Trial:
    """Sampled rows of a linear.

    Attributes:
        weight: (n, in) as they are, without the correction.
        pull: (n, in) float64, 2 alpha times the held-out cross moment, or None.
    """

    job: _Job
    weight: Tensor
    pull: Tensor | None


def _shared_rounds(dampings: Sequence[float], hessian: Tensor) -> list[Sequence[float]]:
    """Dampings whose factors are in memory together: all of a small hessian, one of a large."""
    if len(hessian) < BLOCKED_FROM:
        return [dampings]
    return [(damping,) for damping in dampings]


def _run(factors: Factors, job: _Job) -> tuple[QuantizedLinear, float]:
    linear = _quantized(factors, job)
    return linear, _relative_error(job.weight, linear, factors[job.damping].hessian)


def _quantized(factors: Factors, job: _Job) -> QuantizedLinear:
    quantize = method_of(job.options.method).quantize
    linear: QuantizedLinear = quantize(job.weight, factors[job.damping], job.options)
    return linear


def _relative_error(target: Tensor, linear: QuantizedLinear, hessian: Tensor) -> float:
    difference = torch.from_numpy(linear.dequantize()).sub_(target)
    error, signal = 0.0, 0.0
    for start in range(0, len(hessian), _GRAM_COLUMNS):
        columns = slice(start, start + _GRAM_COLUMNS)
        gram = hessian[:, columns].float()
        error += ((difference @ gram) * difference[:, columns]).sum().item()
        signal += ((target @ gram) * target[:, columns]).sum().item()
    return error / signal if signal > 0 else 0.0


def _sampled_rows(num_rows: int) -> Tensor:
    """Runs of neighbouring rows, evenly spread, TRIAL_ROWS in all; every row of a small weight."""
    if num_rows <= TRIAL_ROWS:
        return torch.arange(num_rows)
    num_runs = TRIAL_ROWS // _TRIAL_RUN
    starts = torch.arange(num_runs) * (num_rows // _TRIAL_RUN) // num_runs * _TRIAL_RUN
    return (starts[:, None] + torch.arange(_TRIAL_RUN)).flatten()


def _trial_error(shared: tuple[Factors, Tensor], trial: _Trial) -> float:
    """|(Q - W) Xq - alpha W (Xfp - Xq)|^2 over held-out rows, up to a constant."""
    factors, hessian = shared
    linear = _quantized(factors, trial.job)
    difference = torch.from_numpy(linear.dequantize()).double() - trial.weight
    error = ((difference @ hessian) * difference).sum()
    if trial.pull is not None:
        error -= (difference * trial.pull).sum()
    return float(error)
