"""Quantizes linears that share their input: damping by held-out error, correction, then the method.

Knows moments and weights, no model and no activations. A job is self-contained and picklable, so
that any machine can run it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vqllm.quantization.base import MethodOptions, QuantizedLinear
from vqllm.quantization.correction import corrected
from vqllm.quantization.hessian import HessianFactor, factorize
from vqllm.quantization.mappers import Mapper
from vqllm.quantization.methods import method_of
from vqllm.quantization.moments import MomentSums

TRIAL_ROWS = 128
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
    """

    alpha: float
    dampings: tuple[float, ...]
    mapper: Mapper

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
        for damping in sorted(set(chosen.values())):
            hessian.diagonal().copy_(diagonal)
            factor = factorize(hessian, damping, overwrite=True)
            parts = [part for part in tasks if chosen[part] == damping]
            jobs = [self._job(tasks[part], moments.cross_of(part)) for part in parts]
            done = self.mapper.map(_run, factor, jobs)
            for part, (linear, error) in zip(parts, done, strict=True):
                results[part] = LinearResult(linear, error, damping)
        return results

    def _chosen_dampings(
        self, tasks: Mapping[str, LinearTask], sums: MomentSums
    ) -> dict[str, float]:
        """The best damping of every linear, judged on a sample of its rows.

        Rows of a weight do not meet in the objective, so a sample ranks dampings at a part of the
        cost.
        """
        if sums.held_out is None or len(self.dampings) == 1:
            return dict.fromkeys(tasks, self.dampings[0])
        held_out = sums.held_out.hessian.total
        trials = [self._trial(part, task, sums) for part, task in tasks.items()]
        errors = []
        for damping in self.dampings:
            shared = factorize(sums.training.hessian.total, damping), held_out
            errors.append(self.mapper.map(_trial_error, shared, trials))
        best = torch.tensor(errors, dtype=torch.float64).argmin(0).tolist()
        return {part: self.dampings[index] for part, index in zip(tasks, best, strict=True)}

    def _job(self, task: LinearTask, cross: Tensor | None) -> _Job:
        return _Job(task.weight, cross, task.options, self.alpha)

    def _trial(self, part: str, task: LinearTask, sums: MomentSums) -> _Trial:
        rows = _sampled_rows(task.weight.shape[0])
        sampled = LinearTask(task.weight[rows], task.options)
        job = self._job(sampled, sums.training.cross_of(part, rows))
        held_out = None if sums.held_out is None else sums.held_out.cross_of(part, rows)
        return _Trial(job, held_out)


@dataclass(frozen=True)
class _Job:
    weight: Tensor
    cross: Tensor | None
    options: MethodOptions
    alpha: float


@dataclass(frozen=True)
class _Trial:
    """Sampled rows of a job, with the held-out cross moment of the same rows."""

    job: _Job
    held_out: Tensor | None


def _run(factor: HessianFactor, job: _Job) -> tuple[QuantizedLinear, float]:
    target = _target(factor, job)
    linear: QuantizedLinear = method_of(job.options.method).quantize(target, factor, job.options)
    return linear, _relative_error(target, linear, factor.hessian)


def _target(factor: HessianFactor, job: _Job) -> Tensor:
    if job.cross is None:
        return job.weight
    return corrected(job.weight, job.cross, factor, job.alpha)


def _relative_error(target: Tensor, linear: QuantizedLinear, hessian: Tensor) -> float:
    gram = hessian.float()
    difference = torch.from_numpy(linear.dequantize()) - target
    error = ((difference @ gram) * difference).sum().item()
    signal = ((target @ gram) * target).sum().item()
    return error / signal if signal > 0 else 0.0


def _sampled_rows(num_rows: int) -> Tensor:
    """Runs of neighbouring rows, evenly spread, TRIAL_ROWS in all; every row of a small weight."""
    if num_rows <= TRIAL_ROWS:
        return torch.arange(num_rows)
    num_runs = TRIAL_ROWS // _TRIAL_RUN
    starts = torch.arange(num_runs) * (num_rows // _TRIAL_RUN) // num_runs * _TRIAL_RUN
    return (starts[:, None] + torch.arange(_TRIAL_RUN)).flatten()


def _trial_error(shared: tuple[HessianFactor, Tensor], trial: _Trial) -> float:
    """|(Q - W) Xq - alpha W (Xfp - Xq)|^2 over held-out rows, up to a constant."""
    factor, hessian = shared
    job = trial.job
    linear = method_of(job.options.method).quantize(_target(factor, job), factor, job.options)
    difference = torch.from_numpy(linear.dequantize()).double() - job.weight
    error = ((difference @ hessian) * difference).sum()
    if trial.held_out is not None:
        error -= 2 * job.alpha * (difference * trial.held_out).sum()
    return float(error)
