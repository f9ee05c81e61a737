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
from dataclasses import dataclass, field

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
from vqllm.sources import WeightSource

BATCH_WINDOWS = 2


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
    source: WeightSource, windows: Windows, config: SensitivityConfig | None = None
) -> dict[str, float]:
    """KL (nats per token) per unit of distortion of every linear, by full name.

    Args:
        windows: tokens (num_windows, window_length).

    Raises:
        CalibrationError: a gradient is not finite; names the linear.
    """
    config = config or SensitivityConfig()
    token_ids = torch.from_numpy(windows[: config.num_windows])
    rotary = RotaryTable.build(source.config, token_ids.shape[1])
    entries, hidden = _forward(source, token_ids, rotary, config.dtype)
    gradient = _output_gradients(OutputHead.of(source, config.dtype), hidden, config.seed)
    found: dict[str, float] = {}
    for layer in reversed(range(source.config.num_layers)):
        weights = _cast(source.block(layer), config.dtype)
        watch = _Watch(weights)
        for window in range(len(token_ids)):
            states = entries[layer][window : window + 1].requires_grad_()
            with torch.enable_grad():
                output = watch.run(states, source, rotary)
            (passed,) = torch.autograd.grad(output, states, gradient[window : window + 1])
            gradient[window] = passed[0]
        for part, value in watch.sensitivities(layer, config.damping).items():
            found[f"model.layers.{layer}.{part}"] = value
    return {name: found[name] for name in source.linear_names()}


def _cast(weights: BlockWeights, dtype: torch.dtype) -> BlockWeights:
    weights.to("cpu", dtype)
    return weights


def _forward(
    source: WeightSource, token_ids: Tensor, rotary: RotaryTable, dtype: torch.dtype
) -> tuple[list[Tensor], Tensor]:
    """What enters every block, and what leaves the last one, (windows, t, d) float32."""
    with torch.no_grad():
        hidden, entries = source.embed(token_ids).clone(), []
        for layer in range(source.config.num_layers):
            entries.append(hidden.clone())
            weights = _cast(source.block(layer), dtype)
            for row in torch.split(hidden, BATCH_WINDOWS):
                row.copy_(forward_block(row, weights, source.config, rotary))
    return entries, hidden


def _output_gradients(head: OutputHead, hidden: Tensor, seed: int) -> Tensor:
    """Gradient of the summed loss of sampled labels by the last hidden states."""
    generator = torch.Generator().manual_seed(seed)
    gradients = torch.empty_like(hidden)
    for index, window in enumerate(hidden):
        states = window.clone().requires_grad_()
        with torch.enable_grad():
            logits = head.project(head.normed(states))
            labels = _draw(logits.detach(), generator)
            loss = F.cross_entropy(logits, labels, reduction="sum")
        (gradients[index],) = torch.autograd.grad(loss, states)
    return gradients


def _draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One label per row of (t, vocab)."""
    sums = logits.softmax(-1).cumsum(-1)
    points = torch.rand(len(sums), 1, generator=generator) * sums[:, -1:]
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
            self._hessians.setdefault(tap.parts, Hessian(inputs.shape[-1])).add(inputs)

    def sensitivities(self, layer: int, damping: float) -> dict[str, float]:
        """KL per token and unit of distortion of every linear of the block."""
        found = {}
        for parts, hessian in self._hessians.items():
            factor = factorize(hessian.value, damping)
            for part in parts:
                variances = self.weights.linears[part].float().square().mean(1)
                total = self._taken[part].shaped(factor, variances)
                found[part] = 0.5 * total / self._num_tokens
                if not math.isfinite(found[part]):
                    raise CalibrationError(
                        f"model.layers.{layer}.{part}: its gradient is not finite; the "
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
        self.by_window.append(slopes.T @ rows)

    def shaped(self, factor: HessianFactor, variances: Tensor) -> float:
        """Sum over windows of sum_rows s^2 |G U' diag(1 / u)|^2."""
        scaled = (factor.upper / factor.upper.diagonal()[:, None]).T
        norms = [(g[:, factor.order] @ scaled).square().sum(1) for g in self.by_window]
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
