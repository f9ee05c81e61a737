"""Paired bootstrap over windows: how much of a difference is the choice of text.

Knows arrays only. The unit that is drawn with replacement is the window, because tokens of one
window depend on each other (Koehn, "Statistical significance tests for machine translation
evaluation", EMNLP 2004, for the paired form).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

NUM_RESAMPLES = 2000
CONFIDENCE = 0.95
SEED = 0

Values = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Interval:
    """A percentile interval of `CONFIDENCE`; both ends equal the value for a single window."""

    low: float
    high: float

    def excludes(self, value: float) -> bool:
        return not self.low <= value <= self.high


def bootstrap_mean(
    per_window: Values, transform: Callable[[Values], Values] = lambda means: means
) -> Interval:
    """Interval of `transform(mean)` where one value per window (n,) is given.

    The draws depend on n alone, so that intervals of two models on the same windows are paired.
    """
    values = np.asarray(per_window, dtype=np.float64)
    return _interval(transform(values[_draws(len(values))].mean(axis=1)))


def bootstrap_ratio(numerator: Values, denominator: Values) -> Interval:
    """Interval of mean(numerator) / mean(denominator), one pair of values per window (n,)."""
    above, below = np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)
    draws = _draws(len(above))
    return _interval(above[draws].mean(axis=1) / below[draws].mean(axis=1))


def _draws(count: int) -> NDArray[np.int64]:
    return np.random.default_rng(SEED).integers(0, count, (NUM_RESAMPLES, count))


def _interval(resampled: Values) -> Interval:
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(resampled, [tail, 100 - tail])
    return Interval(float(low), float(high))


def ratio_interval(nll: Values, reference_nll: Values) -> Interval:
    """Interval of the ratio of perplexities of two models on the same windows, each (n,) means."""
    return bootstrap_mean(np.asarray(nll, np.float64) - reference_nll, np.exp)
