"""The stages of one frame, each on a worker thread so that the event loop never blocks.

A cancelled or expired call stops before its next stage: a stage that waits for a thread is
never started, one that runs is left to end and its result dropped. Knows no protobuf and no
transport.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from scq.bitstream import FrameHeader, parse_header
from scq.codec import CodedPicture, EncodedFrame, FrameEncoder, Label
from scq.images import Pixels, read_image
from vqserve.tokenizer.codecs import Coding, ModelStore, ServedModel
from vqserve.tokenizer.convert import translated_errors
from vqserve.tokenizer.errors import (
    ImageTooLarge,
    ModelMismatch,
    NoEntropyTables,
    NoRecognitionHead,
)
from vqserve.tokenizer.pictures import ImageFormat, write_image

T = TypeVar("T")


class CodesReader(Protocol):
    """What turns bytes into lattice codes: a FrameCodec, or a stream's FrameDecoder."""

    def read(self, codes: bytes, *, allow_partial: bool = False) -> CodedPicture:
        """Raises scq.errors.ScqError."""
        ...


@dataclass
class StageClock:
    """Seconds by stage of one frame, in the order in which the stages first ran."""

    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, stage: str, seconds: float) -> None:
        """Add to a stage's time."""
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds


@dataclass(frozen=True)
class EncodedPicture:
    """One picture and its frame; `source_bytes` is the size of its image file."""

    model: ServedModel
    pixels: Pixels = field(repr=False)
    frame: EncodedFrame
    source_bytes: int

    @property
    def codes(self) -> bytes:
        """The SCQ1 frame."""
        return self.frame.codes

    @property
    def width(self) -> int:
        """Width of the original, in pixels."""
        return int(self.pixels.shape[1])

    @property
    def height(self) -> int:
        """Height of the original, in pixels."""
        return int(self.pixels.shape[0])


class FramePipeline:
    """Runs frames through codecs on `threads` worker threads."""

    def __init__(self, models: ModelStore, threads: int, max_image_pixels: int) -> None:
        self._models = models
        self._max_image_pixels = max_image_pixels
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="frame")

    def close(self) -> None:
        """Wait for running stages; waiting ones are dropped."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    async def run(self, function: Callable[..., T], *arguments: object) -> T:
        """Run something else (loading a model) on the worker threads."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)

    async def open(self, image: bytes, clock: StageClock) -> Pixels:
        """Image file to pixels."""
        return await self._stage(
            clock, "image_decode", lambda: read_image(image, self._max_image_pixels)
        )

    async def encode(
        self, model: ServedModel, pixels: Pixels, coding: Coding, clock: StageClock
    ) -> EncodedFrame:
        """A picture to a key frame."""
        require_tables(model, coding)
        frame = await self._stage(clock, None, lambda: coding.encode(model.codec, pixels))
        return _timed(frame, clock)

    async def encode_next(
        self, encoder: FrameEncoder, pixels: Pixels, force_key: bool, clock: StageClock
    ) -> EncodedFrame:
        """The next picture of a stream to a key or delta frame."""
        frame = await self._stage(clock, None, lambda: encoder.encode(pixels, force_key=force_key))
        return _timed(frame, clock)

    async def header_of(self, codes: bytes, allow_partial: bool, clock: StageClock) -> FrameHeader:
        """What codes say about themselves; checks the size of the picture they claim.

        A few bytes of header could otherwise ask for gigabytes of picture.
        """
        header = await self._stage(
            clock, "entropy", lambda: parse_header(codes, allow_partial=allow_partial)
        )
        if header.width * header.height > self._max_image_pixels:
            raise ImageTooLarge(
                f"the codes stand for {header.width}x{header.height} pixels, the limit is "
                f"{self._max_image_pixels}",
                field="codes",
            )
        return header

    def model_of(self, header: FrameHeader, pinned: ServedModel | None = None) -> ServedModel:
        """The model that made the codes; ModelMismatch unless it is the pinned one."""
        if pinned is None:
            return self._models.by_hash(header.model_hash)
        if not pinned.card.model_hash.startswith(header.model_hash.hex()):
            raise ModelMismatch(
                f"model {pinned.name!r} ({pinned.card.model_hash[:8]}) was asked for, but the "
                f"codes were made by model {header.model_hash.hex()}; leave the model empty or "
                "send its own codes",
                field="model",
            )
        return pinned

    async def read(
        self, reader: CodesReader, codes: bytes, allow_partial: bool, clock: StageClock
    ) -> CodedPicture:
        """Codes to lattice codes: of a key frame by a codec, of a stream's next by its decoder."""
        return await self._stage(
            clock, "entropy", lambda: reader.read(codes, allow_partial=allow_partial)
        )

    async def render(
        self,
        model: ServedModel,
        picture: CodedPicture,
        image_format: ImageFormat,
        clock: StageClock,
    ) -> bytes:
        """Lattice codes to an image file of the original's size."""
        pixels = await self._stage(clock, "decoder", lambda: model.codec.render(picture))
        return await self._stage(clock, "serialize", lambda: write_image(pixels, image_format))

    async def label(
        self, model: ServedModel, picture: CodedPicture, clock: StageClock
    ) -> Sequence[Label]:
        """Lattice codes to labels, most probable first."""
        require_head(model)
        return await self._stage(clock, "head", lambda: model.codec.label(picture))

    async def _stage(self, clock: StageClock, stage: str | None, function: Callable[[], T]) -> T:
        submitted = time.perf_counter()

        def timed() -> T:
            started = time.perf_counter()
            clock.add("queue", started - submitted)
            with translated_errors():
                result = function()
            if stage is not None:
                clock.add(stage, time.perf_counter() - started)
            return result

        return await asyncio.get_running_loop().run_in_executor(self._pool, timed)


def _timed(frame: EncodedFrame, clock: StageClock) -> EncodedFrame:
    for stage, seconds in frame.stats.seconds.items():
        clock.add(stage, seconds)
    return frame


def require_head(model: ServedModel) -> None:
    """Raise NoRecognitionHead unless the model can label."""
    if not model.card.classes:
        raise NoRecognitionHead(
            f"model {model.name!r} has no recognition head; ListModels tells which have classes",
            field="model",
        )


def require_tables(model: ServedModel, coding: Coding) -> None:
    """Raise NoEntropyTables when rANS is wanted from a model that cannot."""
    if coding.entropy == "rans" and not model.card.has_entropy_tables:
        raise NoEntropyTables(
            f"model {model.name!r} has no entropy tables; leave the entropy mode open or ask for "
            "raw",
            field="coding.entropy",
        )
