"""How much the output of a model suffers from an error in each of its linears, before any is made.

For a small error E in the weights of one linear, the KL divergence of the output is half the Fisher
form of the change it makes to the linear's outputs y. With g the gradient of the negative
log-likelihood of labels drawn from the model itself, taken as isotropic over the outputs:

    KL per token = 1/2 mean_t (g_t' E x_t)^2 ~ 1/2 (mean_t |g_t|^2 / out) tr(E H E').

Error feedback along the columns (GPTQ, LDLQ) leaves of a codec's mean squared error D on weights
of unit variance

    tr(E H E') = D (|W|^2 / in) sum_j c_j,

where c_j is the variance of input j given the inputs that come after it in the sweep: the squared
reciprocals of the diagonal of the factor of the inverse hessian. So one pass through the model
gives, per linear, the KL per unit of D; `allocation.py` spends bits by it.

Works block by block: forwards once, keeping what enters every block, then backwards. Knows no
method.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from vqllm.calibration import Windows
from vqllm.decoder.block import forward_block, trace_block
from vqllm.decoder.rope import RotaryTable
from vqllm.decoder.weights import BlockWeights
from vqllm.errors import CalibrationError, InvalidConfig
from vqllm.output_head import OutputHead
from vqllm.quantization.hessian import Hessian, factorize
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
        for rows in _batches(len(token_ids)):
            states = entries[layer][rows].requires_grad_()
            with torch.enable_grad():
                output = watch.run(states, source, rotary)
                output.backward(gradient[rows])  # type: ignore[no-untyped-call]
            if states.grad is None:
                raise CalibrationError(f"block {layer} passes no gradient on")
            gradient[rows] = states.grad
        for part, value in watch.sensitivities(source, layer, config.damping).items():
            found[f"model.layers.{layer}.{part}"] = value
    return {name: found[name] for name in source.linear_names()}


def _batches(num_windows: int) -> list[slice]:
    return [slice(i, i + BATCH_WINDOWS) for i in range(0, num_windows, BATCH_WINDOWS)]


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
            for rows in _batches(len(token_ids)):
                hidden[rows] = forward_block(hidden[rows], weights, source.config, rotary)
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
            loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        (gradients[index],) = torch.autograd.grad(loss, states)
    return gradients


def _draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One label per row of (t, vocab)."""
    sums = logits.softmax(-1).cumsum(-1)
    points = torch.rand(len(sums), 1, generator=generator) * sums[:, -1:]
    return torch.searchsorted(sums, points).clamp(max=sums.shape[1] - 1)[:, 0]


@dataclass
class _Squares:
    """Sum of squared norms of the output gradients, and how many rows there were."""

    total: float = 0.0
    num_rows: int = 0

    def add(self, gradient: Tensor) -> None:
        self.total += gradient.float().square().sum().item()
        self.num_rows += gradient[..., 0].numel()


class _Watch:
    """One block that keeps the second moments of its linears' inputs and output gradients."""

    def __init__(self, weights: BlockWeights) -> None:
        self.weights = weights
        self._gradients = {part: _Squares() for part in weights.linears}
        self._hessians: dict[tuple[str, ...], Hessian] = {}
        self._num_tokens = 0

    def run(self, states: Tensor, source: WeightSource, rotary: RotaryTable) -> Tensor:
        """The block's output (b, t, d) with gradients, counted on the way back."""
        self._num_tokens += states.shape[0] * states.shape[1]
        watched = _WatchedWeights(**vars(self.weights), squares=self._gradients)
        trace = trace_block(states, watched, source.config, rotary)
        while True:
            try:
                tap = next(trace)
            except StopIteration as stop:
                return stop.value  # type: ignore[no-any-return]
            width = tap.inputs.shape[-1]
            self._hessians.setdefault(tap.parts, Hessian(width)).add(tap.inputs.detach().float())

    def sensitivities(self, source: WeightSource, layer: int, damping: float) -> dict[str, float]:
        """KL per unit of distortion of every linear of the block."""
        found = {}
        for parts, hessian in self._hessians.items():
            factor = factorize(hessian.value, damping)
            variance = factor.upper.diagonal().double().reciprocal().square().sum().item()
            for part in parts:
                weight = self.weights.linears[part].float()
                squares = self._gradients[part]
                per_output = squares.total / self._num_tokens / weight.shape[0]
                energy = weight.square().sum().item() / weight.shape[1]
                found[part] = 0.5 * per_output * energy * variance
                if not torch.isfinite(torch.tensor(found[part])):
                    raise CalibrationError(
                        f"model.layers.{layer}.{part}: its gradient is not finite; the "
                        "calibration text drives the model out of range"
                    )
        return found


@dataclass
class _WatchedWeights(BlockWeights):
    squares: dict[str, _Squares] = field(default_factory=dict, kw_only=True)

    def project(self, part: str, inputs: Tensor) -> Tensor:
        outputs = super().project(part, inputs)
        if outputs.requires_grad:
            outputs.register_hook(self.squares[part].add)  # type: ignore[no-untyped-call]
        return outputs
