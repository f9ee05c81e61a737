"""Answers the frames of one stream: the state that its codes build on, its sizes and its ages.

Knows the contract's frames and results; leaves the order of messages to `streams`.
"""

from __future__ import annotations

import asyncio
import time

from scq.codec import CodedPicture, FrameDecoder, FrameEncoder
from scq.images import Pixels
from vqserve.common.errors import ResourceExhausted, ServiceError
from vqserve.common.interceptors import as_service_error
from vqserve.common.logging import annotate, current_request_id
from vqserve.tokenizer import convert
from vqserve.tokenizer.codecs import ServedModel
from vqserve.tokenizer.core import FrameRecord, TokenizerCore, Transport
from vqserve.tokenizer.errors import (
    CorruptCodes,
    EmptyPayload,
    InvalidStream,
    ReferenceMismatch,
)
from vqserve.tokenizer.pipeline import EncodedPicture, require_head
from vqserve.tokenizer.stream_inbox import Arrival, Inbox
from vqserve.tokenizer.stream_plan import StreamPlan
from vqstack.tokenizer.v1 import tokenizer_pb2

BITRATE_WINDOW_SECONDS = 1.0
# What a frame of codes can fail with so that the next delta frame will not find its reference.
LOSES_REFERENCE = (CorruptCodes, ReferenceMismatch, ResourceExhausted)

_PAYLOADS = {"encode": ("image",), "decode": ("codes",), "recognize": ("image", "codes")}


class StreamWorker:
    """One stream's encoder, decoder and totals. Frames may be prepared and finished side by side;
    what touches encoder or decoder happens in the frames' turns."""

    def __init__(
        self, core: TokenizerCore, plan: StreamPlan, inbox: Inbox, transport: Transport
    ) -> None:
        self._core = core
        self._plan = plan
        self._inbox = inbox
        self._transport = transport
        self._model = plan.model
        self._encoder: FrameEncoder | None = None
        # Reads what the client sends; what this stream encodes itself is another chain of frames.
        self._decoder: FrameDecoder | None = None
        self._own_decoder: FrameDecoder | None = None
        self._totals = StreamTotals(core, plan)

    def summarize(self) -> None:
        """Put the stream's totals on its log line."""
        self._totals.summarize()

    async def answer(
        self, arrival: Arrival, turn: asyncio.Event, following: asyncio.Event
    ) -> tokenizer_pb2.FrameResult | None:
        """The result of one frame, or None when it grew too old; a failure is part of the result.

        Coding waits for `turn`, and sets `following` when the next frame may be coded.
        """
        job = _Job(arrival, FrameRecord(self._plan.operation, self._transport))
        job.record.started = arrival.at
        job.record.model = self._plan.model_label
        try:
            await self._prepare(job)
            await turn.wait()
            if self._inbox.is_stale(arrival):
                self._inbox.drop(arrival, "stale")
                return None
            self._totals.begin(arrival)
            with self._core.frame(job.record):
                await self._code(job)
                following.set()
                await self._finish(job)
        except ServiceError as error:
            self._fail(job, error)
        except Exception as error:
            self._fail(job, as_service_error(error, current_request_id()))
        else:
            job.result.timings.extend(convert.timings(job.record.clock.seconds))
        finally:
            following.set()
        return job.result

    async def _prepare(self, job: _Job) -> None:
        """Read the picture while the frame before is coded; a failure waits for its turn."""
        try:
            self._check_payload(job.arrival.frame)
            if job.is_image:
                job.pixels = await self._core.pipeline.open(
                    job.arrival.frame.image, job.record.clock
                )
        except ServiceError as error:
            job.failure = error

    def _check_payload(self, frame: tokenizer_pb2.StreamFrame) -> None:
        payload = frame.WhichOneof("payload")
        if payload is None:
            raise EmptyPayload("the frame carries neither image nor codes", field="payload")
        wanted = _PAYLOADS[self._plan.operation]
        if payload not in wanted:
            raise InvalidStream(
                f"an {self._plan.operation} stream takes {' or '.join(wanted)}, not {payload}",
                field="payload",
            )
        self._core.require_payload(frame.image if payload == "image" else frame.codes, payload)

    async def _code(self, job: _Job) -> None:
        """What must happen in the order of the frames."""
        if job.failure is not None:
            raise job.failure
        if job.is_image:
            await self._encode(job)
        else:
            await self._read_codes(job)

    async def _encode(self, job: _Job) -> None:
        model, frame = self._model or self._core.named_model(""), job.arrival.frame
        if self._plan.operation == "recognize":
            require_head(model)
        assert job.pixels is not None, "a prepared image without pixels"
        if self._encoder is None:
            self._encoder = self._plan.coding.encoder(model.codec, self._plan.keyframe_interval)
        if frame.request_keyframe:
            self._core.metrics.keyframe_requested(model.name, "received")
        wants_key = self._inbox.take_key_wanted() or frame.request_keyframe
        coded = await self._core.pipeline.encode_next(
            self._encoder, job.pixels, wants_key, job.record.clock
        )
        self._core.count_encoded(EncodedPicture(model, job.pixels, coded, len(frame.image)))
        self._totals.count(model.name, len(coded.codes))
        job.result.codes, job.result.bpp = coded.codes, coded.stats.bpp
        job.result.frame_type = convert.frame_type_number(coded.stats.frame_type)
        job.result.base_bytes, job.result.complete = coded.stats.base_bytes, True
        if self._plan.operation == "recognize":
            self._own_decoder = self._own_decoder or model.codec.frame_decoder()
            await self._read(job, model, self._own_decoder, coded.codes)

    async def _read_codes(self, job: _Job) -> None:
        codes = job.arrival.frame.codes
        model, header = await self._core.accept_codes(
            job.record, codes, self._plan.allow_partial, self._model
        )
        job.result.frame_type = convert.frame_type_number(header.frame_type)
        if self._plan.operation == "recognize":
            require_head(model)
        await self._read(job, model, self._decoder_of(model), codes)
        # From its first good frame on, a stream keeps to that frame's model.
        self._model = model
        self._totals.count(model.name, len(codes))

    async def _read(
        self, job: _Job, model: ServedModel, decoder: FrameDecoder, codes: bytes
    ) -> None:
        picture = await self._core.pipeline.read(
            decoder, codes, self._plan.allow_partial, job.record.clock
        )
        placement = picture.placement
        job.decoded = model, picture
        job.result.bpp = 8 * len(codes) / (placement.width * placement.height)
        job.result.complete = picture.complete
        self._core.count_partial(job.record, picture.complete)
        if not picture.complete:
            self._need_keyframe(job, model.name)

    def _decoder_of(self, model: ServedModel) -> FrameDecoder:
        if self._decoder is None or self._model is not model:
            self._decoder = model.codec.frame_decoder()
        return self._decoder

    async def _finish(self, job: _Job) -> None:
        """Make the picture or the labels while the next frame is coded."""
        if job.decoded is None:
            return
        model, picture = job.decoded
        pipeline, clock = self._core.pipeline, job.record.clock
        if self._plan.operation == "recognize":
            found = await pipeline.label(model, picture, clock)
            job.result.labels.extend(convert.labels(found[: self._plan.top_k]))
        else:
            job.result.image = await pipeline.render(model, picture, self._plan.image_format, clock)

    def _fail(self, job: _Job, error: ServiceError) -> None:
        self._totals.failed += 1
        model, frame = job.record.model, job.arrival.frame
        if isinstance(error, ResourceExhausted):
            self._core.metrics.dropped(model, "overload")
        elif isinstance(error, ReferenceMismatch):
            self._core.metrics.dropped(model, "no_keyframe")
        elif isinstance(error, CorruptCodes):
            self._core.metrics.dropped(model, "corrupt")
        if job.is_image:
            self._recover(frame)
        job.result = tokenizer_pb2.FrameResult(seq=frame.seq, capture_ns=frame.capture_ns)
        job.result.error.CopyFrom(convert.frame_error(error))
        if not job.is_image and isinstance(error, LOSES_REFERENCE):
            self._need_keyframe(job, model)

    def _recover(self, frame: tokenizer_pb2.StreamFrame) -> None:
        """After a picture that failed: its codes, if there were any, never reached the client."""
        if frame.request_keyframe:
            self._inbox.want_key()

    def _need_keyframe(self, job: _Job, model: str) -> None:
        job.result.keyframe_needed = True
        self._core.metrics.keyframe_requested(model, "sent")


class _Job:
    """One frame on its way through the worker."""

    def __init__(self, arrival: Arrival, record: FrameRecord) -> None:
        frame = arrival.frame
        self.arrival = arrival
        self.record = record
        self.result = tokenizer_pb2.FrameResult(seq=frame.seq, capture_ns=frame.capture_ns)
        self.is_image = frame.WhichOneof("payload") == "image"
        self.pixels: Pixels | None = None
        self.decoded: tuple[ServedModel, CodedPicture] | None = None
        self.failure: ServiceError | None = None


class StreamTotals:
    """Counts and sizes of one stream, and its coded rate about once a second."""

    def __init__(self, core: TokenizerCore, plan: StreamPlan) -> None:
        self._core = core
        self._plan = plan
        self._window_started = time.monotonic()
        self._window_bytes = 0
        self._quickest_ns: int | None = None
        self.frames = 0
        self.failed = 0
        self.coded_bytes = 0

    def begin(self, arrival: Arrival) -> None:
        """Count one frame whose work begins, and how much older it is than the quickest one."""
        self.frames += 1
        if not arrival.frame.capture_ns:
            return
        delay = time.time_ns() - arrival.frame.capture_ns
        if self._quickest_ns is None or delay < self._quickest_ns:
            self._quickest_ns = delay
        self._core.metrics.aged(self._plan.model_label, (delay - self._quickest_ns) / 1e9)

    def count(self, model: str, coded_bytes: int) -> None:
        """Count the bytes of one frame's codes."""
        self.coded_bytes += coded_bytes
        self._window_bytes += coded_bytes
        elapsed = time.monotonic() - self._window_started
        if elapsed >= BITRATE_WINDOW_SECONDS:
            self._core.metrics.bitrate(model, 8 * self._window_bytes / elapsed)
            self._window_started = time.monotonic()
            self._window_bytes = 0

    def summarize(self) -> None:
        """Put the totals on the stream's log line."""
        annotate(
            model=self._plan.model_label,
            operation=self._plan.operation,
            frames=self.frames,
            failed=self.failed,
            coded_bytes=self.coded_bytes,
        )
