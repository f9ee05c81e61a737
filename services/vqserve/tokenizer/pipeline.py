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
from typing import TypeVar

from scq.bitstream import FrameHeader, parse_header
from scq.codec import EncodedFrame, Label
from scq.images import Pixels, read_image
from vqserve.tokenizer.codecs import ModelStore, ServedModel
from vqserve.tokenizer.convert import translated_errors
from vqserve.tokenizer.errors import ImageTooLarge, ModelMismatch, NoRecognitionHead
from vqserve.tokenizer.metrics import Indices
from vqserve.tokenizer.pictures import ImageFormat, write_image

T = TypeVar("T")


@dataclass
class StageClock:
    """Seconds by stage of one frame, in the order in which the stages first ran."""

    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, stage: str, seconds: float) -> None:
        """Add to a stage's time."""
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds


@dataclass(frozen=True)
class EncodedPicture:
    """Codes of one image file; width and height are those of the original, in pixels."""

    model: ServedModel
    codes: bytes
    width: int
    height: int
    source_bytes: int
    indices: Indices

    @property
    def bpp(self) -> float:
        """Measured bits per pixel of the original."""
        return 8 * len(self.codes) / (self.width * self.height)


@dataclass(frozen=True)
class DecodedPicture:
    """An image file made from codes."""

    model: ServedModel
    image: bytes
    image_format: ImageFormat
    width: int
    height: int


@dataclass(frozen=True)
class Recognition:
    """Labels, most probable first, and the codes they were read from."""

    model: ServedModel
    labels: Sequence[Label]
    codes: bytes


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

    async def encode(self, model: ServedModel, image: bytes, clock: StageClock) -> EncodedPicture:
        """Image file to codes."""
        pixels: Pixels = await self._stage(
            clock, "image_decode", read_image, image, self._max_image_pixels
        )
        encoded: EncodedFrame = await self._stage(clock, None, model.codec.encode, pixels)
        for stage, seconds in encoded.stats.seconds.items():
            clock.add(stage, seconds)
        height, width = pixels.shape[:2]
        # Unused slots of the support repeat an index; only real weights count as use.
        indices = encoded.stats.indices[encoded.stats.numerators > 0]
        return EncodedPicture(model, encoded.codes, width, height, len(image), indices)

    async def decode(
        self, model: ServedModel, codes: bytes, image_format: ImageFormat, clock: StageClock
    ) -> DecodedPicture:
        """Codes to an image file of the original's size; `model` must have made them."""
        pixels: Pixels = await self._stage(clock, "decoder", model.codec.decode, codes)
        image = await self._stage(clock, "serialize", write_image, pixels, image_format)
        height, width = pixels.shape[:2]
        return DecodedPicture(model, image, image_format, width, height)

    async def recognize(self, model: ServedModel, codes: bytes, clock: StageClock) -> Recognition:
        """Codes to labels; `model` must be the one that made them."""
        require_head(model)
        labels: Sequence[Label] = await self._stage(clock, "head", model.codec.recognize, codes)
        return Recognition(model, labels, codes)

    async def model_of(
        self, codes: bytes, clock: StageClock, pinned: ServedModel | None = None
    ) -> ServedModel:
        """The model that made the codes; checks them and the size of the picture they claim.

        A few bytes of header could otherwise ask for gigabytes of picture.
        """
        header: FrameHeader = await self._stage(clock, "entropy", parse_header, codes)
        if header.width * header.height > self._max_image_pixels:
            raise ImageTooLarge(
                f"the codes stand for {header.width}x{header.height} pixels, the limit is "
                f"{self._max_image_pixels}",
                field="codes",
            )
        if pinned is None:
            return self._models.by_hash(header.model_hash)
        if not pinned.card.model_hash.startswith(header.model_hash.hex()):
            raise ModelMismatch(
                f"model {pinned.name!r} was asked for, but the codes were made by model "
                f"{header.model_hash.hex()}; leave the model empty or send its own codes",
                field="model",
            )
        return pinned

    async def _stage(
        self, clock: StageClock, stage: str | None, function: Callable[..., T], *arguments: object
    ) -> T:
        submitted = time.perf_counter()

        def timed() -> T:
            started = time.perf_counter()
            clock.add("queue", started - submitted)
            with translated_errors():
                result = function(*arguments)
            if stage is not None:
                clock.add(stage, time.perf_counter() - started)
            return result

        return await asyncio.get_running_loop().run_in_executor(self._pool, timed)


def require_head(model: ServedModel) -> None:
    """Raise NoRecognitionHead unless the model can label."""
    if not model.card.classes:
        raise NoRecognitionHead(
            f"model {model.name!r} has no recognition head; ListModels tells which have classes",
            field="model",
        )
