"""Image files out of a video file, and the pace of a live camera. Needs the extra `video` (PyAV).

Knows video files and clocks; knows no service.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self, cast

from vqclient.types import Frame, ImageFormat

if TYPE_CHECKING:
    import av

# Encoder and pixel format of each image format; quantizer 2 is the finest that mjpeg offers.
_ENCODERS = {ImageFormat.JPEG: ("mjpeg", "yuvj420p"), ImageFormat.PNG: ("png", "rgb24")}
_JPEG_QUANTIZER = 2
_FALLBACK_RATE = 30.0
_MAX_SIDE = 8192


class VideoError(Exception):
    """A video that cannot be read, or options that do not fit it."""


@dataclass(frozen=True)
class VideoOptions:
    """Which frames are taken and how they are sent.

    `fps` frames per second, None for all of the video's; `size` (width, height) in pixels, None
    for the video's.
    """

    fps: float | None = None
    size: tuple[int, int] | None = None
    format: ImageFormat = ImageFormat.JPEG

    def __post_init__(self) -> None:
        if self.fps is not None and not 0 < self.fps <= 1000:
            raise VideoError(f"fps is {self.fps}; give a number above 0 and at most 1000")
        if self.size is not None and not all(0 < side <= _MAX_SIDE for side in self.size):
            raise VideoError(
                f"size is {self.size[0]}x{self.size[1]}; both sides must be 1 to {_MAX_SIDE} pixels"
            )
        if self.format not in _ENCODERS:
            raise VideoError(f"frames cannot be sent as {self.format}; choose jpeg or png")


def parse_size(text: str) -> tuple[int, int]:
    """Width and height of "WxH"."""
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise VideoError(f"size is {text!r}; write WIDTHxHEIGHT, for example 640x384")
    return int(width), int(height)


class VideoReader:
    """Reads a video as image files, one at a time; `rate` is in frames per second."""

    def __init__(self, path: Path, options: VideoOptions) -> None:
        self._container = _open(path)
        if not self._container.streams.video:
            self._container.close()
            raise VideoError(f"{path} has no video stream; give a video file")
        stream = self._container.streams.video[0]
        native_rate = float(stream.average_rate or _FALLBACK_RATE)
        self.rate = min(options.fps or native_rate, native_rate)
        # Presentation times are rounded to the stream's time base: half a period of slack.
        self._slack = 0.5 / native_rate
        self._options = options
        self._path = path
        self._frames = self._sampled(self._container.decode(stream))
        self._encoder: av.VideoCodecContext | None = None
        self._num_encoded = 0
        self._lock = threading.Lock()
        self._is_closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # A reading thread that nobody awaits any more may still be at work after Ctrl-C.
        with self._lock:
            self._is_closed = True
            self._container.close()

    def read(self, num_skipped: int = 0) -> bytes | None:
        """The next frame as an image file after leaving out `num_skipped`; None at the end."""
        with self._lock:
            frame = None if self._is_closed else self._next_frame(num_skipped)
            return None if frame is None else self._encode(frame)

    def _next_frame(self, num_skipped: int) -> av.VideoFrame | None:
        import av

        try:
            for _ in range(num_skipped):
                next(self._frames, None)
            return next(self._frames, None)
        except av.error.FFmpegError as error:
            raise VideoError(f"{self._path} is damaged: {error.strerror}") from error

    def _sampled(self, frames: Iterator[av.VideoFrame]) -> Iterator[av.VideoFrame]:
        """Every frame that is due at `rate`, by its presentation time."""
        num_taken = 0
        for frame in frames:
            if frame.time is None or frame.time + self._slack >= num_taken / self.rate:
                num_taken += 1
                yield frame

    def _encode(self, frame: av.VideoFrame) -> bytes:
        width, height = self._options.size or (frame.width, frame.height)
        if self._encoder is None:
            self._encoder = _image_encoder(self._options.format, width, height)
        picture = frame.reformat(width=width, height=height, format=self._encoder.pix_fmt)
        # The encoder insists on growing times, and the video's may be missing.
        picture.pts, picture.time_base = self._num_encoded, self._encoder.time_base
        self._num_encoded += 1
        return b"".join(bytes(packet) for packet in self._encoder.encode(picture))


class LiveFrames:
    """The frames of a video at the pace of a camera: when asked late, older frames are dropped.

    `capture_ns` is when the frame was due on the monotonic clock. With `paced` False every frame
    is given as soon as it is asked for. Latency is `time.monotonic_ns() - capture_ns`.
    """

    def __init__(self, reader: VideoReader, *, paced: bool, max_frames: int | None = None) -> None:
        self.num_dropped = 0
        self.num_sent = 0
        self.sent_bytes = 0
        self._reader = reader
        self._paced = paced
        self._max_frames = max_frames

    async def __aiter__(self) -> AsyncIterator[Frame]:
        seq, image = 0, await asyncio.to_thread(self._reader.read)
        start_ns = time.monotonic_ns()
        while image is not None:
            self.num_sent += 1
            self.sent_bytes += len(image)
            yield Frame(seq, image, capture_ns=await self._wait_until_due(start_ns, seq))
            num_skipped = self._num_overdue(start_ns, seq + 1)
            seq += 1 + num_skipped
            if self._max_frames is not None and seq >= self._max_frames:
                return
            image = await asyncio.to_thread(self._reader.read, num_skipped)
            self.num_dropped += num_skipped if image is not None else 0

    def _num_overdue(self, start_ns: int, seq: int) -> int:
        """Frames that a newer one has already replaced."""
        if not self._paced:
            return 0
        newest = int((time.monotonic_ns() - start_ns) * self._reader.rate / 1e9)
        if self._max_frames is not None:
            newest = min(newest, self._max_frames - 1)
        return max(newest - seq, 0)

    async def _wait_until_due(self, start_ns: int, seq: int) -> int:
        if not self._paced:
            return time.monotonic_ns()
        due_ns = start_ns + int(seq * 1e9 / self._reader.rate)
        await asyncio.sleep(max(due_ns - time.monotonic_ns(), 0) / 1e9)
        return due_ns


def _open(path: Path) -> av.container.InputContainer:
    try:
        import av
    except ImportError as error:
        raise VideoError("reading video needs PyAV: pip install 'vqclient[video]'") from error
    try:
        return av.open(str(path), mode="r")
    except (av.error.FFmpegError, OSError) as error:
        raise VideoError(f"cannot open video {path}: {error.strerror or error}") from error


def _image_encoder(image_format: ImageFormat, width: int, height: int) -> av.VideoCodecContext:
    import av

    name, pixel_format = _ENCODERS[image_format]
    encoder = cast(av.VideoCodecContext, av.CodecContext.create(name, "w"))
    encoder.width, encoder.height = width, height
    encoder.pix_fmt = pixel_format
    encoder.time_base = Fraction(1, 1000)
    if image_format is ImageFormat.JPEG:
        encoder.qmin = encoder.qmax = _JPEG_QUANTIZER
    return encoder
