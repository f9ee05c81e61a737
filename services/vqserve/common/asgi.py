"""The HTTP edge: the twin of `interceptors.py` for REST, SSE and WebSocket.

Request ids, admission by phase, body limits before any handler sees a byte, deadlines
(`x-request-timeout-ms`), cancellation when the client goes away, metrics, the log line,
and the one translation of exceptions into responses.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, MutableMapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from vqserve.common.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidArgument,
    MalformedRequest,
    MethodNotAllowed,
    NoSuchRoute,
    PayloadTooLarge,
    ServiceError,
    to_http,
)
from vqserve.common.interceptors import as_service_error, count_refusal
from vqserve.common.logging import RequestRecord, begin_request, log_request, request_id_from
from vqserve.common.runtime import Runtime

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
AsgiApp = Callable[[Scope, Receive, Send], Awaitable[None]]
ErrorRenderer = Callable[[ServiceError, str], Response]
StreamEnding = Callable[[ServiceError, str], bytes]

# These answer in every phase and are not requests of the service.
EXEMPT_PATHS = frozenset({"/livez", "/readyz", "/startupz", "/metrics"})
# Where a streaming response leaves its StreamEnding in the scope: what to send when it is stopped.
STREAM_ENDING = "vqserve.stream_ending"
# A refused body is read and dropped up to this multiple of the limit, so that the client
# gets to see the answer instead of a reset connection.
DISCARD_FACTOR = 4
# Of x-request-timeout-ms: 30,000 years, and still a float.
MAX_TIMEOUT_DIGITS = 15
# A client that trickles its body would hold its place for ever.
BODY_SECONDS = 60
WS_TRY_AGAIN_LATER = 1013
WS_INTERNAL_ERROR = 1011


def build_http(runtime: Runtime, title: str, render: ErrorRenderer = to_http) -> FastAPI:
    """A FastAPI app with probes, metrics, error shapes and the middleware in place.

    `render` turns a ServiceError and a request id into a response; the OpenAI-compatible
    service passes its own.
    """
    app = FastAPI(title=title, version=runtime.version)
    app.add_exception_handler(RequestValidationError, _raise_invalid_request)
    app.add_exception_handler(HTTPException, _raise_http_exception)
    app.add_middleware(RequestMiddleware, runtime=runtime, render=render)
    _add_probes(app, runtime)
    return app


def _add_probes(app: FastAPI, runtime: Runtime) -> None:
    state = runtime.state

    @app.get("/livez", tags=["operations"])
    async def livez() -> JSONResponse:
        """200 while the event loop turns; says nothing about models or load."""
        return JSONResponse({"alive": True, "uptime_seconds": round(state.uptime_seconds, 3)})

    @app.get("/startupz", tags=["operations"])
    async def startupz() -> JSONResponse:
        """200 once the models were loaded."""
        return _probe(state.is_started, state.phase.value)

    @app.get("/readyz", tags=["operations"])
    async def readyz() -> JSONResponse:
        """200 while new requests should be sent here."""
        return _probe(state.is_ready, state.phase.value)

    @app.get("/metrics", tags=["operations"], response_class=Response)
    async def metrics() -> Response:
        """Prometheus text exposition."""
        runtime.metrics.requests_in_flight.set(state.requests_in_flight)
        return runtime.metrics.exposition()


def _probe(passed: bool, phase: str) -> JSONResponse:
    return JSONResponse({"phase": phase}, status_code=200 if passed else 503)


async def _raise_invalid_request(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    problem = error.errors()[0]
    location = [str(part) for part in problem["loc"]]
    field = ".".join(location[1:]) or location[0]
    raise InvalidArgument(f"{field}: {problem['msg']}", field=field)


async def _raise_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path
    if error.status_code == 405:
        allow = (error.headers or {}).get("allow", (error.headers or {}).get("Allow", ""))
        raise MethodNotAllowed(
            f"{request.method} is not allowed on {path}; use {allow}", metadata={"allow": allow}
        )
    if error.status_code == 404:
        raise NoSuchRoute(f"no route {path}; GET /docs lists them")
    raise MalformedRequest(f"{error.detail}: {_unreadable(error.__cause__)}")


def _unreadable(cause: BaseException | None) -> str:
    """Why a JSON body could not be read where its syntax is not to blame."""
    match cause:
        case UnicodeDecodeError():
            return f"byte {cause.start} is not {cause.encoding.upper()}; send JSON in UTF-8"
        case RecursionError():
            return "its values are nested too deeply; send a flatter object"
        case ValueError():
            return "it holds a number with too many digits; send one that fits 64 bits"
    return "send a JSON object in UTF-8"


class _Exchange:
    """One response on its way out: adds the request id, remembers what was sent."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self._request_id = request_id
        self.status: int | None = None
        self.is_complete = False

    async def send(self, message: Message) -> None:
        if message["type"] in ("http.response.start", "websocket.accept"):
            header = (b"x-request-id", self._request_id.encode())
            message["headers"] = [*message.get("headers", ()), header]
            self.status = message.get("status", 101)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self.is_complete = True
        await self._send(message)


class RequestMiddleware:
    """Pure ASGI middleware around every request of a service."""

    def __init__(self, app: AsgiApp, runtime: Runtime, render: ErrorRenderer) -> None:
        self._app = app
        self._runtime = runtime
        self._render = render

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await self._websocket(scope, receive, send)
        elif scope["type"] == "http" and not _is_probe(scope):
            await self._http(scope, receive, send)
        else:
            await self._app(_probed(scope), receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        record = _begin(scope, "http", scope["method"])
        exchange = _Exchange(send, record.request_id)
        started = time.perf_counter()
        try:
            with self._runtime.state.request():
                body = await self._body(scope, receive)
                await _run_cancellable(self._app, scope, _Replay(body, receive), exchange)
        except Exception as error:
            failure = self._failure(error, record)
            await self._answer(failure, scope, receive, exchange)
        finally:
            self._finish(scope, record, str(exchange.status or 499), started)

    async def _answer(
        self, failure: ServiceError, scope: Scope, receive: Receive, exchange: _Exchange
    ) -> None:
        """Tell the client: by a response, or as the last words of one that has begun."""
        ending: StreamEnding | None = scope.get(STREAM_ENDING)
        if exchange.status is None:
            response = self._render(failure, _request_id(scope))
            await response(scope, receive, exchange.send)
        elif ending is not None and not exchange.is_complete:
            body = ending(failure, _request_id(scope))
            await exchange.send({"type": "http.response.body", "body": body, "more_body": False})

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        try:
            async with asyncio.timeout(BODY_SECONDS):
                return await _read_body(scope, receive, self._runtime.settings.max_request_bytes)
        except TimeoutError as error:
            raise DeadlineExceeded(
                f"the request body did not arrive within {BODY_SECONDS} s; send it faster"
            ) from error

    async def _websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        record = _begin(scope, "websocket", "GET")
        exchange = _Exchange(send, record.request_id)
        started = time.perf_counter()
        code = "101"
        try:
            with self._runtime.state.request():
                await self._app(scope, receive, exchange.send)
        except Exception as error:
            failure = self._failure(error, record)
            code = str(failure.http_status)
            await self._refuse_websocket(scope, receive, exchange, failure)
        finally:
            log_request(record, code, time.perf_counter() - started)

    async def _refuse_websocket(
        self, scope: Scope, receive: Receive, exchange: _Exchange, failure: ServiceError
    ) -> None:
        if exchange.status is None and "websocket.http.response" in scope.get("extensions", {}):
            response = self._render(failure, _request_id(scope))
            await response(scope, receive, exchange.send)
            return
        is_temporary = failure.http_status in (429, 503)
        code = WS_TRY_AGAIN_LATER if is_temporary else WS_INTERNAL_ERROR
        await exchange.send({"type": "websocket.close", "code": code, "reason": failure.reason})

    def _failure(self, error: Exception, record: RequestRecord) -> ServiceError:
        failure = as_service_error(error, record.request_id)
        count_refusal(self._runtime.metrics, failure)
        record.facts["reason"] = failure.reason
        return failure

    def _finish(self, scope: Scope, record: RequestRecord, code: str, started: float) -> None:
        seconds = time.perf_counter() - started
        route = getattr(scope.get("route"), "path", "unmatched")
        self._runtime.metrics.http_duration.labels(_method(scope), route, code).observe(seconds)
        log_request(record, code, seconds)


class _Replay:
    """The request as a handler sees it: the whole body at once, then the client's leaving."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._body: bytes | None = body
        self._receive = receive
        self.gone = asyncio.Event()

    async def receive(self) -> Message:
        if self._body is None:
            await self.gone.wait()
            return {"type": "http.disconnect"}
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}

    async def watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.gone.set()


async def _run_cancellable(
    app: AsgiApp, scope: Scope, request: _Replay, exchange: _Exchange
) -> None:
    """Run the app; stop it when the client goes away or its deadline passes."""
    timeout = _timeout_seconds(scope)
    work = asyncio.ensure_future(app(scope, request.receive, exchange.send))
    leaving = asyncio.ensure_future(request.watch())
    try:
        await asyncio.wait({work, leaving}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        # uvicorn also reports a disconnect once the response is complete.
        if work.done() or exchange.is_complete:
            await work
        elif leaving.done():
            raise Cancelled("the client closed the connection")
        else:
            raise DeadlineExceeded(f"no answer within {timeout} s; raise x-request-timeout-ms")
    finally:
        work.cancel()
        leaving.cancel()
        await asyncio.gather(work, leaving, return_exceptions=True)


async def _read_body(scope: Scope, receive: Receive, limit: int) -> bytes:
    """The whole body; PayloadTooLarge by its declared length or as soon as it passes `limit`."""
    declared = _declared_length(scope)
    if declared > limit * DISCARD_FACTOR:
        raise _too_large(f"{declared} bytes", limit)
    chunks: list[bytes] = []
    size = 0
    async for chunk in _chunks(receive):
        size += len(chunk)
        if max(size, declared) <= limit:
            chunks.append(chunk)
        elif size > limit * DISCARD_FACTOR:
            break
    if max(size, declared) > limit:
        raise _too_large(f"{max(size, declared)} bytes", limit)
    return b"".join(chunks)


async def _chunks(receive: Receive) -> AsyncGenerator[bytes, None]:
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Cancelled("the client closed the connection while sending its request")
        yield message.get("body", b"")
        more = message.get("more_body", False)


def _too_large(size: str, limit: int) -> PayloadTooLarge:
    return PayloadTooLarge(
        f"the request body has {size}, the limit is {limit}; send less or raise max_request_bytes"
    )


def _declared_length(scope: Scope) -> int:
    value = _header(scope, b"content-length")
    return int(value) if value is not None and value.isdigit() else 0


def _timeout_seconds(scope: Scope) -> float | None:
    value = _header(scope, b"x-request-timeout-ms")
    if value is None:
        return None
    # isdigit() alone also takes superscripts, which are no numbers to int().
    is_number = value.isascii() and value.isdigit() and len(value) <= MAX_TIMEOUT_DIGITS
    if not is_number or int(value) < 1:
        raise InvalidArgument(
            f"x-request-timeout-ms must be a whole number of at least 1 and at most "
            f"{MAX_TIMEOUT_DIGITS} digits, got {value[:40]!r}",
            field="x-request-timeout-ms",
        )
    return int(value) / 1000


def _header(scope: Scope, name: bytes) -> str | None:
    for key, value in scope["headers"]:
        if key == name:
            return str(value.decode("latin-1"))
    return None


def _is_probe(scope: Scope) -> bool:
    return scope["path"] in EXEMPT_PATHS and scope["method"] in ("GET", "HEAD")


def _probed(scope: Scope) -> Scope:
    # The server leaves out the body of an answer to HEAD, which load balancers ask with.
    return {**scope, "method": "GET"} if scope.get("method") == "HEAD" else scope


def _begin(scope: Scope, protocol: str, method: str) -> RequestRecord:
    request_id = request_id_from(_header(scope, b"x-request-id"))
    scope["vqserve.request_id"] = request_id
    record = RequestRecord(request_id, protocol, f"{method} {scope['path']}"[:200])
    begin_request(record)
    return record


def _request_id(scope: Scope) -> str:
    return str(scope["vqserve.request_id"])


def _method(scope: Scope) -> str:
    # Any token is a legal method; only the known ones become label values.
    known = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS")
    return scope["method"] if scope["method"] in known else "other"
