"""What the generator asks of a kind of request."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self

from openloop.outcome import Reply
from openloop.workload import Workload


class Driver(ABC):
    """Sends requests to `address`; used as an async context manager around a run.

    Requests are never retried: a rejection is a result here.
    """

    def __init__(self, address: str, workload: Workload) -> None:
        self.address = address
        self.workload = workload

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    @abstractmethod
    async def open(self) -> None:
        """Connect, make the payloads and send one request to warm up; raises VqError."""

    @abstractmethod
    async def send(self, index: int) -> Reply:
        """Send request number `index` and wait for its end; raises VqError or RequestFailed."""

    @abstractmethod
    async def close(self) -> None:
        """Disconnect."""
