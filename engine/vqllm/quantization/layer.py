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
from vqllm.quantization.moments import Moments, MomentSums

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
            jobs = [self._job(part, tasks[part], moments, factor) for part in parts]
            if len(results) + len(parts) == len(tasks):
                moments.cross = None  # as large as a weight in float64
            for part, (linear, error) in zip(
                parts, self.mapper.map(_run, factor, jobs), strict=True
            ):
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
        errors = []
        for damping in self.dampings:
            factor = factorize(sums.training.hessian.total, damping)
            trials = [self._trial(part, task, sums, factor) for part, task in tasks.items()]
            errors.append(self.mapper.map(_trial_error, (factor, held_out), trials))
        best = torch.tensor(errors, dtype=torch.float64).argmin(0).tolist()
        return {part: self.dampings[index] for part, index in zip(tasks, best, strict=True)}

    def _job(
        self,
        part: str,
        task: LinearTask,
        moments: Moments,
        factor: HessianFactor,
        rows: slice | Tensor = slice(None),
    ) -> LinearTask:
        """The weight, or rows of it, moved towards the full-precision outputs."""
        cross = moments.cross_of(part, rows)
        if cross is None or not self.alpha:
            return LinearTask(task.weight[rows], task.options)
        target = corrected(task.weight[rows], cross, factor, self.alpha)
        return LinearTask(target, task.options)

    def _trial(
        self, part: str, task: LinearTask, sums: MomentSums, factor: HessianFactor
    ) -> _Trial:
        rows = _sampled_rows(task.weight.shape[0])
        held_out = None if sums.held_out is None else sums.held_out.cross_of(part, rows)
        job = self._job(part, task, sums.training, factor, rows)
        return _Trial(
            job, task.weight[rows], None if held_out is None else 2 * self.alpha * held_out
        )


@dataclass(frozen=True)
class _Trial:
    """Sampled rows of a linear.

    Attributes:
        weight: (n, in) as they are, without the correction.
        pull: (n, in) float64, 2 alpha times the held-out cross moment, or None.
    """

    job: LinearTask
    weight: Tensor
    pull: Tensor | None


def _run(factor: HessianFactor, job: LinearTask) -> tuple[QuantizedLinear, float]:
    linear = _quantized(factor, job)
    return linear, _relative_error(job.weight, linear, factor.hessian)


def _quantized(factor: HessianFactor, job: LinearTask) -> QuantizedLinear:
    quantize = method_of(job.options.method).quantize
    linear: QuantizedLinear = quantize(job.weight, factor, job.options)
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


def _trial_error(shared: tuple[HessianFactor, Tensor], trial: _Trial) -> float:
    """|(Q - W) Xq - alpha W (Xfp - Xq)|^2 over held-out rows, up to a constant."""
    factor, hessian = shared
    linear = _quantized(factor, trial.job)
    difference = torch.from_numpy(linear.dequantize()).double() - trial.weight
    error = ((difference @ hessian) * difference).sum()
    if trial.pull is not None:
        error -= (difference * trial.pull).sum()
    return float(error)
