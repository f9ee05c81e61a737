"""Frame streams: each request is one frame on one of the open streams, answered by its seq."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from openloop.drivers.base import Driver
from openloop.outcome import Fate, Reply, RequestFailed
from vqclient import (
    NO_RETRY,
    ClientOptions,
    Frame,
    FrameResult,
    ResourceExhaustedError,
    StreamOptions,
    TokenizerClient,
    VqError,
)


class FrameStream:
    """One open stream: frames go in at any time, each is awaited by its own future."""

    def __init__(self, client: TokenizerClient, model: str, options: StreamOptions) -> None:
        self._queue: asyncio.Queue[Frame | None] = asyncio.Queue()
        self._waiting: dict[int, asyncio.Future[FrameResult]] = {}
        self._num_frames = 0
        results = client.stream_frames(self._frames(), model=model, options=options)
        self._reader = asyncio.create_task(self._read(results))

    async def send(self, image: bytes) -> FrameResult:
        """Send one frame and wait for its result; RequestFailed when it was dropped."""
        if self._reader.done():
            raise RequestFailed(Fate.ERROR, "STREAM_ENDED")
        seq, self._num_frames = self._num_frames, self._num_frames + 1
        self._waiting[seq] = asyncio.get_running_loop().create_future()
        self._queue.put_nowait(Frame(seq=seq, image=image))
        return await self._waiting[seq]

    async def close(self) -> None:
        """Half-close, and give the server a moment to end the stream."""
        self._queue.put_nowait(None)
        await asyncio.wait({self._reader}, timeout=5.0)
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)

    async def _frames(self) -> AsyncIterator[Frame]:
        while (frame := await self._queue.get()) is not None:
            yield frame

    async def _read(self, results: AsyncIterator[FrameResult]) -> None:
        failure: Exception = RequestFailed(Fate.DROPPED, "TOO_OLD")
        try:
            async for result in results:
                self._settle(result)
        except VqError as error:
            failure = error
        for seq in list(self._waiting):
            self._fail(seq, failure)

    def _settle(self, result: FrameResult) -> None:
        """Answer a frame; frames before it that were not answered were dropped."""
        for seq in [waiting for waiting in self._waiting if waiting < result.seq]:
            self._fail(seq, RequestFailed(Fate.DROPPED, "TOO_OLD"))
        future = self._waiting.pop(result.seq, None)
        if future is not None and not future.done():
            future.set_result(result)

    def _fail(self, seq: int, failure: Exception) -> None:
        future = self._waiting.pop(seq)
        if not future.done():
            future.set_exception(failure)


class StreamDriver(Driver):
    """Encodes frames over `num_streams` streams in turn."""

    async def open(self) -> None:
        self._client = TokenizerClient(self.address, ClientOptions(retry=NO_RETRY))
        self._images = self.workload.images()
        # No window: an open loop sends whatever is due.
        options = StreamOptions(
            max_age_ms=self.workload.max_age_ms,
            max_in_flight=None,
            keyframe_interval=self.workload.keyframe_interval or None,
        )
        self._streams = [
            FrameStream(self._client, self.workload.model or "nav", options)
            for _ in range(self.workload.num_streams)
        ]
        for index in range(self.workload.num_streams):
            await self.send(index)

    async def close(self) -> None:
        await asyncio.gather(*(stream.close() for stream in self._streams))
        await self._client.close()

    async def send(self, index: int) -> Reply:
        image = self._images[index % len(self._images)]
        result = await self._streams[index % len(self._streams)].send(image)
        if result.error is not None:
            busy = isinstance(result.error, ResourceExhaustedError)
            raise RequestFailed(Fate.REJECTED if busy else Fate.ERROR, result.error.reason)
        return Reply(len(image), len(result.codes))
