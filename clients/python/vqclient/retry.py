"""Retries with exponential backoff inside one deadline.

Knows VqError and time; knows neither gRPC calls nor the services. Only two failures are
retried: UNAVAILABLE, and RESOURCE_EXHAUSTED that carries google.rpc.RetryInfo (without it the
message was too large, and stays so). The server's pause is a lower bound of ours.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from vqclient.errors import ResourceExhaustedError, UnavailableError, VqError

T = TypeVar("T")


@dataclass(frozen=True)
class RetryPolicy:
    """How often and how patiently a call is repeated; pauses in seconds."""

    max_attempts: int = 4
    initial_backoff: float = 0.1
    max_backoff: float = 5.0
    multiplier: float = 2.0
    jitter: float = 0.2

    def __post_init__(self) -> None:
        if self.max_attempts < 1:
            raise ValueError(f"max_attempts is {self.max_attempts}; it must be at least 1")
        if not 0 < self.initial_backoff <= self.max_backoff:
            raise ValueError(
                f"initial_backoff {self.initial_backoff} must be above 0 and at most "
                f"max_backoff {self.max_backoff}"
            )
        if self.multiplier < 1 or not 0 <= self.jitter < 1:
            raise ValueError(
                f"multiplier {self.multiplier} must be at least 1, jitter {self.jitter} in [0, 1)"
            )

    def pause_after(self, attempt: int, error: VqError) -> float | None:
        """Seconds to wait after failed attempt number `attempt` (from 1); None to give up."""
        if attempt >= self.max_attempts or not _is_retryable(error):
            return None
        backoff = self.initial_backoff * self.multiplier ** (attempt - 1)
        spread = 1 + self.jitter * random.uniform(-1, 1)
        return max(min(backoff, self.max_backoff) * spread, error.retry_after or 0.0)


NO_RETRY = RetryPolicy(max_attempts=1)


def _is_retryable(error: VqError) -> bool:
    if isinstance(error, ResourceExhaustedError):
        return error.retry_after is not None
    return isinstance(error, UnavailableError)


async def call_with_retry(
    attempt_call: Callable[[float], Awaitable[T]], policy: RetryPolicy, timeout: float
) -> T:
    """Run `attempt_call(remaining_seconds)` until it succeeds, `policy` gives up or time is over.

    A pause that would outlast the deadline is not begun: the last error is raised at once.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout
    attempt = 1
    while True:
        try:
            return await attempt_call(deadline - loop.time())
        except VqError as error:
            pause = policy.pause_after(attempt, error)
            if pause is None or loop.time() + pause >= deadline:
                raise
        await asyncio.sleep(pause)
        attempt += 1
