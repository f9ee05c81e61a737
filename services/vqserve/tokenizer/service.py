"""The gRPC face of tokenizerd: each RPC hands its message to the core."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc.aio

from vqserve.tokenizer.core import TokenizerCore
from vqserve.tokenizer.streams import FrameStreams
from vqstack.tokenizer.v1 import tokenizer_pb2, tokenizer_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]


class TokenizerServicer(tokenizer_pb2_grpc.TokenizerServiceServicer):
    """vqstack.tokenizer.v1.TokenizerService."""

    def __init__(self, core: TokenizerCore, streams: FrameStreams) -> None:
        self._core = core
        self._streams = streams

    async def Encode(
        self, request: tokenizer_pb2.EncodeRequest, context: Context
    ) -> tokenizer_pb2.EncodeResponse:
        """Image file to codes."""
        return await self._core.encode(request, "grpc")

    async def Decode(
        self, request: tokenizer_pb2.DecodeRequest, context: Context
    ) -> tokenizer_pb2.DecodeResponse:
        """Codes to an image file."""
        return await self._core.decode(request, "grpc")

    async def Recognize(
        self, request: tokenizer_pb2.RecognizeRequest, context: Context
    ) -> tokenizer_pb2.RecognizeResponse:
        """Image file or codes to labels."""
        return await self._core.recognize(request, "grpc")

    async def StreamFrames(
        self,
        request_iterator: AsyncIterator[tokenizer_pb2.StreamFramesRequest],
        context: Context,
    ) -> AsyncGenerator[tokenizer_pb2.StreamFramesResponse, None]:
        """Frames in, results out."""
        async with aclosing(self._streams.stream(aiter(request_iterator), "grpc")) as responses:
            async for response in responses:
                yield response

    async def ListModels(
        self, request: tokenizer_pb2.ListModelsRequest, context: Context
    ) -> tokenizer_pb2.ListModelsResponse:
        """Every loaded model."""
        return self._core.list_models()

    async def GetModel(
        self, request: tokenizer_pb2.GetModelRequest, context: Context
    ) -> tokenizer_pb2.GetModelResponse:
        """One model with its codebook, and the files of it that were asked for."""
        return self._core.get_model(request)

    async def GetModelArtifact(
        self, request: tokenizer_pb2.GetModelArtifactRequest, context: Context
    ) -> AsyncGenerator[tokenizer_pb2.GetModelArtifactResponse, None]:
        """One file of a model, in chunks."""
        for response in self._core.artifact_chunks(request):
            yield response
