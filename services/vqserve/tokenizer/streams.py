"""StreamFrames, free of transport: a configuration, then frames in and results out, in order.

A reader task takes messages off the wire into a short queue. A few frames are worked on at a
time: while one is coded, the picture of the next is read and that of the last is written; coding
itself keeps the order, because each frame of a stream builds on the one before. A frame's error
is reported in its result; an error of the stream itself ends it. When the server drains, the
stream answers what it has read and then ends with Draining.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from vqserve.common.admission import AdmissionGate
from vqserve.tokenizer import convert
from vqserve.tokenizer.core import TokenizerCore, Transport
from vqserve.tokenizer.errors import InvalidStream
from vqserve.tokenizer.metrics import ScqMetrics
from vqserve.tokenizer.stream_inbox import Inbox, Requests
from vqserve.tokenizer.stream_plan import StreamPlan, checked_plan
from vqserve.tokenizer.stream_worker import StreamWorker
from vqstack.tokenizer.v1 import tokenizer_pb2

Answer = asyncio.Task[tokenizer_pb2.FrameResult | None]


@dataclass(frozen=True)
class StreamLimits:
    """queue_frames of one stream wait, frames_at_work are worked on at the same time.

    keyframe_interval: frames from key frame to key frame unless the client says.
    """

    queue_frames: int = 4
    frames_at_work: int = 2
    keyframe_interval: int = 30


class FrameStreams:
    """Serves streams; at most `gate.limit` at once."""

    def __init__(
        self,
        core: TokenizerCore,
        gate: AdmissionGate,
        limits: StreamLimits,
        refusing: asyncio.Event,
    ) -> None:
        self._core = core
        self._gate = gate
        self._limits = limits
        self._refusing = refusing

    async def stream(
        self, requests: Requests, transport: Transport
    ) -> AsyncGenerator[tokenizer_pb2.StreamFramesResponse, None]:
        """Ready once, then one result per frame that was not dropped."""
        with self._gate.admit(), _counted(self._core.metrics):
            plan = await self._plan(requests)
            yield self._ready(plan)
            inbox = Inbox(plan, self._limits.queue_frames, self._core.metrics)
            worker = StreamWorker(self._core, plan, inbox, transport)
            reader = asyncio.create_task(inbox.fill(requests, self._refusing))
            line = _Line(worker, inbox, self._limits.frames_at_work)
            starter = asyncio.create_task(line.start_all())
            try:
                while (result := await line.next_result()) is not None:
                    yield tokenizer_pb2.StreamFramesResponse(result=result)
                await reader
            finally:
                await _cancelled(reader, starter, *line.answers)
                worker.summarize()

    async def _plan(self, requests: Requests) -> StreamPlan:
        async for request in requests:
            if request.WhichOneof("message") != "config":
                raise InvalidStream("the first message of a stream must be its config")
            return checked_plan(request.config, self._core, self._limits.keyframe_interval)
        raise InvalidStream("the stream ended before its config")

    def _ready(self, plan: StreamPlan) -> tokenizer_pb2.StreamFramesResponse:
        info = convert.model_info(plan.model.card) if plan.model else None
        ready = tokenizer_pb2.StreamReady(
            model=info,
            max_payload_bytes=self._core.max_payload_bytes,
            keyframe_interval=plan.keyframe_interval,
        )
        return tokenizer_pb2.StreamFramesResponse(ready=ready)


class _Line:
    """The frames of one stream at work: begun and answered in order, at most `size` at a time."""

    def __init__(self, worker: StreamWorker, inbox: Inbox, size: int) -> None:
        self._worker = worker
        self._inbox = inbox
        self._places = asyncio.Semaphore(size)
        self._queue: asyncio.Queue[Answer | None] = asyncio.Queue()
        self.answers: set[Answer] = set()

    async def start_all(self) -> None:
        """Begin frame after frame as places become free, until the inbox ends."""
        turn = asyncio.Event()
        turn.set()
        while True:
            await self._places.acquire()
            arrival = await self._inbox.take()
            if arrival is None:
                break
            following = asyncio.Event()
            answer = asyncio.create_task(self._worker.answer(arrival, turn, following))
            turn = following
            self.answers.add(answer)
            self._queue.put_nowait(answer)
        self._queue.put_nowait(None)

    async def next_result(self) -> tokenizer_pb2.FrameResult | None:
        """The result of the next frame that was not dropped; None after the last."""
        while (answer := await self._queue.get()) is not None:
            try:
                result = await answer
            finally:
                self.answers.discard(answer)
                self._places.release()
            if result is not None:
                result.dropped_before = self._inbox.take_dropped()
                return result
        return None


@contextmanager
def _counted(metrics: ScqMetrics) -> Iterator[None]:
    started = time.monotonic()
    metrics.streams_active.inc()
    try:
        yield
    finally:
        metrics.streams_active.dec()
        metrics.stream_duration.observe(time.monotonic() - started)


async def _cancelled(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
