"""Spends a bit budget on the linears of a model where it lowers the loss most.

The loss of a choice is taken as the sum over linears of sensitivity times distortion (the
linearity that HIGGS, arXiv 2411.17525, shows for small errors). Under it the best choices for every
budget lie on the lower convex hull of each linear's (bits, loss) points; steps along the hulls are
taken steepest first, which is the Lagrangian solution, and what is left of the budget is filled
greedily. Knows no method and no model.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from vqllm.errors import OverBudget
from vqllm.quantization.base import MethodOptions


@dataclass(frozen=True)
class Candidate:
    """One way to quantize a linear.

    Attributes:
        bits: in the file, all overhead counted.
        distortion: mean squared error of a unit-variance weight, in the unit of the sensitivity.
    """

    options: MethodOptions
    bits: float
    distortion: float


Shapes = Mapping[str, tuple[int, int]]
Candidates = Callable[[str], Sequence[Candidate]]


def allocate(
    shapes: Shapes, sensitivities: Mapping[str, float], candidates: Candidates, bpw: float
) -> dict[str, MethodOptions]:
    """Options of every linear, with at most `bpw` true bits per weight over all of them.

    Args:
        shapes: (out, in) by name.
        sensitivities: loss per unit of distortion by name, 0 or more.
        candidates: the choices for a linear of that name.

    Raises:
        OverBudget: even the smallest candidates need more; names the range that can be met.
        KeyError: a linear has no sensitivity.
    """
    points = {name: _points(sensitivities[name], candidates(name)) for name in shapes}
    num_weights = sum(rows * columns for rows, columns in shapes.values())
    budget = bpw * num_weights
    chosen = {name: min(options, key=_bits) for name, options in points.items()}
    left = budget - sum(point.bits for point in chosen.values())
    if left < 0:
        raise OverBudget(_range_message(points, num_weights, bpw))
    left = _climb(points, chosen, left)
    _fill(points, chosen, left)
    return {name: point.options for name, point in chosen.items()}


@dataclass(frozen=True)
class _Point:
    bits: float
    loss: float
    options: MethodOptions


def _bits(point: _Point) -> tuple[float, float]:
    return point.bits, point.loss


def _points(sensitivity: float, candidates: Sequence[Candidate]) -> list[_Point]:
    return [_Point(c.bits, sensitivity * c.distortion, c.options) for c in candidates]


def _hull(points: Sequence[_Point]) -> list[_Point]:
    """The lower convex hull from the smallest point on, by rising bits and falling loss."""
    hull: list[_Point] = []
    for point in sorted(points, key=_bits):
        if hull and point.loss >= hull[-1].loss:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-2], point):
            hull.pop()
        hull.append(point)
    return hull


def _slope(first: _Point, second: _Point) -> float:
    """Loss saved per bit."""
    if second.bits <= first.bits:
        return float("inf")
    return (first.loss - second.loss) / (second.bits - first.bits)


def _climb(points: Mapping[str, list[_Point]], chosen: dict[str, _Point], left: float) -> float:
    """Take hull steps, steepest first, until one does not fit; returns the bits that are left."""
    steps = [
        (_slope(first, second), name, first, second)
        for name, options in points.items()
        for hull in (_hull(options),)
        for first, second in itertools.pairwise(hull)
    ]
    for _, name, first, second in sorted(steps, key=lambda step: (-step[0], step[1])):
        if second.bits - first.bits > left:
            break
        chosen[name] = second
        left -= second.bits - first.bits
    return left


def _fill(points: Mapping[str, list[_Point]], chosen: dict[str, _Point], left: float) -> None:
    """Single upgrades that still fit, the one that saves most per bit first."""
    while True:
        upgrades = [
            (_slope(chosen[name], point), name, point)
            for name, options in points.items()
            for point in options
            if point.loss < chosen[name].loss and point.bits - chosen[name].bits <= left
        ]
        if not upgrades:
            return
        _, name, best = max(upgrades, key=lambda upgrade: (upgrade[0], upgrade[1]))
        left -= best.bits - chosen[name].bits
        chosen[name] = best


def _range_message(points: Mapping[str, list[_Point]], num_weights: int, bpw: float) -> str:
    low = sum(min(options, key=_bits).bits for options in points.values()) / num_weights
    high = sum(max(options, key=_bits).bits for options in points.values()) / num_weights
    return (
        f"{bpw:g} bits per weight cannot be met: with all overhead counted this model's linears "
        f"take {low:.3f} to {high:.3f} with this method; ask for at least {low:.3f}"
    )
