"""The client of the tokenizer service (tokenizerd). Knows its methods; knows no engine."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterable, Sequence
from contextlib import aclosing
from typing import ClassVar

from vqclient import convert, stream
from vqclient.channel import ClientOptions
from vqclient.client import Metadata, ServiceClient
from vqclient.download import download
from vqclient.frame_stream import FrameStream
from vqclient.types import (
    Artifact,
    Codebook,
    Coding,
    Decoded,
    Encoded,
    Frame,
    FrameResult,
    ImageFormat,
    Operation,
    Recognized,
    StreamOptions,
    TokenizerModel,
)
from vqstack.tokenizer.v1 import tokenizer_pb2, tokenizer_pb2_grpc

DEFAULT_TOKENIZER_ADDRESS = "127.0.0.1:50051"
DEFAULT_CODING = Coding()


class TokenizerClient(ServiceClient):
    """Frames to codes, codes to frames, either to labels.

    Every method raises VqError; see vqclient.errors for the tree.
    """

    service: ClassVar[str] = "tokenizer"

    def __init__(
        self, address: str = DEFAULT_TOKENIZER_ADDRESS, options: ClientOptions | None = None
    ) -> None:
        super().__init__(address, options or ClientOptions())
        self._stub = tokenizer_pb2_grpc.TokenizerServiceStub(self._channel)

    async def encode(
        self,
        image: bytes,
        *,
        model: str = "nav",
        coding: Coding = DEFAULT_CODING,
        timeout: float | None = None,
    ) -> Encoded:
        """Codes of one image file (JPEG, PNG or WebP): a key frame."""
        request = convert.build(
            lambda: tokenizer_pb2.EncodeRequest(
                model=model, image=image, coding=convert.coding_options(coding)
            )
        )
        return convert.encoded(await self._unary(self._stub.Encode, request, timeout))

    async def decode(
        self,
        codes: bytes,
        *,
        format: ImageFormat = ImageFormat.PNG,
        allow_partial: bool = False,
        timeout: float | None = None,
    ) -> Decoded:
        """The picture that a key frame stands for, of the original's size.

        With `allow_partial` a frame that was cut is decoded as far as it goes.
        """
        request = tokenizer_pb2.DecodeRequest(
            codes=codes, format=convert.format_number(format), allow_partial=allow_partial
        )
        return convert.decoded(await self._unary(self._stub.Decode, request, timeout))

    async def recognize(
        self,
        *,
        image: bytes = b"",
        codes: bytes = b"",
        model: str = "",
        top_k: int = 5,
        allow_partial: bool = False,
        timeout: float | None = None,
    ) -> Recognized:
        """Labels of an image (`model` needed) or of codes (which name their model)."""
        if bool(image) == bool(codes):
            raise ValueError("recognize needs exactly one of image and codes, and not empty")
        request = convert.build(
            lambda: convert.recognize_request(image, codes, model, top_k, allow_partial)
        )
        return convert.recognized(await self._unary(self._stub.Recognize, request, timeout))

    async def stream_frames(
        self,
        frames: AsyncIterable[Frame] | Iterable[Frame],
        *,
        model: str = "",
        operation: Operation = Operation.ENCODE,
        options: StreamOptions | None = None,
    ) -> AsyncGenerator[FrameResult, None]:
        """Encode, decode or recognize a stream; results come in the order of the frames.

        `frames` is asked for its next frame only while fewer than `max_in_flight` are
        unanswered, so a slow server or a slow reader of the results slows the source down. A
        plain iterable must not block. A frame that fails has its error in its result and does
        not end the stream. The stream itself has no deadline; opening it has `options.timeout`.
        """
        chosen = options or StreamOptions()
        config = convert.build(lambda: convert.stream_config(model, operation, chosen))

        def start(metadata: Metadata) -> stream.FrameCall:
            return self._stub.StreamFrames(metadata=metadata)

        opened = await stream.open_stream(self, start, config)
        window = stream.Window(chosen.max_in_flight, chosen.max_age_ms / 1000)
        async with aclosing(stream.exchange(self, opened, frames, window)) as results:
            async for result in results:
                yield result

    def open_stream(
        self,
        *,
        model: str = "",
        operation: Operation = Operation.ENCODE,
        options: StreamOptions | None = None,
        on_keyframe_needed: Callable[[], None] | None = None,
    ) -> FrameStream:
        """`stream_frames` for programs that send and receive in different places.

        `on_keyframe_needed` is called when a result says so, for example another stream's
        `request_keyframe`.
        """
        return FrameStream(
            lambda frames: self.stream_frames(
                frames, model=model, operation=operation, options=options
            ),
            on_keyframe_needed,
        )

    async def models(self, *, timeout: float | None = None) -> tuple[TokenizerModel, ...]:
        """The loaded models, in alphabetical order."""
        request = tokenizer_pb2.ListModelsRequest()
        reply = await self._unary(self._stub.ListModels, request, timeout)
        return tuple(convert.tokenizer_model(info) for info in reply.models)

    async def model(
        self, name: str, *, artifacts: Sequence[str] = (), timeout: float | None = None
    ) -> Codebook:
        """One model, by name or hash, with its codebook and a list of its files.

        The files named in `artifacts` come with their contents, 3 MiB together at most.
        """
        request = tokenizer_pb2.GetModelRequest(model=name, artifacts=artifacts)
        return convert.codebook(await self._unary(self._stub.GetModel, request, timeout))

    async def artifact(self, model: str, name: str, *, timeout: float | None = None) -> Artifact:
        """One file of a model, of any size, compared with its SHA-256.

        A download that breaks off is resumed where it stood.
        """
        return await download(self, self._stub.GetModelArtifact, model, name, timeout)
