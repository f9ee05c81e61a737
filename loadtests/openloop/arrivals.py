"""When requests are due: the whole schedule, fixed before the first one leaves."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice, takewhile


class ArrivalKind(StrEnum):
    """Spacing of arrivals."""

    POISSON = "poisson"
    CONSTANT = "constant"


@dataclass(frozen=True)
class Arrivals:
    """`rate` requests per second on average for `duration` seconds, at most `max_requests`.

    Equal values give equal schedules.
    """

    rate: float
    duration: float
    max_requests: int
    kind: ArrivalKind = ArrivalKind.POISSON
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in (("rate", self.rate), ("duration", self.duration)):
            if not 0 < value < float("inf"):
                raise ValueError(f"{name} is {value}; give a positive number")
        if self.max_requests < 1:
            raise ValueError(f"max_requests is {self.max_requests}; give at least 1")

    def offsets(self) -> tuple[float, ...]:
        """Due times in seconds after the start, ascending; never empty."""
        steps = self._poisson() if self.kind is ArrivalKind.POISSON else self._constant()
        due = takewhile(lambda offset: offset < self.duration, steps)
        return tuple(islice(due, self.max_requests)) or (0.0,)

    def span(self) -> float:
        """Seconds that the schedule covers: less than `duration` where `max_requests` cut it."""
        offsets = self.offsets()
        is_cut = len(offsets) == self.max_requests
        return max(offsets[-1], 1 / self.rate) if is_cut else self.duration

    def _constant(self) -> Iterator[float]:
        index = 0
        while True:
            yield index / self.rate
            index += 1

    def _poisson(self) -> Iterator[float]:
        generator, offset = random.Random(self.seed), 0.0
        while True:
            offset += generator.expovariate(self.rate)
            yield offset
