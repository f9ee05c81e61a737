"""The two answer shapes of OpenAI's API, whole or as server-sent events.

A stream is: a first chunk that names the role (chat only), one chunk per piece of text, one with
the finish reason, one with the usage if asked for, then `[DONE]`. An error after the first chunk
is an event of its own, and the stream ends without `[DONE]`.
"""

from __future__ import annotations

import asyncio
import json
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from itertools import accumulate
from typing import Any, ClassVar

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from vqllm.runtime.engine import StepOutput
from vqllm.runtime.sampling import TokenLogprobs
from vqllm.runtime.sequence import FinishReason
from vqserve.common.asgi import STREAM_ENDING
from vqserve.common.errors import ServiceError
from vqserve.common.logging import annotate, current_request_id
from vqserve.generation.core import Generation
from vqserve.generation.driver import SequenceStream
from vqserve.generation.errors import Aborted

Json = dict[str, Any]
Logprobs = tuple[TokenLogprobs, ...]
ErrorBody = Callable[[ServiceError, str], Json]

_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


class Reply(ABC):
    """One answer in the making: the fields that all its objects share."""

    id_prefix: ClassVar[str]
    object_name: ClassVar[str]
    chunk_name: ClassVar[str]

    def __init__(self, generation: Generation) -> None:
        self.stream: SequenceStream = generation.stream
        self._token_bytes = generation.model.loaded.tokenizer.token_bytes
        self._shared = {
            "id": f"{self.id_prefix}-{generation.stream.sequence.id}",
            "created": int(time.time()),
            "model": generation.model.name,
            "system_fingerprint": f"fp_{generation.model.info.revision}",
        }

    @abstractmethod
    def choice(self, text: str, finish_reason: str, logprobs: Logprobs) -> Json:
        """The whole answer."""

    @abstractmethod
    def delta(self, text: str, finish_reason: str | None, logprobs: Logprobs = ()) -> Json:
        """A piece of the answer, or its end."""

    def opening(self) -> Json | None:
        """What a stream says before the first token."""
        return None

    def _text(self, token_id: int) -> str:
        """A token as text; bytes that are no character of their own become U+FFFD."""
        return self._token_bytes(token_id).decode("utf-8", errors="replace")

    def chunk(self, choice: Json | None, **extra: Any) -> Json:
        """One event's object around a choice."""
        choices = [] if choice is None else [choice]
        return {**self._shared, "object": self.chunk_name, "choices": choices, **extra}

    async def collect(self) -> Json:
        """The whole answer, once it is complete.

        Raises:
            Aborted: the server stopped first.
        """
        async with self.stream as outputs:
            answer = [output async for output in outputs]
        last = answer[-1]
        _check_complete(last)
        _annotate(last)
        text = "".join(output.text for output in answer)
        logprobs = tuple(entry for output in answer for entry in output.logprobs)
        choice = self.choice(text, str(last.finish_reason), logprobs)
        body = {**self._shared, "object": self.object_name, "choices": [choice]}
        return {**body, "usage": usage(last)}


class CompletionReply(Reply):
    """/v1/completions."""

    id_prefix = "cmpl"
    object_name = chunk_name = "text_completion"

    def __init__(self, generation: Generation) -> None:
        super().__init__(generation)
        self._offset = 0  # characters of the tokens reported so far

    def choice(self, text: str, finish_reason: str, logprobs: Logprobs) -> Json:
        return self.delta(text, finish_reason, logprobs)

    def delta(self, text: str, finish_reason: str | None, logprobs: Logprobs = ()) -> Json:
        return {
            "index": 0,
            "text": text,
            "logprobs": self._logprobs(logprobs) if logprobs else None,
            "finish_reason": finish_reason,
        }

    def _logprobs(self, logprobs: Logprobs) -> Json:
        tokens = [self._text(entry.token_id) for entry in logprobs]
        offsets = [self._offset, *(self._offset + n for n in accumulate(map(len, tokens)))]
        self._offset = offsets.pop()
        return {
            "tokens": tokens,
            "token_logprobs": [entry.logprob for entry in logprobs],
            "top_logprobs": [
                {self._text(token_id): value for token_id, value in entry.top} for entry in logprobs
            ],
            "text_offset": offsets,
        }


class ChatReply(Reply):
    """/v1/chat/completions."""

    id_prefix = "chatcmpl"
    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"

    def choice(self, text: str, finish_reason: str, logprobs: Logprobs) -> Json:
        message = {"role": "assistant", "content": text, "refusal": None}
        reported = self._logprobs(logprobs)
        return {
            "index": 0,
            "message": message,
            "logprobs": reported,
            "finish_reason": finish_reason,
        }

    def opening(self) -> Json:
        delta = {"role": "assistant", "content": ""}
        return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}

    def delta(self, text: str, finish_reason: str | None, logprobs: Logprobs = ()) -> Json:
        delta = {"content": text} if text else {}
        reported = self._logprobs(logprobs)
        return {"index": 0, "delta": delta, "logprobs": reported, "finish_reason": finish_reason}

    def _logprobs(self, logprobs: Logprobs) -> Json | None:
        if not logprobs:
            return None
        content = [
            {
                **self._entry(entry.token_id, entry.logprob),
                "top_logprobs": [self._entry(*pair) for pair in entry.top],
            }
            for entry in logprobs
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token_id: int, logprob: float) -> Json:
        return {
            "token": self._text(token_id),
            "logprob": logprob,
            "bytes": list(self._token_bytes(token_id)),
        }


class TokenStream(StreamingResponse):
    """A reply as server-sent events; aborts the sequence when the client goes away."""

    def __init__(
        self, reply: Reply, error_body: ErrorBody, includes_usage: bool, heartbeat_seconds: float
    ) -> None:
        super().__init__(self._events(), media_type="text/event-stream", headers=_HEADERS)
        self._reply = reply
        self._error_body = error_body
        self._includes_usage = includes_usage
        self._heartbeat_seconds = heartbeat_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope[STREAM_ENDING] = self._ending
        # Entered here, not in the generator: a client that has left already never starts that.
        async with self._reply.stream:
            await super().__call__(scope, receive, send)

    def _ending(self, error: ServiceError, request_id: str) -> bytes:
        return _event(self._error_body(error, request_id)).encode()

    async def _events(self) -> AsyncIterator[str]:
        try:
            async for chunk in self._chunks():
                yield ": ping\n\n" if chunk is None else _event(chunk)
        except ServiceError as error:
            yield _event(self._error_body(error, current_request_id()))
        else:
            yield "data: [DONE]\n\n"

    async def _chunks(self) -> AsyncIterator[Json | None]:
        """The stream's objects; None where a heartbeat is due."""
        reply, extra = self._reply, {"usage": None} if self._includes_usage else {}
        if (opening := reply.opening()) is not None:
            yield reply.chunk(opening, **extra)
        async for output in with_heartbeats(reply.stream, self._heartbeat_seconds):
            if output is None:
                yield None
                continue
            if output.text or output.logprobs:
                delta = reply.delta(output.text, None, output.logprobs)
                yield reply.chunk(delta, **extra)
            if output.finish_reason is not None:
                _check_complete(output)
                _annotate(output)
                yield reply.chunk(reply.delta("", output.finish_reason), **extra)
                if self._includes_usage:
                    yield reply.chunk(None, usage=usage(output))


async def with_heartbeats(
    stream: SequenceStream, seconds: float
) -> AsyncIterator[StepOutput | None]:
    """The outputs of a stream, and None whenever none came for that long."""
    while True:
        try:
            async with asyncio.timeout(seconds):
                output = await anext(stream)
        except TimeoutError:
            yield None
        except StopAsyncIteration:
            return
        else:
            yield output


def usage(last: StepOutput) -> Json:
    """OpenAI's usage object of a finished sequence."""
    return {
        "prompt_tokens": last.num_prompt_tokens,
        "completion_tokens": last.num_output_tokens,
        "total_tokens": last.num_prompt_tokens + last.num_output_tokens,
    }


def _check_complete(last: StepOutput) -> None:
    if last.finish_reason is FinishReason.ABORT:
        raise Aborted("the server stopped before the answer was complete; retry on another one")


def _annotate(last: StepOutput) -> None:
    annotate(completion_tokens=last.num_output_tokens, finish_reason=str(last.finish_reason))


def _event(content: Json) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"
