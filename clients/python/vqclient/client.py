"""What both clients share: a channel's life, deadlines, retries and typed errors.

Knows gRPC calls; knows no message of either service.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import ClassVar, Protocol, Self, TypeVar, cast

import grpc
from grpc import StatusCode

from vqclient.channel import ClientOptions, open_channel, require_timeout
from vqclient.errors import CallCancelledError, InternalError, from_rpc_error
from vqclient.retry import call_with_retry

RequestT = TypeVar("RequestT")
ReplyT = TypeVar("ReplyT")

Metadata = tuple[tuple[str, str], ...]


class ReplyStream(Protocol):
    """The reading side of a streaming call in progress."""

    async def read(self) -> object: ...

    def cancel(self) -> bool: ...


def unexpected_reply(message: str) -> InternalError:
    """The error of an answer that breaks the contract."""
    return InternalError(message, code=StatusCode.INTERNAL, reason="UNEXPECTED_REPLY")


class ServiceClient:
    """A connection to one service, used as an async context manager.

    Nothing is sent before the first call, so entering does not fail when the server is down.
    `timeout` of a method is in seconds and covers its retries; None takes `options.timeout`.
    """

    service: ClassVar[str]

    def __init__(self, address: str, options: ClientOptions) -> None:
        self.address = address
        self.options = options
        self._channel = open_channel(address, options)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; calls in progress are cancelled."""
        await self._channel.close()

    async def _unary(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[RequestT, ReplyT],
        request: RequestT,
        timeout: float | None,
    ) -> ReplyT:
        async def attempt(remaining: float) -> ReplyT:
            metadata = self.options.call_metadata()
            with self.typed_errors():
                return await method(request, timeout=remaining, metadata=metadata)

        return await call_with_retry(attempt, self.options.retry, self._seconds(timeout))

    async def _first_reply(
        self, start: Callable[[float, Metadata], ReplyStream], kind: type[ReplyT], timeout: float
    ) -> tuple[ReplyStream, ReplyT]:
        """Start a streaming call and read its first reply: the part that may be repeated."""

        async def attempt(remaining: float) -> tuple[ReplyStream, ReplyT]:
            call = start(remaining, self.options.call_metadata())
            reply = await self.read(call, kind)
            if reply is None:
                raise unexpected_reply(f"the {self.service} service ended the call unanswered")
            return call, reply

        return await call_with_retry(attempt, self.options.retry, timeout)

    async def read(self, call: ReplyStream, kind: type[ReplyT]) -> ReplyT | None:
        """The next reply of `kind`; None after the last."""
        with self.typed_errors():
            reply = await call.read()
        return None if reply is grpc.aio.EOF else cast(ReplyT, reply)

    def _seconds(self, timeout: float | None) -> float:
        return self.options.timeout if timeout is None else require_timeout(timeout)

    @contextmanager
    def typed_errors(self) -> Iterator[None]:
        """Turn what grpc.aio raises inside the block into VqError."""
        try:
            yield
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, service=self.service, address=self.address) from error
        except asyncio.CancelledError as error:
            # grpc.aio also raises this for a call that ended CANCELLED while our task lives on.
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise CallCancelledError(
                f"the call to the {self.service} service at {self.address} was cancelled",
                code=StatusCode.CANCELLED,
            ) from error
