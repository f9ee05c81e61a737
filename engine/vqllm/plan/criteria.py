"""Which of the product's first criteria physics allows, with the numbers that decide.

Arithmetic on shapes; quality figures are those that the methods' own papers publish.
"""

from __future__ import annotations

from dataclasses import dataclass

from vqllm.plan.cost import QuantizationPlan, least_peak_bytes, peak_bytes
from vqllm.plan.shapes import find_shape
from vqllm.quantization.tcq import TcqOptions

TARGET_BYTES = 20e9
TARGET_RATE = 10.0


@dataclass(frozen=True)
class Verdict:
    """One criterion, whether it can be met, and why."""

    criterion: str
    verdict: str
    reason: str


def verdicts() -> list[Verdict]:
    """All of them."""
    return [_resident(), _working_set(), _speed(), _speed_70b(), _quality(), _zero_shot()]


def _resident() -> Verdict:
    config = find_shape("llama-3.1-405b")
    weights = config.num_linear_parameters
    tables = 2 * (config.num_parameters - weights)
    return Verdict(
        "405B at 2 bits in less than 20 GB of memory, as resident weights",
        "impossible",
        f"{weights / 1e9:.1f}e9 linear weights at 2 bits are {weights / 4e9:.0f} GB, and embedding "
        f"and head at 16 bits {tables / 1e9:.1f} GB more; 20 GB would be "
        f"{8 * TARGET_BYTES / weights:.3f} bits per weight",
    )


def _working_set() -> Verdict:
    config = find_shape("llama-3.1-405b")
    least = least_peak_bytes(config)
    hessian = max(columns for _, columns in config.linear_shapes().values()) ** 2 * 4
    return Verdict(
        "405B quantized within 20 GB of working memory",
        "possible" if least < TARGET_BYTES else "only with a hessian in parts",
        f"one linear in float32 and its hessian factored in place need {least / 1e9:.1f} GB, of "
        f"which {hessian / 1e9:.1f} GB is the float32 hessian of down_proj; in float64 that "
        f"hessian alone is {2 * hessian / 1e9:.1f} GB. This core loop's own estimate is "
        f"{_estimate('llama-3.1-405b'):.0f} GB, and {_estimate('llama-2-70b'):.1f} GB for 70B",
    )


def _estimate(model: str) -> float:
    """Gigabytes that quantizing with the core loop takes, by its own estimate."""
    return peak_bytes(find_shape(model), QuantizationPlan(TcqOptions(2))) / 1e9


def _speed() -> Verdict:
    weights = find_shape("llama-3.1-405b").num_linear_parameters
    read = weights / 4
    return Verdict(
        "405B at more than 10 tokens per second",
        "on accelerators with 110 GB or more, never in 20 GB",
        f"every token reads {read / 1e9:.0f} GB: {TARGET_RATE * read / 1e12:.1f} TB/s sustained; "
        f"streamed over a 64 GB/s bus it is {64e9 / read:.2f} tokens per second",
    )


def _speed_70b() -> Verdict:
    weights = find_shape("llama-2-70b").num_linear_parameters
    read = weights / 4
    return Verdict(
        "70B at 2 bits at more than 10 tokens per second",
        "possible",
        f"every token reads {read / 1e9:.1f} GB: {TARGET_RATE * read / 1e9:.0f} GB/s sustained, "
        "within the memory of a 24 GB accelerator; not within a desktop CPU's",
    )


def _quality() -> Verdict:
    return Verdict(
        "70B at 2 bits, perplexity within 0.3 of the original",
        "not reached by any published method",
        "Llama-2-70B on WikiText-2 at about 2.0 bits: VPTQ +0.81, QuIP# +0.79, AQLM with PV tuning "
        "+0.66 (their papers); at 3 bits VPTQ +0.22",
    )


def _zero_shot() -> Verdict:
    return Verdict(
        "zero-shot accuracy at least 98 % of the original",
        "borderline",
        "Llama-2-70B at 2 bits: QuIP# 98.3 %, AQLM 98.0 %, VPTQ 97.7 to 97.9 %; Llama-3-70B at "
        "2.02 bits 94.2 % (their papers)",
    )
