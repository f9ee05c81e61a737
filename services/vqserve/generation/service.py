"""GenerationService over gRPC: each RPC is convert, one call into the core, convert."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc.aio

from vqserve.common.logging import annotate
from vqserve.generation import convert
from vqserve.generation.core import GenerationCore
from vqstack.generation.v1 import generation_pb2, generation_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]


class GenerationService(generation_pb2_grpc.GenerationServiceServicer):
    """The RPC bodies. A cancelled call leaves `async with` and thereby aborts its sequence."""

    def __init__(self, core: GenerationCore) -> None:
        self._core = core

    async def Generate(
        self, request: generation_pb2.GenerateRequest, context: Context
    ) -> AsyncIterator[generation_pb2.GenerateResponse]:
        generation = await self._core.start(convert.generation_request(request))
        sequence = generation.stream.sequence
        async with generation.stream as outputs:
            async for output in outputs:
                yield convert.generate_response(output, sequence.first_token_after, sequence.total)
        annotate(completion_tokens=sequence.num_output_tokens, finish_reason=output.finish_reason)

    async def Tokenize(
        self, request: generation_pb2.TokenizeRequest, context: Context
    ) -> generation_pb2.TokenizeResponse:
        token_ids = await self._core.tokenize(request.model, request.text)
        return generation_pb2.TokenizeResponse(token_ids=token_ids)

    async def Detokenize(
        self, request: generation_pb2.DetokenizeRequest, context: Context
    ) -> generation_pb2.DetokenizeResponse:
        text = await self._core.detokenize(request.model, list(request.token_ids))
        return generation_pb2.DetokenizeResponse(text=text)

    async def ListModels(
        self, request: generation_pb2.ListModelsRequest, context: Context
    ) -> generation_pb2.ListModelsResponse:
        models = [convert.model_info(model) for model in self._core.models]
        return generation_pb2.ListModelsResponse(models=models)

    async def GetModel(
        self, request: generation_pb2.GetModelRequest, context: Context
    ) -> generation_pb2.GetModelResponse:
        model = self._core.models.get(request.model)
        return generation_pb2.GetModelResponse(model=convert.model_info(model))
