"""The client of the generation service (llmd). Knows its methods; knows no engine."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import ClassVar

from vqclient import convert
from vqclient.channel import ClientOptions
from vqclient.client import Metadata, ReplyStream, ServiceClient, unexpected_reply
from vqclient.types import Completion, LanguageModel, Message, Sampling, TextPiece
from vqstack.generation.v1 import generation_pb2, generation_pb2_grpc

DEFAULT_GENERATION_ADDRESS = "127.0.0.1:50052"
# A long answer on a busy CPU takes minutes, where the other calls take milliseconds.
DEFAULT_GENERATION_TIMEOUT = 300.0


class GenerationClient(ServiceClient):
    """Text from a language model. `model` may stay empty where the server has only one.

    Every method raises VqError; see vqclient.errors for the tree.
    """

    service: ClassVar[str] = "generation"

    def __init__(
        self, address: str = DEFAULT_GENERATION_ADDRESS, options: ClientOptions | None = None
    ) -> None:
        super().__init__(address, options or ClientOptions(timeout=DEFAULT_GENERATION_TIMEOUT))
        self._stub = generation_pb2_grpc.GenerationServiceStub(self._channel)

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        model: str = "",
        sampling: Sampling | None = None,
        timeout: float | None = None,
    ) -> AsyncGenerator[TextPiece, None]:
        """Continue a text, or token ids, piece by piece; the last piece carries the usage.

        Leaving the loop early cancels the call, and the server frees the sequence. `timeout`
        covers the whole answer. The call is repeated only while nothing has been received.
        """
        request = convert.build(
            lambda: convert.prompt_request(prompt, model, sampling or Sampling())
        )
        return self._pieces(request, timeout)

    def chat(
        self,
        messages: str | Sequence[Message],
        *,
        model: str = "",
        sampling: Sampling | None = None,
        timeout: float | None = None,
    ) -> AsyncGenerator[TextPiece, None]:
        """Answer a conversation, or a single question given as a string; else as `generate`."""
        request = convert.build(
            lambda: convert.chat_request(messages, model, sampling or Sampling())
        )
        return self._pieces(request, timeout)

    async def tokenize(
        self, text: str, *, model: str = "", timeout: float | None = None
    ) -> tuple[int, ...]:
        """The token ids of a text."""
        request = generation_pb2.TokenizeRequest(model=model, text=text)
        reply = await self._unary(self._stub.Tokenize, request, timeout)
        return tuple(reply.token_ids)

    async def detokenize(
        self, token_ids: Sequence[int], *, model: str = "", timeout: float | None = None
    ) -> str:
        """The text of token ids."""
        request = convert.build(
            lambda: generation_pb2.DetokenizeRequest(model=model, token_ids=token_ids)
        )
        return (await self._unary(self._stub.Detokenize, request, timeout)).text

    async def models(self, *, timeout: float | None = None) -> tuple[LanguageModel, ...]:
        """The loaded models, in alphabetical order."""
        request = generation_pb2.ListModelsRequest()
        reply = await self._unary(self._stub.ListModels, request, timeout)
        return tuple(convert.language_model(info) for info in reply.models)

    async def model(self, name: str, *, timeout: float | None = None) -> LanguageModel:
        """One model; NotFoundError when it is not loaded."""
        request = generation_pb2.GetModelRequest(model=name)
        reply = await self._unary(self._stub.GetModel, request, timeout)
        return convert.language_model(reply.model)

    async def _pieces(
        self, request: generation_pb2.GenerateRequest, timeout: float | None
    ) -> AsyncGenerator[TextPiece, None]:
        def start(remaining: float, metadata: Metadata) -> ReplyStream:
            return self._stub.Generate(request, timeout=remaining, metadata=metadata)

        kind = generation_pb2.GenerateResponse
        call, first = await self._first_reply(start, kind, self._seconds(timeout))
        reply: generation_pb2.GenerateResponse | None = first
        try:
            while reply is not None:
                yield convert.text_piece(reply)
                reply = await self.read(call, kind)
        finally:
            call.cancel()


async def collect(pieces: AsyncIterator[TextPiece]) -> Completion:
    """Read `generate(...)` or `chat(...)` to the end as one completion."""
    text: list[str] = []
    token_ids: list[int] = []
    last = TextPiece("")
    async for last in pieces:
        text.append(last.text)
        token_ids.extend(last.token_ids)
    if last.finish_reason is None or last.usage is None:
        raise unexpected_reply("the answer ended without finish_reason and usage")
    return Completion("".join(text), tuple(token_ids), last.finish_reason, last.usage)
