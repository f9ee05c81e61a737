"""The gRPC edge: what happens around every RPC, whatever the service.

Request ids, admission by phase, in-flight counts, metrics, the log line, and the one
translation of exceptions into statuses. Its HTTP twin is `asgi.py`.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager, aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from vqserve.common.errors import (
    STATUS_DETAILS_KEY,
    Draining,
    Internal,
    MalformedRequest,
    NotReady,
    PayloadTooLarge,
    ServiceError,
    TooManyRequests,
    to_status,
)
from vqserve.common.logging import RequestRecord, begin_request, log_request, request_id_from
from vqserve.common.metrics import ServerMetrics

logger = logging.getLogger(__name__)

REQUEST_ID_KEY = "x-request-id"
# Health and reflection answer in every phase and are not requests of the service.
EXEMPT_PREFIXES = ("/grpc.health.", "/grpc.reflection.")

Context = grpc.aio.ServicerContext[Any, Any]
if TYPE_CHECKING:
    # Generic in its stubs only.
    Handler = grpc.RpcMethodHandler[Any, Any]


@dataclass(frozen=True)
class _Method:
    """Labels of one RPC method."""

    path: str
    grpc_type: str

    @property
    def labels(self) -> tuple[str, str, str]:
        service, _, name = self.path.lstrip("/").partition("/")
        return self.grpc_type, service, name


class RequestInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every handler of a grpc.aio server.

    `admit` opens one request's context; it raises NotReady or Draining to refuse.
    """

    def __init__(
        self, metrics: ServerMetrics, admit: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self._metrics = metrics
        self._admit = admit

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Return the method's handler with this interceptor's work around it."""
        handler = await continuation(handler_call_details)
        path = handler_call_details.method
        if handler is None or path.startswith(EXEMPT_PREFIXES):
            return handler
        metadata = dict(handler_call_details.invocation_metadata or ())
        offered = metadata.get(REQUEST_ID_KEY)
        request_id = request_id_from(offered if isinstance(offered, str) else None)
        return self._wrap(handler, _Method(path, _grpc_type(handler)), request_id)

    def _wrap(self, handler: Handler, method: _Method, request_id: str) -> Handler:
        inner = _behaviour(handler)
        # Bytes are decoded inside the served block: left to gRPC, undecodable ones would be
        # answered UNKNOWN, without details, log line or metrics.
        decode = _decoder(handler)

        async def unary(request: Any, context: Context) -> Any:
            async with self._served(context, method, request_id):
                return await inner(decode(request), context)

        # The read/write style keeps the whole call on one task, so that a cancellation
        # always reaches the handler; a wrapping generator would only be garbage-collected.
        async def streaming(request: Any, context: Context) -> None:
            async with self._served(context, method, request_id):
                if not inspect.isasyncgenfunction(inner):
                    await inner(decode(request), context)
                    return
                async with aclosing(inner(decode(request), context)) as responses:
                    async for response in responses:
                        await context.write(response)

        factory = _HANDLER_FACTORIES[method.grpc_type]
        return factory(  # type: ignore[no-any-return]
            streaming if handler.response_streaming else unary,
            request_deserializer=None,
            response_serializer=handler.response_serializer,
        )

    @asynccontextmanager
    async def _served(
        self, context: Context, method: _Method, request_id: str
    ) -> AsyncIterator[None]:
        record = RequestRecord(request_id, "grpc", method.path)
        begin_request(record)
        context.set_trailing_metadata(((REQUEST_ID_KEY, request_id),))
        self._metrics.grpc_started.labels(*method.labels).inc()
        started = time.perf_counter()
        code = grpc.StatusCode.OK
        try:
            with self._admit():
                yield
        except asyncio.CancelledError:
            code = _cancellation_code(context)
            raise
        except Exception as error:
            failure = as_service_error(error, request_id)
            code = failure.grpc_code
            count_refusal(self._metrics, failure)
            record.facts["reason"] = failure.reason
            await _abort(context, failure, request_id)
        finally:
            seconds = time.perf_counter() - started
            self._metrics.grpc_handled.labels(*method.labels, code.name).inc()
            self._metrics.grpc_handling.labels(*method.labels).observe(seconds)
            log_request(record, code.name, seconds)


def as_service_error(error: Exception, request_id: str) -> ServiceError:
    """The error itself, or Internal with the traceback logged and nothing leaked."""
    if isinstance(error, ServiceError):
        return error
    logger.error("unexpected error", exc_info=error, extra={"facts": {"request_id": request_id}})
    return Internal(f"internal error; the server's log has it under request id {request_id}")


def count_refusal(metrics: ServerMetrics, error: ServiceError) -> None:
    """Count errors that refuse a request at the edge (admission counts its own)."""
    for error_type, reason in _REFUSALS.items():
        if isinstance(error, error_type):
            metrics.reject(reason)


_REFUSALS: dict[type[ServiceError], str] = {
    Draining: "draining",
    NotReady: "not_ready",
    PayloadTooLarge: "too_large",
    TooManyRequests: "queue_full",
}

_HANDLER_FACTORIES: dict[str, Callable[..., Any]] = {
    "unary": grpc.unary_unary_rpc_method_handler,
    "server_stream": grpc.unary_stream_rpc_method_handler,
    "client_stream": grpc.stream_unary_rpc_method_handler,
    "bidi_stream": grpc.stream_stream_rpc_method_handler,
}


def _grpc_type(handler: Handler) -> str:
    if handler.request_streaming:
        return "bidi_stream" if handler.response_streaming else "client_stream"
    return "server_stream" if handler.response_streaming else "unary"


def _behaviour(handler: Handler) -> Callable[[Any, Any], Any]:
    behaviours = {
        "unary": handler.unary_unary,
        "server_stream": handler.unary_stream,
        "client_stream": handler.stream_unary,
        "bidi_stream": handler.stream_stream,
    }
    behaviour = behaviours[_grpc_type(handler)]
    if behaviour is None:
        raise TypeError("the handler has no function of its own type")
    return behaviour


def _decoder(handler: Handler) -> Callable[[Any], Any]:
    """From what gRPC hands over undecoded to what the handler expects."""
    parse = handler.request_deserializer

    def decode(message: bytes) -> Any:
        try:
            return message if parse is None else parse(message)
        except DecodeError as error:
            raise MalformedRequest(
                f"the request of {len(message)} bytes is not the method's protobuf message"
            ) from error

    async def decode_each(messages: AsyncIterator[bytes]) -> AsyncIterator[Any]:
        async for message in messages:
            yield decode(message)

    return decode_each if handler.request_streaming else decode


def _cancellation_code(context: Context) -> grpc.StatusCode:
    remaining = context.time_remaining()
    if remaining is not None and remaining <= 0:
        return grpc.StatusCode.DEADLINE_EXCEEDED
    return grpc.StatusCode.CANCELLED


async def _abort(context: Context, error: ServiceError, request_id: str) -> None:
    await context.abort(
        error.grpc_code,
        error.message,
        trailing_metadata=(
            (REQUEST_ID_KEY, request_id),
            (STATUS_DETAILS_KEY, to_status(error, request_id).SerializeToString()),
        ),
    )
