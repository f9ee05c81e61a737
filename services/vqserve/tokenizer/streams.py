"""StreamFrames, free of transport: a configuration, then frames in and results out, in order.

A reader task takes messages off the wire into a short queue; one frame at a time is worked on.
A frame's error is reported in its result; an error of the stream itself ends it. When the
server drains, the stream answers what it has read and then ends with Draining.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from vqserve.common.admission import AdmissionGate
from vqserve.common.errors import Draining, ResourceExhausted, ServiceError
from vqserve.common.interceptors import as_service_error
from vqserve.common.logging import annotate, current_request_id
from vqserve.tokenizer import convert
from vqserve.tokenizer.codecs import ServedModel
from vqserve.tokenizer.core import FrameRecord, Operation, TokenizerCore, Transport, checked_top_k
from vqserve.tokenizer.errors import EmptyPayload, InvalidStream
from vqserve.tokenizer.metrics import UNKNOWN_MODEL, ScqMetrics
from vqserve.tokenizer.pictures import ImageFormat
from vqstack.tokenizer.v1 import tokenizer_pb2

Requests = AsyncIterator[tokenizer_pb2.StreamFramesRequest]
BITRATE_WINDOW_SECONDS = 1.0

_OPERATIONS: dict[int, Operation] = {
    tokenizer_pb2.STREAM_OPERATION_ENCODE: "encode",
    tokenizer_pb2.STREAM_OPERATION_DECODE: "decode",
    tokenizer_pb2.STREAM_OPERATION_RECOGNIZE: "recognize",
}


@dataclass(frozen=True)
class StreamPlan:
    """A checked configuration. `max_age_seconds` 0 never drops; `model` may be None."""

    operation: Operation
    model: ServedModel | None
    image_format: ImageFormat
    top_k: int
    max_age_seconds: float

    @property
    def model_label(self) -> str:
        """Metric label of the stream's model."""
        return self.model.name if self.model else UNKNOWN_MODEL


@dataclass(frozen=True)
class Arrival:
    """One frame and when it came, on this machine's monotonic clock."""

    frame: tokenizer_pb2.StreamFrame
    at: float = field(default_factory=time.monotonic)


class FrameStreams:
    """Serves streams; at most `gate.limit` at once."""

    def __init__(
        self,
        core: TokenizerCore,
        gate: AdmissionGate,
        queue_frames: int,
        refusing: asyncio.Event,
    ) -> None:
        self._core = core
        self._gate = gate
        self._queue_frames = queue_frames
        self._refusing = refusing

    async def stream(
        self, requests: Requests, transport: Transport
    ) -> AsyncGenerator[tokenizer_pb2.StreamFramesResponse, None]:
        """Ready once, then one result per frame that was not dropped."""
        with self._gate.admit(), _counted(self._core.metrics):
            plan = await self._plan(requests)
            yield self._ready(plan)
            inbox = _Inbox(plan, self._queue_frames, self._core)
            reader = asyncio.create_task(inbox.fill(requests, self._refusing))
            worker = _StreamWorker(self._core, plan, transport)
            try:
                while (arrival := await inbox.take()) is not None:
                    result = await worker.answer(arrival.frame)
                    result.dropped_before = inbox.take_dropped()
                    yield tokenizer_pb2.StreamFramesResponse(result=result)
                await reader
            finally:
                reader.cancel()
                await asyncio.gather(reader, return_exceptions=True)
                worker.summarize()

    async def _plan(self, requests: Requests) -> StreamPlan:
        async for request in requests:
            if request.WhichOneof("message") != "config":
                raise InvalidStream("the first message of a stream must be its config")
            return self._checked(request.config)
        raise InvalidStream("the stream ended before its config")

    def _checked(self, config: tokenizer_pb2.StreamConfig) -> StreamPlan:
        operation = _OPERATIONS.get(config.operation)
        if operation is None:
            raise InvalidStream(
                f"stream operation {config.operation} is unknown; use encode, decode or recognize",
                field="operation",
            )
        model = self._core.models.by_name(config.model) if config.model else None
        if operation == "encode":
            model = self._core.named_model(config.model)
        return StreamPlan(
            operation,
            model,
            convert.image_format(config.format),
            checked_top_k(config.top_k),
            config.max_age_ms / 1000,
        )

    def _ready(self, plan: StreamPlan) -> tokenizer_pb2.StreamFramesResponse:
        info = convert.model_info(plan.model.card) if plan.model else None
        ready = tokenizer_pb2.StreamReady(
            model=info, max_payload_bytes=self._core.max_payload_bytes
        )
        return tokenizer_pb2.StreamFramesResponse(ready=ready)


@contextmanager
def _counted(metrics: ScqMetrics) -> Iterator[None]:
    started = time.monotonic()
    metrics.streams_active.inc()
    try:
        yield
    finally:
        metrics.streams_active.dec()
        metrics.stream_duration.observe(time.monotonic() - started)


class _Inbox:
    """Frames that were read and wait. Without a maximum age a full inbox stops the reading, so
    the sender feels it; with one, the oldest frame makes room."""

    def __init__(self, plan: StreamPlan, size: int, core: TokenizerCore) -> None:
        self._plan = plan
        self._core = core
        self._queue: asyncio.Queue[Arrival | None] = asyncio.Queue(size)
        self._dropped = 0

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
            limit = self._plan.max_age_seconds
            if not limit or time.monotonic() - arrival.at <= limit:
                return arrival
            self._drop("stale")
        return None

    def take_dropped(self) -> int:
        """Frames dropped since this was last asked."""
        dropped, self._dropped = self._dropped, 0
        return dropped

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
            self._queue.get_nowait()
            self._drop("overload")
        await self._queue.put(arrival)

    def _drop(self, reason: str) -> None:
        self._dropped += 1
        self._core.metrics.dropped.labels(self._plan.model_label, reason).inc()


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


class _StreamWorker:
    """Answers the frames of one stream and watches its bitrate."""

    def __init__(self, core: TokenizerCore, plan: StreamPlan, transport: Transport) -> None:
        self._core = core
        self._plan = plan
        self._transport = transport
        self._window_started = time.monotonic()
        self._window_bytes = 0
        self._frames = 0
        self._failed = 0
        self._coded_bytes = 0

    def summarize(self) -> None:
        """Put the stream's totals on its log line."""
        annotate(
            model=self._plan.model_label,
            operation=self._plan.operation,
            frames=self._frames,
            failed=self._failed,
            coded_bytes=self._coded_bytes,
        )

    async def answer(self, frame: tokenizer_pb2.StreamFrame) -> tokenizer_pb2.FrameResult:
        """The result of one frame; its failure is part of the result."""
        self._frames += 1
        result = tokenizer_pb2.FrameResult(seq=frame.seq, capture_ns=frame.capture_ns)
        try:
            with self._core.frame(self._plan.operation, self._transport) as record:
                await self._work(frame, record, result)
        except ServiceError as error:
            self._fail(result, error)
        except Exception as error:
            self._fail(result, as_service_error(error, current_request_id()))
        else:
            result.timings.extend(convert.timings(record.clock.seconds))
        return result

    async def _work(
        self,
        frame: tokenizer_pb2.StreamFrame,
        record: FrameRecord,
        result: tokenizer_pb2.FrameResult,
    ) -> None:
        if self._plan.model is not None:
            record.model = self._plan.model.name
        payload = frame.WhichOneof("payload")
        if payload is None:
            raise EmptyPayload("the frame carries neither image nor codes", field="payload")
        self._require_kind(payload)
        if self._plan.operation == "encode":
            await self._encode(frame, record, result)
        elif self._plan.operation == "decode":
            await self._decode(frame, record, result)
        else:
            await self._recognize(frame, record, result)

    def _require_kind(self, payload: str) -> None:
        wanted = {"encode": ("image",), "decode": ("codes",), "recognize": ("image", "codes")}
        if payload not in wanted[self._plan.operation]:
            raise InvalidStream(
                f"an {self._plan.operation} stream takes "
                f"{' or '.join(wanted[self._plan.operation])}, not {payload}",
                field="payload",
            )

    async def _encode(
        self,
        frame: tokenizer_pb2.StreamFrame,
        record: FrameRecord,
        result: tokenizer_pb2.FrameResult,
    ) -> None:
        model = self._plan.model or self._core.named_model("")
        encoded = await self._core.encode_image(record, model, frame.image)
        result.codes = encoded.codes
        result.bpp = encoded.bpp
        self._count_bytes(record.model, len(encoded.codes))

    async def _decode(
        self,
        frame: tokenizer_pb2.StreamFrame,
        record: FrameRecord,
        result: tokenizer_pb2.FrameResult,
    ) -> None:
        decoded = await self._core.decode_codes(
            record, frame.codes, self._plan.image_format, self._plan.model
        )
        result.image = decoded.image
        result.bpp = 8 * len(frame.codes) / (decoded.width * decoded.height)
        self._count_bytes(record.model, len(frame.codes))

    async def _recognize(
        self,
        frame: tokenizer_pb2.StreamFrame,
        record: FrameRecord,
        result: tokenizer_pb2.FrameResult,
    ) -> None:
        if frame.WhichOneof("payload") == "image":
            model = self._plan.model or self._core.named_model("")
            recognized = await self._core.recognize_image(record, model, frame.image)
            result.codes = recognized.codes
        else:
            recognized = await self._core.recognize_codes(record, frame.codes, self._plan.model)
        result.labels.extend(convert.labels(recognized.labels[: self._plan.top_k]))
        self._count_bytes(record.model, len(recognized.codes))

    def _fail(self, result: tokenizer_pb2.FrameResult, error: ServiceError) -> None:
        self._failed += 1
        if isinstance(error, ResourceExhausted):
            self._core.metrics.dropped.labels(self._plan.model_label, "overload").inc()
        result.error.CopyFrom(convert.frame_error(error))

    def _count_bytes(self, model: str, coded_bytes: int) -> None:
        self._coded_bytes += coded_bytes
        self._window_bytes += coded_bytes
        elapsed = time.monotonic() - self._window_started
        if elapsed >= BITRATE_WINDOW_SECONDS:
            bitrate = 8 * self._window_bytes / elapsed
            self._core.metrics.stream_bitrate.labels(model).observe(bitrate)
            self._window_started = time.monotonic()
            self._window_bytes = 0
