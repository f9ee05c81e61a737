"""How much the output of a model suffers from an error in each of its linears, before any is made.

For a small error E in the weights of one linear, the KL divergence of a window's output is half
the Fisher form of E: with G the gradient, by that linear's weights, of the negative log-likelihood
of labels drawn from the model itself,

    KL = 1/2 mean <G, E>^2, G = sum over tokens of the outputs' gradient times the inputs.

Error feedback along the columns (GPTQ, LDLQ) turns rounding errors R, which are white, into
E = R diag(1 / u) U, where U' U is the inverse of the hessian and u its factor's diagonal. A codec
of mean squared error D on weights of unit variance makes errors of variance D s^2 in a row of root
mean square s. So

    KL = D * 1/2 mean sum_rows s^2 |G U' diag(1 / u)|^2,

and one pass through the model gives, per linear, the KL per unit of D; `allocation.py` spends bits
by it.

Works block by block: forwards once, keeping what enters every block, then backwards. Knows no
method.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from vqllm.calibration import Windows
from vqllm.decoder.block import forward_block, trace_block
from vqllm.decoder.rope import RotaryTable
from vqllm.decoder.weights import BlockWeights
from vqllm.errors import CalibrationError, InvalidConfig
from vqllm.output_head import OutputHead
from vqllm.quantization.hessian import Hessian, HessianFactor, factorize
from vqllm.quantization.products import multiply, multiply_rows
from vqllm.quantization.workers import Workers, one_thread_each
from vqllm.sources import WeightSource

BATCH_WINDOWS = 2


MeasuringReport = Callable[[], None]


def no_report() -> None:
    """The report of callers who want none."""


@dataclass(frozen=True)
class SensitivityConfig:
    """How to measure.

    Attributes:
        num_windows: windows of the calibration text that are used, from the first on.
        damping: part of the mean hessian diagonal that is added before factoring.
        dtype: of the products with weights; bfloat16 is good enough and fast where the processor
            multiplies it.
        seed: of the labels.
    """

    num_windows: int = 8
    damping: float = 0.01
    dtype: torch.dtype = torch.bfloat16
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_windows < 1:
            raise InvalidConfig("num_windows", self.num_windows, "at least 1")


def sensitivities(
    source: WeightSource,
    windows: Windows,
    config: SensitivityConfig | None = None,
    workers: Workers | None = None,
    report: MeasuringReport = no_report,
) -> dict[str, float]:
    """KL (nats per token) per unit of distortion of every linear, by full name.

    Args:
        windows: tokens (num_windows, window_length).
        workers: share out the windows; the numbers do not depend on how many there are.
        report: called after every block, twice in all: forwards and backwards.

    Raises:
        CalibrationError: a gradient is not finite; names the linear.
    """
    config, workers = config or SensitivityConfig(), workers or Workers()
    with one_thread_each():
        chosen = windows[: config.num_windows]
        return _Measurement(source, chosen, config, workers, report).run()


class _Measurement:
    """One pass forwards and one backwards through the blocks."""

    def __init__(
        self,
        source: WeightSource,
        windows: Windows,
        config: SensitivityConfig,
        workers: Workers,
        report: MeasuringReport,
    ) -> None:
        self._source, self._config, self._workers = source, config, workers
        self._report = report
        self._tokens = torch.from_numpy(windows)
        self._rotary = RotaryTable.build(source.config, windows.shape[1])

    def run(self) -> dict[str, float]:
        """KL per unit of distortion by full name."""
        entries, hidden = self._forward()
        gradient = self._output_gradients(hidden)
        found: dict[str, float] = {}
        layers = range(self._source.config.num_layers)[::-1]
        for weights in self._workers.map(self._block, layers):
            layer, watch = weights.layer, self._watch(weights, entries.pop(), gradient)
            for part, value in watch.sensitivities(self._config.damping, self._workers).items():
                found[f"model.layers.{layer}.{part}"] = value
            self._report()
        return {name: found[name] for name in self._source.linear_names()}

    def _block(self, layer: int) -> BlockWeights:
        weights = self._source.block(layer)
        weights.to("cpu", self._config.dtype)
        return weights

    def _forward(self) -> tuple[list[Tensor], Tensor]:
        """What enters every block, and what leaves the last one, (windows, t, d) float32."""
        with torch.no_grad():
            hidden, entries = self._source.embed(self._tokens).clone(), []
            layers = range(self._source.config.num_layers)
            for weights in self._workers.map(self._block, layers):  # reads ahead
                entries.append(hidden.clone())

                def advance(row: Tensor, weights: BlockWeights = weights) -> None:
                    row.copy_(forward_block(row, weights, self._source.config, self._rotary))

                self._workers.run(advance, torch.split(hidden, BATCH_WINDOWS))
                self._report()
        return entries, hidden

    def _output_gradients(self, hidden: Tensor) -> Tensor:
        """Gradient of the summed loss of sampled labels by the last hidden states."""
        head = OutputHead.of(self._source, self._config.dtype)
        generator = torch.Generator().manual_seed(self._config.seed)
        points = [torch.rand(hidden.shape[1], 1, generator=generator) for _ in hidden]
        work = zip(hidden, points, strict=True)
        found = self._workers.map(lambda pair: _output_gradient(head, *pair), work)
        return torch.stack(list(found))

    def _watch(self, weights: BlockWeights, entries: Tensor, gradient: Tensor) -> _Watch:
        """Go backwards through a block: `gradient` becomes that by its input."""

        def back(window: int) -> _Watch:
            watch = _Watch(weights)
            states = entries[window : window + 1].requires_grad_()
            with torch.enable_grad():
                output = watch.run(states, self._source, self._rotary)
            (passed,) = torch.autograd.grad(output, states, gradient[window : window + 1])
            gradient[window] = passed[0]
            return watch

        total = _Watch(weights)
        for watch in self._workers.map(back, range(len(entries))):
            total.merge(watch)
        return total


def _output_gradient(head: OutputHead, hidden: Tensor, points: Tensor) -> Tensor:
    """The gradient (t, d) for one window, labels drawn by `points` (t, 1) in [0, 1)."""
    states = hidden.clone().requires_grad_()
    with torch.enable_grad():
        logits = head.project(head.normed(states))
        loss = F.cross_entropy(logits, _draw(logits.detach(), points), reduction="sum")
    (gradient,) = torch.autograd.grad(loss, states)
    return gradient


def _draw(logits: Tensor, points: Tensor) -> Tensor:
    """One label per row of (t, vocab)."""
    sums = logits.softmax(-1).cumsum(-1)
    points = points * sums[:, -1:]
    return torch.searchsorted(sums, points).clamp(max=sums.shape[1] - 1)[:, 0]


class _Watch:
    """One block that keeps the moments of its inputs and its linears' gradients by window."""

    def __init__(self, weights: BlockWeights) -> None:
        self.weights = weights
        self._taken = {part: _Gradients() for part in weights.linears}
        self._hessians: dict[tuple[str, ...], Hessian] = {}
        self._num_tokens = 0

    def run(self, states: Tensor, source: WeightSource, rotary: RotaryTable) -> Tensor:
        """The block's output (1, t, d) for one window; gradients are counted on the way back."""
        self._num_tokens += states.shape[1]
        watched = _WatchedWeights(**vars(self.weights), taken=self._taken)
        trace = trace_block(states, watched, source.config, rotary)
        while True:
            try:
                tap = next(trace)
            except StopIteration as stop:
                output: Tensor = stop.value
                return output
            inputs = tap.inputs.detach().float()
            with torch.no_grad():
                self._hessians.setdefault(tap.parts, Hessian(inputs.shape[-1])).add(inputs)

    def merge(self, other: _Watch) -> None:
        """Count the windows of `other` as well."""
        for parts, hessian in other._hessians.items():
            self._hessians.setdefault(parts, Hessian(len(hessian.total))).merge(hessian)
        for part, gradients in other._taken.items():
            self._taken[part].by_window += gradients.by_window
        self._num_tokens += other._num_tokens

    def sensitivities(self, damping: float, workers: Workers) -> dict[str, float]:
        """KL per token and unit of distortion of every linear of the block."""
        values = [hessian.value for hessian in self._hessians.values()]
        factors = list(workers.map(partial(factorize, damping=damping), values))
        groups = zip(self._hessians, factors, strict=True)
        work = [(part, factor) for parts, factor in groups for part in parts]
        return dict(workers.map(lambda pair: (pair[0], self._of(*pair)), work))

    def _of(self, part: str, factor: HessianFactor) -> float:
        variances = self.weights.linears[part].float().square().mean(1)
        found = 0.5 * self._taken[part].shaped(factor, variances) / self._num_tokens
        if not math.isfinite(found):
            raise CalibrationError(
                f"model.layers.{self.weights.layer}.{part}: its gradient is not finite; the "
                "calibration text drives the model out of range"
            )
        return found


@dataclass
class _Gradients:
    """Gradients (out, in) of one linear's weight, one per window that reached it."""

    by_window: list[Tensor] = field(default_factory=list)

    def add(self, inputs: Tensor, gradient: Tensor) -> None:
        """Count one window by what its linear read, (..., in), and its outputs' gradient."""
        rows, slopes = inputs.flatten(0, -2).float(), gradient.flatten(0, -2).float()
        with torch.no_grad():
            self.by_window.append(multiply_rows(slopes, rows))

    def shaped(self, factor: HessianFactor, variances: Tensor) -> float:
        """Sum over windows of sum_rows s^2 |G U' diag(1 / u)|^2."""
        scaled = factor.upper / factor.upper.diagonal()[:, None]
        with torch.no_grad():
            shaped = (multiply(g[:, factor.order], scaled) for g in self.by_window)
            norms = [rows.square().sum(1) for rows in shaped]
        return float(sum((norm * variances).sum(dtype=torch.float64) for norm in norms))


@dataclass
class _WatchedWeights(BlockWeights):
    taken: dict[str, _Gradients] = field(default_factory=dict, kw_only=True)

    def project(self, part: str, inputs: Tensor) -> Tensor:
        outputs = super().project(part, inputs)
        read = inputs.detach()
        if outputs.requires_grad:
            outputs.register_hook(  # type: ignore[no-untyped-call]
                lambda gradient: self.taken[part].add(read, gradient)
            )
        return outputs
