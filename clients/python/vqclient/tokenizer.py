"""The client of the tokenizer service (tokenizerd). Knows its methods; knows no engine."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable, Iterable
from contextlib import aclosing
from typing import ClassVar

from vqclient import convert, stream
from vqclient.channel import ClientOptions
from vqclient.client import Metadata, ServiceClient
from vqclient.types import (
    Codebook,
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
        self, image: bytes, *, model: str = "nav", timeout: float | None = None
    ) -> Encoded:
        """Codes of one image file (JPEG, PNG or WebP)."""
        request = tokenizer_pb2.EncodeRequest(model=model, image=image)
        return convert.encoded(await self._unary(self._stub.Encode, request, timeout))

    async def decode(
        self,
        codes: bytes,
        *,
        format: ImageFormat = ImageFormat.PNG,
        timeout: float | None = None,
    ) -> Decoded:
        """The picture that codes stand for, of the original's size."""
        request = tokenizer_pb2.DecodeRequest(codes=codes, format=convert.format_number(format))
        return convert.decoded(await self._unary(self._stub.Decode, request, timeout))

    async def recognize(
        self,
        *,
        image: bytes = b"",
        codes: bytes = b"",
        model: str = "",
        top_k: int = 5,
        timeout: float | None = None,
    ) -> Recognized:
        """Labels of an image (`model` needed) or of codes (which name their model)."""
        if bool(image) == bool(codes):
            raise ValueError("recognize needs exactly one of image and codes, and not empty")
        request = convert.build(lambda: convert.recognize_request(image, codes, model, top_k))
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

    async def models(self, *, timeout: float | None = None) -> tuple[TokenizerModel, ...]:
        """The loaded models, in alphabetical order."""
        request = tokenizer_pb2.ListModelsRequest()
        reply = await self._unary(self._stub.ListModels, request, timeout)
        return tuple(convert.tokenizer_model(info) for info in reply.models)

    async def model(self, name: str, *, timeout: float | None = None) -> Codebook:
        """One model, by name or hash, with its codebook."""
        request = tokenizer_pb2.GetModelRequest(model=name)
        return convert.codebook(await self._unary(self._stub.GetModel, request, timeout))
