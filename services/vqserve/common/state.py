"""The one owner of a service's phase and of its count of running requests.

STARTING -> SERVING -> LEAVING (readiness off, still accepting) -> DRAINING (refusing).
Knows no transport.
"""

from __future__ import annotations

import asyncio
import enum
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from vqserve.common.errors import Draining, NotReady, TooManyRequests


class Phase(enum.Enum):
    """Where a service stands between start and stop."""

    STARTING = "starting"
    SERVING = "serving"
    LEAVING = "leaving"
    DRAINING = "draining"


class ServiceState:
    """Phase, in-flight requests and the wish to drain. Used from the event loop only."""

    def __init__(self, max_open_requests: int = sys.maxsize) -> None:
        self._max_open_requests = max_open_requests
        self.phase = Phase.STARTING
        self.requests_in_flight = 0
        self.drain_requested = asyncio.Event()
        self.refusing = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._started_at = time.monotonic()

    @property
    def is_started(self) -> bool:
        """True once the models were loaded."""
        return self.phase is not Phase.STARTING

    @property
    def is_ready(self) -> bool:
        """True while new requests should be sent here."""
        return self.phase is Phase.SERVING

    @property
    def is_draining(self) -> bool:
        """True once shutdown has begun."""
        return self.phase in (Phase.LEAVING, Phase.DRAINING)

    @property
    def uptime_seconds(self) -> float:
        """Since construction, in seconds."""
        return time.monotonic() - self._started_at

    def mark_serving(self) -> None:
        """Models are loaded; accept requests."""
        self.phase = Phase.SERVING

    def request_drain(self) -> None:
        """Ask the lifecycle to shut down; safe to call more than once."""
        self.drain_requested.set()

    def mark_leaving(self) -> None:
        """Readiness off; requests that still arrive are served."""
        self.phase = Phase.LEAVING

    def mark_draining(self) -> None:
        """Refuse new requests; long streams see `refusing` and end after their last answer."""
        self.phase = Phase.DRAINING
        self.refusing.set()

    @contextmanager
    def request(self) -> Iterator[None]:
        """Count one request; raises NotReady, Draining or TooManyRequests instead."""
        self._check_accepting()
        self.requests_in_flight += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.requests_in_flight -= 1
            if not self.requests_in_flight:
                self._idle.set()

    async def wait_idle(self, timeout_seconds: float) -> bool:
        """True when every request has ended within the time given."""
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    def _check_accepting(self) -> None:
        if self.phase is Phase.STARTING:
            raise NotReady("models are still loading; retry soon", retry_after_seconds=1)
        if self.phase is Phase.DRAINING:
            raise Draining(
                "this server is shutting down; retry on another one", retry_after_seconds=1
            )
        if self.requests_in_flight >= self._max_open_requests:
            raise TooManyRequests(
                f"{self.requests_in_flight} requests are open, the limit is "
                f"{self._max_open_requests}; retry later",
                retry_after_seconds=1,
            )
