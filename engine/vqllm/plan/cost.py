"""Bytes, memory, hours and tokens per second of quantizing and running one model on one machine.

Follows the core loop of `vqllm.quantization`: two streams of activations where the correction is
on, a hessian per group of linears with a common input, a factor per damping, one sweep per linear.
Attention scores, norms and the tokenizer are left out; at these widths they are a few per cent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vqllm.decoder.config import DecoderConfig
from vqllm.errors import InvalidConfig, OverBudget
from vqllm.plan.hardware import MEASURED, PROJECTED, Hardware
from vqllm.quantization.base import MethodOptions
from vqllm.quantization.memory import plan_memory
from vqllm.quantization.recipe import Recipe

HEAD_BITS = 8  # of the output head while decoding
TABLE_BITS = 16  # of embedding and head on disk
TRIAL_ROWS = 128  # of a weight that the core loop tries dampings on
HOUR = 3600.0


@dataclass(frozen=True)
class QuantizationPlan:
    """What would be done.

    Attributes:
        options: method and sizes of every linear.
        num_tokens: calibration tokens.
        window_length: of one window.
        num_dampings: dampings to choose from.
        correct: whether the full-precision stream is followed too.

    Raises:
        InvalidConfig: fewer tokens than a window.
    """

    options: MethodOptions
    num_tokens: int = 64 * 512
    window_length: int = 512
    num_dampings: int = 4
    correct: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.window_length <= self.num_tokens:
            raise InvalidConfig("num_tokens", self.num_tokens, f"at least {self.window_length}")
        if self.num_dampings < 1:
            raise InvalidConfig("num_dampings", self.num_dampings, "at least 1")


@dataclass(frozen=True)
class Line:
    """One number of a plan.

    Attributes:
        basis: `measured`, or `projected` for everything that was not run.
        how: where the number comes from.
    """

    quantity: str
    value: float
    unit: str
    basis: str
    how: str

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def linear_bytes(config: DecoderConfig, options: MethodOptions) -> float:
    """Bytes of all quantized linears, overhead counted."""
    return sum(
        options.bits_of(rows, columns) / 8
        for layer in range(config.num_layers)
        for rows, columns in config.linear_shapes(layer).values()
    )


def other_bytes(config: DecoderConfig) -> float:
    """Bytes of everything that stays unquantized: embedding, head, norms, biases, routers."""
    return TABLE_BITS / 8 * (config.num_parameters - config.num_linear_parameters)


def bytes_per_token(config: DecoderConfig, options: MethodOptions) -> float:
    """Weights that decoding one token reads: linears of the experts it meets, and the head."""
    linears = sum(
        options.bits_of(*config.linear_shapes(layer)[part]) / 8 * _use(config, part)
        for layer in range(config.num_layers)
        for part in config.linear_shapes(layer)
    )
    return linears + config.vocab_size * config.hidden_size * HEAD_BITS / 8


def _use(config: DecoderConfig, part: str) -> float:
    """Part of the tokens that meet a linear."""
    if config.moe is None or ".experts." not in part:
        return 1.0
    return config.moe.top_k / config.moe.num_experts


def quantization_seconds(
    config: DecoderConfig, plan: QuantizationPlan, machine: Hardware
) -> dict[str, float]:
    """Seconds by operation, all layers together."""
    total: dict[str, float] = {}
    for layer in range(config.num_layers):
        shapes = config.linear_shapes(layer)
        for group in config.linear_groups(layer):
            tokens = int(plan.num_tokens * _use(config, group[0]))
            part = _group_seconds([shapes[name] for name in group], tokens, plan, machine)
            for name, seconds in part.items():
                total[name] = total.get(name, 0.0) + seconds
    return total


def _group_seconds(
    shapes: list[tuple[int, int]], tokens: int, plan: QuantizationPlan, machine: Hardware
) -> dict[str, float]:
    columns = shapes[0][1]
    method, dampings = plan.options.method, plan.num_dampings
    num_factors = dampings + 1 if dampings > 1 else 1
    result = {
        "gram": machine.seconds("gram", (tokens, 0, columns)),
        "factorize": num_factors * machine.seconds("factorize", (0, 0, columns)),
        "read": sum(machine.seconds("read", (0, *shape)) for shape in shapes),
        "write": sum(
            plan.options.bits_of(*shape)
            / (16 * shape[0] * shape[1])
            * machine.seconds("write", (0, *shape))
            for shape in shapes
        ),
    }
    result["forward"] = sum(_forward_seconds(shape, tokens, plan, machine) for shape in shapes)
    result[method] = sum(machine.seconds(method, (0, *shape)) for shape in shapes)
    if dampings > 1:
        trials = [(min(TRIAL_ROWS, rows), columns) for rows, columns in shapes]
        result["trials"] = dampings * sum(machine.seconds(method, (0, *t)) for t in trials)
    return result


def _forward_seconds(
    shape: tuple[int, int], tokens: int, plan: QuantizationPlan, machine: Hardware
) -> float:
    """Streams through a linear; with correction also its cross moment and the solve."""
    once = machine.seconds("gemm", (tokens, *shape))
    if not plan.correct:
        return once
    rows, columns = shape
    return 4 * once + 2 * machine.seconds("gemm", (rows, columns, columns))


def peak_bytes(config: DecoderConfig, plan: QuantizationPlan) -> float:
    """Working set of quantizing in the leanest way the core loop knows, by its own estimate."""
    shape = (plan.num_tokens // plan.window_length, plan.window_length)
    recipe = Recipe(plan.options, alpha=0.5 if plan.correct else 0.0)
    fast = plan_memory(config, shape, recipe, None).expected_bytes
    try:
        return float(plan_memory(config, shape, recipe, fast - 1).expected_bytes)
    except OverBudget:  # the lean way does not save anything
        return float(fast)


def least_peak_bytes(config: DecoderConfig) -> float:
    """What a loop that keeps one linear and one float32 hessian, factored in place, would need."""
    shapes = config.linear_shapes(config.num_layers - 1)
    return max(4 * rows * columns + 4 * columns**2 for rows, columns in shapes.values())


def make_plan(
    config: DecoderConfig, plan: QuantizationPlan, machine: Hardware, is_run: bool = False
) -> list[Line]:
    """Every number of a model on a machine.

    `is_run` marks a model and machine that were measured as a whole; everything else is projected
    even where the prices were measured.
    """
    bits = 8 * linear_bytes(config, plan.options) / config.num_linear_parameters
    disk = linear_bytes(config, plan.options) + other_bytes(config)
    basis = MEASURED if is_run and machine.basis == MEASURED else PROJECTED
    seconds = quantization_seconds(config, plan, machine)
    prices = f"prices {machine.basis} on {machine.name}"
    slowest = max(seconds, key=lambda name: seconds[name])
    part = seconds[slowest] / sum(seconds.values())
    return [
        Line("true bits", bits, "bpw", PROJECTED, "arithmetic"),
        Line("on disk", disk / 1e9, "GB", PROJECTED, "arithmetic; embedding and head 16 bits"),
        Line(
            "quantizing",
            sum(seconds.values()) / HOUR,
            "h",
            basis,
            f"{prices}; {part:.0%} {slowest}",
        ),
        Line(
            "peak memory, quantizing",
            peak_bytes(config, plan) / 1e9,
            "GB",
            PROJECTED,
            "the core loop's estimate",
        ),
        Line("least memory", least_peak_bytes(config) / 1e9, "GB", PROJECTED, "arithmetic"),
        _decoding_line(config, plan, machine, disk),
    ]


def _decoding_line(
    config: DecoderConfig, plan: QuantizationPlan, machine: Hardware, disk: float
) -> Line:
    read = bytes_per_token(config, plan.options)
    rate = machine.bytes_per_second / read
    how = f"{read / 1e9:.2f} GB per token at {machine.bytes_per_second / 1e9:.0f} GB/s"
    if disk > machine.memory_bytes:
        return Line("decoding, at most", 0.0, "tok/s", PROJECTED, "does not fit")
    return Line("decoding, at most", rate, "tok/s", PROJECTED, how)
