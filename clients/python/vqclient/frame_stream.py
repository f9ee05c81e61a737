"""A frame stream as an object: send here, receive there, ask for key frames from anywhere.

Knows frames and results; knows neither the messages on the wire nor pixels.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from types import TracebackType
from typing import Self

from grpc import StatusCode

from vqclient.errors import UnavailableError, VqError
from vqclient.types import Frame, FrameResult, FrameType

Frames = AsyncIterator[Frame]
# A key frame that was asked for and has not come by then is asked for again, in seconds.
ASK_AGAIN_AFTER = 1.0


class FrameStream:
    """One open stream, used as an async context manager and iterated for its results.

    `send` waits while the stream is full, so results must be read at the same time as frames are
    sent. When a result says that a key frame is needed, `on_keyframe_needed` is called: once, and
    again only if none has come after a second.

        async with client.open_stream(model="nav") as encoder:
            decoder = client.open_stream(
                operation=Operation.DECODE, on_keyframe_needed=encoder.request_keyframe
            )
    """

    def __init__(
        self,
        start: Callable[[Frames], AsyncGenerator[FrameResult, None]],
        on_keyframe_needed: Callable[[], None] | None = None,
    ) -> None:
        self._queue: asyncio.Queue[Frame | None] = asyncio.Queue(1)
        self._results = start(self._frames())
        self._on_keyframe_needed = on_keyframe_needed
        self._num_sent = 0
        self._wants_keyframe = False
        self._asked_at: float | None = None
        self._ended = asyncio.Event()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ended.set()
        await self._results.aclose()

    def __aiter__(self) -> AsyncIterator[FrameResult]:
        return self

    async def __anext__(self) -> FrameResult:
        """The next result; ends after that of the last frame. Raises VqError."""
        try:
            result = await anext(self._results)
        except (StopAsyncIteration, VqError):
            self._ended.set()
            raise
        self._watch(result)
        return result

    async def send(self, *, image: bytes = b"", codes: bytes = b"", capture_ns: int = 0) -> int:
        """Send one picture or one coded frame; its seq, which its result echoes."""
        frame = Frame(self._num_sent, image, codes, capture_ns, self._wants_keyframe)
        self._num_sent += 1
        self._wants_keyframe = False
        if not await self._put(frame):
            raise UnavailableError(
                "the stream has ended; its results say why",
                code=StatusCode.UNAVAILABLE,
                reason="STREAM_ENDED",
            )
        return frame.seq

    async def finish(self) -> None:
        """Say that no more frames will come; the results still due end the iteration."""
        await self._put(None)

    def request_keyframe(self) -> None:
        """Have the next picture that is sent coded as a key frame."""
        self._wants_keyframe = True

    async def _put(self, frame: Frame | None) -> bool:
        """Wait for room; False when the stream ended instead."""
        putting = asyncio.create_task(self._queue.put(frame))
        ending = asyncio.create_task(self._ended.wait())
        try:
            await asyncio.wait({putting, ending}, return_when=asyncio.FIRST_COMPLETED)
            return not self._ended.is_set()
        finally:
            putting.cancel()
            ending.cancel()

    async def _frames(self) -> Frames:
        while (frame := await self._queue.get()) is not None:
            yield frame

    def _watch(self, result: FrameResult) -> None:
        if result.error is None and result.complete and result.frame_type is FrameType.KEY:
            self._asked_at = None
        if not result.keyframe_needed or self._on_keyframe_needed is None:
            return
        now = time.monotonic()
        if self._asked_at is None or now - self._asked_at >= ASK_AGAIN_AFTER:
            self._asked_at = now
            self._on_keyframe_needed()
