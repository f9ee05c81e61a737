"""Bounded admission: a full service says so at once instead of queueing without end.

Knows neither transport nor engine; what is admitted runs on the service's own threads.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from vqserve.common.errors import ResourceExhausted
from vqserve.common.metrics import ServerMetrics

# Weight of the newest duration in the running mean that retry_after is computed from.
NEWEST_WEIGHT = 0.2
MIN_RETRY_SECONDS = 0.05
MAX_RETRY_SECONDS = 30.0


class AdmissionGate:
    """Admits at most `limit` requests at once, running and waiting together.

    `workers` is how many of them run at the same time; with the mean duration it gives the
    time after which a refused client may expect room. Used from the event loop only.
    """

    def __init__(self, limit: int, workers: int, metrics: ServerMetrics) -> None:
        if limit < 1 or workers < 1:
            raise ValueError(f"limit and workers must be at least 1, got {limit} and {workers}")
        self.limit = limit
        self.workers = workers
        self.admitted = 0
        self._metrics = metrics
        self._mean_seconds = 0.0

    @property
    def waiting(self) -> int:
        """Admitted requests beyond those that can run at once."""
        return max(0, self.admitted - self.workers)

    @contextmanager
    def admit(self) -> Iterator[None]:
        """Hold one place; raises ResourceExhausted when there is none."""
        if self.admitted >= self.limit:
            self._metrics.reject("queue_full")
            raise ResourceExhausted(
                f"{self.admitted} requests are admitted, the limit is {self.limit}; retry later",
                retry_after_seconds=self.retry_after_seconds(),
            )
        self.admitted += 1
        started = time.monotonic()
        try:
            yield
        finally:
            self.admitted -= 1
            self._mean_seconds += NEWEST_WEIGHT * (time.monotonic() - started - self._mean_seconds)

    def retry_after_seconds(self) -> float:
        """Expected time until a place is free, in seconds."""
        expected = self._mean_seconds / self.workers
        return min(MAX_RETRY_SECONDS, max(MIN_RETRY_SECONDS, expected))
