"""Times of an operation at several sizes to a price per unit of work.

Least squares on relative errors with prices that are not negative: a tenth of a second too much
matters as much on a small matrix as ten seconds on a large one. Knows arrays only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vqllm.errors import InvalidConfig
from vqllm.plan.operations import Operation, Shape


@dataclass(frozen=True)
class Timing:
    """Seconds of one operation on one shape."""

    shape: Shape
    seconds: float


@dataclass(frozen=True)
class Fit:
    """Price list of an operation: seconds = fixed + sum of prices times work terms."""

    fixed: float
    prices: tuple[float, ...]

    def seconds(self, operation: Operation, shape: Shape) -> float:
        """Modelled time on a shape."""
        terms = operation.terms(shape)
        return self.fixed + sum(p * t for p, t in zip(self.prices, terms, strict=True))

    def to_dict(self) -> dict[str, Any]:
        return {"fixed": self.fixed, "prices": list(self.prices)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Fit:
        return cls(float(values["fixed"]), tuple(map(float, values["prices"])))


def fit(operation: Operation, timings: Sequence[Timing]) -> Fit:
    """The price list that explains the timings best.

    Raises:
        InvalidConfig: fewer than three timings, or one that is not positive.
    """
    if len(timings) < 3 or min(t.seconds for t in timings) <= 0:
        raise InvalidConfig("timings", len(timings), "three or more positive ones")
    seconds = np.array([timing.seconds for timing in timings])
    work = np.array([(1.0, *operation.terms(timing.shape)) for timing in timings])
    solution = nonnegative_least_squares(work / seconds[:, None], np.ones(len(timings)))
    return Fit(float(solution[0]), tuple(map(float, solution[1:])))


def nonnegative_least_squares(
    matrix: NDArray[np.float64], target: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Least squares with x >= 0, by trying every set of columns: there are four at most."""
    num_columns = matrix.shape[1]
    scale = np.abs(matrix).max(axis=0)
    scale[scale == 0] = 1
    best, least = np.zeros(num_columns), float(target @ target)
    for size in range(1, num_columns + 1):
        for chosen in combinations(range(num_columns), size):
            part = matrix[:, chosen] / scale[list(chosen)]
            values, *_ = np.linalg.lstsq(part, target, rcond=None)
            error = float(((part @ values - target) ** 2).sum())
            if (values >= 0).all() and error < least * (1 - 1e-9):
                least, best = error, np.zeros(num_columns)
                best[list(chosen)] = values / scale[list(chosen)]
    return best
