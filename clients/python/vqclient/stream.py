"""One frame stream: a writer that keeps to a window, a reader that gives its answers.

Knows the order of the stream's messages; knows no pixels. The window is what gives
back-pressure: a frame takes a place when it is written, and its result frees every place up to
its seq, because results come in the order of the frames.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

import grpc
from grpc import StatusCode

from vqclient import convert
from vqclient.client import Metadata, ReplyStream, ServiceClient, unexpected_reply
from vqclient.errors import DeadlineExceededError, InvalidArgumentError
from vqclient.retry import call_with_retry
from vqclient.types import Frame, FrameResult
from vqstack.tokenizer.v1 import tokenizer_pb2

# The server's end of stream may be read before our own half-close has returned.
_SETTLE_SECONDS = 1.0


class FrameCall(ReplyStream, Protocol):
    """A StreamFrames call in progress."""

    async def write(self, request: tokenizer_pb2.StreamFramesRequest, /) -> None: ...

    async def done_writing(self) -> None: ...


@dataclass(frozen=True)
class OpenStream:
    """A stream whose configuration the server accepted; `max_payload_bytes` 0 is no limit."""

    call: FrameCall
    max_payload_bytes: int


class Window:
    """Frames in flight, at most `size` (None: any number).

    With a positive `max_age` (seconds) the server may drop frames without an answer, so a full
    window is waited for that long at most.
    """

    def __init__(self, size: int | None, max_age: float) -> None:
        self._size = size
        self._max_age = max_age
        self._unanswered: deque[int] = deque()
        self._freed = asyncio.Event()

    async def free(self) -> None:
        """Wait for a place."""
        if not self._is_full():
            return
        try:
            async with asyncio.timeout(self._max_age or None):
                await self._until_free()
        except TimeoutError:
            self._unanswered.popleft()

    def take(self, seq: int) -> None:
        """Give a place to frame `seq`."""
        self._unanswered.append(seq)

    def answered(self, seq: int) -> None:
        """Free the places of frame `seq` and of the dropped frames before it."""
        while self._unanswered and self._unanswered[0] <= seq:
            self._unanswered.popleft()
        self._freed.set()

    def _is_full(self) -> bool:
        return self._size is not None and len(self._unanswered) >= self._size

    async def _until_free(self) -> None:
        while self._is_full():
            self._freed.clear()
            await self._freed.wait()


async def open_stream(
    client: ServiceClient,
    start: Callable[[Metadata], FrameCall],
    config: tokenizer_pb2.StreamFramesRequest,
) -> OpenStream:
    """Send the configuration and wait for Ready, with the client's retries and timeout."""

    async def attempt(remaining: float) -> OpenStream:
        call = start(client.options.call_metadata())
        try:
            async with asyncio.timeout(remaining), _cancelled_on_error(call):
                return await _handshake(client, call, config)
        except TimeoutError as error:
            raise DeadlineExceededError(
                f"the {client.service} service at {client.address} did not open the stream "
                f"within {client.options.timeout:g} s",
                code=StatusCode.DEADLINE_EXCEEDED,
            ) from error

    return await call_with_retry(attempt, client.options.retry, client.options.timeout)


@asynccontextmanager
async def _cancelled_on_error(call: FrameCall) -> AsyncIterator[None]:
    try:
        yield
    except BaseException:
        call.cancel()
        raise


async def _handshake(
    client: ServiceClient, call: FrameCall, config: tokenizer_pb2.StreamFramesRequest
) -> OpenStream:
    with client.typed_errors():
        await call.write(config)
    reply = await client.read(call, tokenizer_pb2.StreamFramesResponse)
    if reply is None or not reply.HasField("ready"):
        raise unexpected_reply("the stream did not begin with Ready")
    return OpenStream(call, reply.ready.max_payload_bytes)


async def exchange(
    client: ServiceClient,
    opened: OpenStream,
    frames: AsyncIterable[Frame] | Iterable[Frame],
    window: Window,
) -> AsyncGenerator[FrameResult, None]:
    """Write `frames` as the window allows and give the results as they come."""
    writer = asyncio.create_task(_write_all(opened, frames, window))
    try:
        while (reply := await _next_reply(client, opened.call, writer)) is not None:
            window.answered(reply.result.seq)
            yield convert.frame_result(reply.result)
        await _settle(client, writer)
    finally:
        writer.cancel()
        opened.call.cancel()
        await asyncio.gather(writer, return_exceptions=True)


async def _settle(client: ServiceClient, writer: asyncio.Task[None]) -> None:
    """After the last result: raise what the frame source raised, or that the end came too soon."""
    await asyncio.wait({writer}, timeout=_SETTLE_SECONDS)
    if not writer.done():
        raise unexpected_reply(f"the {client.service} service ended the stream before its frames")
    writer.result()


async def _write_all(
    opened: OpenStream, frames: AsyncIterable[Frame] | Iterable[Frame], window: Window
) -> None:
    """Write every frame; when the call is over, stop and let the reader report why."""
    await window.free()
    async for frame in _each(frames):
        _require_payload_size(frame, opened.max_payload_bytes)
        window.take(frame.seq)
        try:
            await opened.call.write(convert.stream_frame(frame))
        except (asyncio.InvalidStateError, grpc.aio.AioRpcError):
            return
        await window.free()
    await opened.call.done_writing()


async def _next_reply(
    client: ServiceClient, call: FrameCall, writer: asyncio.Task[None]
) -> tokenizer_pb2.StreamFramesResponse | None:
    """The next result; None at the end. A failed frame source ends the wait with its error."""
    reader = asyncio.create_task(client.read(call, tokenizer_pb2.StreamFramesResponse))
    try:
        if not writer.done():
            await asyncio.wait({reader, writer}, return_when=asyncio.FIRST_COMPLETED)
        if writer.done() and not reader.done():
            writer.result()
        reply = await reader
    finally:
        reader.cancel()
    if reply is not None and not reply.HasField("result"):
        raise unexpected_reply("the stream sent Ready a second time")
    return reply


def _require_payload_size(frame: Frame, max_payload_bytes: int) -> None:
    if 0 < max_payload_bytes < frame.payload_bytes:
        raise InvalidArgumentError(
            f"frame {frame.seq} has {frame.payload_bytes} bytes, the stream takes "
            f"{max_payload_bytes}; send a smaller picture",
            code=StatusCode.INVALID_ARGUMENT,
            reason="PAYLOAD_TOO_LARGE",
        )


async def _each(frames: AsyncIterable[Frame] | Iterable[Frame]) -> AsyncIterator[Frame]:
    if isinstance(frames, AsyncIterable):
        async for frame in frames:
            yield frame
    else:
        for frame in frames:
            yield frame
