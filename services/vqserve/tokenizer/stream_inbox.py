"""The frames of one stream that were read and wait for their turn.

Without a maximum age a full inbox stops the reading, so the sender feels it; with one, the oldest
frame makes room. Knows the order of a stream's messages; knows no codec.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from vqserve.common.errors import Draining
from vqserve.tokenizer.errors import InvalidStream
from vqserve.tokenizer.metrics import ScqMetrics
from vqserve.tokenizer.stream_plan import StreamPlan
from vqstack.tokenizer.v1 import tokenizer_pb2

Requests = AsyncIterator[tokenizer_pb2.StreamFramesRequest]


@dataclass(frozen=True)
class Arrival:
    """One frame and when it came, by time.perf_counter."""

    frame: tokenizer_pb2.StreamFrame
    at: float = field(default_factory=time.perf_counter)

    @property
    def age_seconds(self) -> float:
        """Time since it came."""
        return time.perf_counter() - self.at


class Inbox:
    """At most `size` frames that wait."""

    def __init__(self, plan: StreamPlan, size: int, metrics: ScqMetrics) -> None:
        self._plan = plan
        self._metrics = metrics
        self._queue: asyncio.Queue[Arrival | None] = asyncio.Queue(size)
        self._dropped = 0
        self._key_wanted = False

    async def fill(self, requests: Requests, refusing: asyncio.Event) -> None:
        """Read until the client ends or the server drains; raises what ended the stream."""
        failure: Exception | None = None
        try:
            await self._read(requests, refusing)
        except Exception as error:
            # What was read before is still answered; the failure ends the stream after that.
            failure = error
        await self._queue.put(None)
        if failure is not None:
            raise failure

    async def take(self) -> Arrival | None:
        """The next frame that is not too old; None at the end."""
        while (arrival := await self._queue.get()) is not None:
            if not self.is_stale(arrival):
                return arrival
            self.drop(arrival, "stale")
        return None

    def is_stale(self, arrival: Arrival) -> bool:
        """Whether a frame is older than the stream wants its frames to be."""
        limit = self._plan.max_age_seconds
        return bool(limit) and arrival.age_seconds > limit

    def drop(self, arrival: Arrival, reason: str) -> None:
        """Count a frame that will not be answered; its wish for a key frame is kept."""
        self._dropped += 1
        if arrival.frame.request_keyframe:
            self.want_key()
        self._metrics.dropped(self._plan.model_label, reason)

    def take_dropped(self) -> int:
        """Frames dropped since this was last asked."""
        dropped, self._dropped = self._dropped, 0
        return dropped

    def want_key(self) -> None:
        """Remember that the next frame which is coded must be a key frame."""
        self._key_wanted = True

    def take_key_wanted(self) -> bool:
        """Whether a key frame was wanted since this was last asked."""
        wanted, self._key_wanted = self._key_wanted, False
        return wanted

    async def _read(self, requests: Requests, refusing: asyncio.Event) -> None:
        stopping: asyncio.Future[Any] = asyncio.ensure_future(refusing.wait())
        try:
            while (request := await _next_request(requests, stopping)) is not None:
                if request.WhichOneof("message") != "frame":
                    raise InvalidStream("after its config a stream carries frames only")
                await self._put(Arrival(request.frame))
        finally:
            stopping.cancel()
        if refusing.is_set():
            raise Draining(
                "this server is shutting down; reopen the stream elsewhere and resend the frames "
                "that were not answered",
                retry_after_seconds=1,
            )

    async def _put(self, arrival: Arrival) -> None:
        if self._plan.max_age_seconds and self._queue.full():
            oldest = self._queue.get_nowait()
            if oldest is not None:
                self.drop(oldest, "overload")
        await self._queue.put(arrival)


async def _next_request(
    requests: Requests, stopping: asyncio.Future[Any]
) -> tokenizer_pb2.StreamFramesRequest | None:
    """The next message; None when the client has ended or `stopping` is done."""
    reading: asyncio.Future[tokenizer_pb2.StreamFramesRequest | None]
    reading = asyncio.ensure_future(anext(requests, None))
    waiting: set[asyncio.Future[Any]] = {reading, stopping}
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        return reading.result() if reading.done() else None
    finally:
        reading.cancel()
