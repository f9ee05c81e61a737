"""A service process from start to stop: listeners, loading, signals, drain.

One asyncio loop hosts grpc.aio and uvicorn. Order of a shutdown: readiness off (health says
NOT_SERVING) -> `drain_delay_seconds` in which late requests are still served -> new requests
refused -> up to `drain_grace_seconds` for running ones -> listeners closed.
Knows no engine and no RPC of a service.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext
from dataclasses import asdict, dataclass

import grpc.aio
import uvicorn
from fastapi import FastAPI
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection

from vqserve.common.admin import AdminServicer, ModelAdmin
from vqserve.common.interceptors import RequestInterceptor
from vqserve.common.logging import log_event
from vqserve.common.runtime import Runtime
from vqstack.admin.v1 import admin_pb2, admin_pb2_grpc

logger = logging.getLogger(__name__)

# Room for the other fields of a message whose payload is exactly max_request_bytes; what is
# larger still is refused by gRPC itself, before it is in memory.
ENVELOPE_BYTES = 64 * 1024
HEARTBEAT_SECONDS = 1.0
# For answers already written to reach the wire once no request is left.
CLOSE_GRACE_SECONDS = 1.0
# Callers that were just answered often call again at once; for this long they are told DRAINING
# rather than finding their connection cut.
LINGER_SECONDS = 0.25
HEALTH = health_pb2.HealthCheckResponse


class StartupError(Exception):
    """The service cannot start; the message names the value and the remedy."""


@dataclass(frozen=True)
class GrpcService:
    """One gRPC service: its full name and the function that adds it to a server."""

    full_name: str
    register: Callable[[grpc.aio.Server], None]


@dataclass(frozen=True)
class ServiceApp:
    """Everything that makes a process one service rather than another.

    `load` runs after the listeners are up (probes say "starting" meanwhile) and raises
    StartupError when it cannot; `close` runs last.
    """

    runtime: Runtime
    grpc_services: tuple[GrpcService, ...]
    http: FastAPI
    models: ModelAdmin
    load: Callable[[], Awaitable[None]]
    close: Callable[[], Awaitable[None]]


@dataclass(frozen=True)
class Ports:
    """Where the listeners really are; `admin` is None while that listener is off."""

    host: str
    grpc: int
    http: int
    admin: int | None
    pid: int


class ServiceHost:
    """Owns the listeners of one ServiceApp."""

    def __init__(self, app: ServiceApp) -> None:
        self._app = app
        self._runtime = app.runtime
        self._health = health_aio.HealthServicer()
        self._grpc = self._build_grpc()
        self._http = _Uvicorn(self._uvicorn_config())
        self._closers = contextlib.AsyncExitStack()

    async def start(self) -> Ports:
        """Open the listeners; probes answer from here on, requests are refused as NOT_READY.

        Raises StartupError, with nothing left open, when an address cannot be bound.
        """
        try:
            return await self._open()
        except BaseException:
            await self.stop()
            raise

    async def _open(self) -> Ports:
        settings = self._runtime.settings
        self._closers.push_async_callback(self._app.close)
        await self._set_health(HEALTH.NOT_SERVING)
        self._closers.push_async_callback(self._grpc.stop, CLOSE_GRACE_SECONDS)
        grpc_port = _bind(self._grpc, settings.host, settings.grpc_port)
        admin_port = await self._open_admin()
        listener = self._closers.enter_context(listen(settings.host, settings.http_port))
        await self._grpc.start()
        heartbeat = asyncio.create_task(self._heartbeat())
        self._closers.callback(heartbeat.cancel)
        serving = asyncio.create_task(self._http.serve([listener]))
        self._closers.push_async_callback(self._close_http, serving)
        while not self._http.started:
            await asyncio.sleep(0.01)
        http_port = listener.getsockname()[1]
        return Ports(settings.host, grpc_port, http_port, admin_port, os.getpid())

    async def load(self) -> None:
        """Load the models and become ready."""
        await self._app.load()
        self._runtime.state.mark_serving()
        self._runtime.metrics.ready.set(1)
        await self._set_health(HEALTH.SERVING)

    async def drain(self) -> bool:
        """Readiness off, refuse, wait; True when no running request had to be cut off."""
        settings, state, metrics = (
            self._runtime.settings,
            self._runtime.state,
            self._runtime.metrics,
        )
        was_serving = state.is_started
        state.mark_leaving()
        metrics.ready.set(0)
        metrics.draining.set(1)
        await self._health.enter_graceful_shutdown()
        log_event(logger, logging.INFO, "draining", requests_in_flight=state.requests_in_flight)
        if was_serving:
            await asyncio.sleep(settings.drain_delay_seconds)
        state.mark_draining()
        is_idle = await state.wait_idle(settings.drain_grace_seconds)
        if was_serving:
            await asyncio.sleep(LINGER_SECONDS)
        return is_idle

    async def stop(self) -> None:
        """Close what was opened, cutting off what still runs."""
        await self._closers.aclose()

    async def _close_http(self, serving: asyncio.Task[None]) -> None:
        self._http.should_exit = True
        await serving

    def _build_grpc(self) -> grpc.aio.Server:
        runtime = self._runtime
        interceptor = RequestInterceptor(runtime.metrics, runtime.state.request)
        server = grpc.aio.server(
            interceptors=(interceptor,),
            options=_grpc_options(
                runtime.settings.max_request_bytes, runtime.settings.max_connection_age_seconds
            ),
            # The polite refusal is the state's; this one is for floods, before bodies are read.
            maximum_concurrent_rpcs=2 * runtime.settings.max_open_requests,
        )
        for service in self._app.grpc_services:
            service.register(server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = [service.full_name for service in self._app.grpc_services]
        reflection.enable_server_reflection(
            (*names, "grpc.health.v1.Health", reflection.SERVICE_NAME), server
        )
        return server

    async def _open_admin(self) -> int | None:
        settings = self._runtime.settings
        if settings.admin_port is None:
            return None
        # Admin calls are answered while draining and are not counted as the service's work.
        interceptor = RequestInterceptor(self._runtime.metrics, nullcontext)
        server = grpc.aio.server(
            interceptors=(interceptor,), options=_grpc_options(ENVELOPE_BYTES, 0)
        )
        self._closers.push_async_callback(server.stop, CLOSE_GRACE_SECONDS)
        servicer = AdminServicer(self._runtime, self._app.models)
        admin_pb2_grpc.add_AdminServiceServicer_to_server(servicer, server)
        name = admin_pb2.DESCRIPTOR.services_by_name["AdminService"].full_name
        reflection.enable_server_reflection((name, reflection.SERVICE_NAME), server)
        port = _bind(server, settings.admin_host, settings.admin_port)
        await server.start()
        return port

    def _uvicorn_config(self) -> uvicorn.Config:
        limit = self._runtime.settings.max_request_bytes
        return uvicorn.Config(
            self._app.http,
            log_config=None,
            access_log=False,
            lifespan="off",
            server_header=False,
            ws_max_size=limit + ENVELOPE_BYTES,
            # Codes and image files do not compress; trying costs time and invites bombs.
            ws_per_message_deflate=False,
            timeout_graceful_shutdown=max(1, round(CLOSE_GRACE_SECONDS)),
        )

    async def _set_health(self, status: int) -> None:
        for name in ("", *(service.full_name for service in self._app.grpc_services)):
            await self._health.set(name, status)

    async def _heartbeat(self) -> None:
        while True:
            started = time.monotonic()
            await asyncio.sleep(HEARTBEAT_SECONDS)
            lag = time.monotonic() - started - HEARTBEAT_SECONDS
            self._runtime.metrics.event_loop_lag.set(max(0.0, lag))


class _Uvicorn(uvicorn.Server):
    """uvicorn without its own signal handlers: the lifecycle owns the signals."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def running(app: ServiceApp) -> AsyncIterator[Ports]:
    """Serve inside the current loop; drains on the way out. For tests and embedding."""
    host = ServiceHost(app)
    ports = await host.start()
    try:
        await host.load()
        yield ports
    finally:
        await host.drain()
        await host.stop()


def run(build: Callable[[], ServiceApp]) -> int:
    """Build the service, serve until SIGTERM or SIGINT, return the exit status.

    0 after a drain; 2 when the service could not start.
    """
    try:
        return asyncio.run(_serve(build))
    except StartupError as error:
        log_event(logger, logging.ERROR, "cannot start", error=str(error))
        sys.stderr.write(f"error: {error}\n")
        return 2


async def _serve(build: Callable[[], ServiceApp]) -> int:
    app = build()
    state = app.runtime.state
    _install_signals(state.request_drain)
    host = ServiceHost(app)
    ports = await host.start()
    log_event(logger, logging.INFO, "listening", **asdict(ports))
    try:
        if await _load_unless_stopped(host, state.drain_requested):
            log_event(
                logger, logging.INFO, "serving", models=app.models.model_names(), **asdict(ports)
            )
            _write_ports(app.runtime.settings.ports_file, ports)
            await state.drain_requested.wait()
        if not await host.drain():
            count = state.requests_in_flight
            log_event(logger, logging.WARNING, "cut off requests", requests_in_flight=count)
    finally:
        await host.stop()
    log_event(logger, logging.INFO, "stopped")
    return 0


async def _load_unless_stopped(host: ServiceHost, stopped: asyncio.Event) -> bool:
    loading = asyncio.create_task(host.load())
    stopping = asyncio.create_task(stopped.wait())
    await asyncio.wait({loading, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if loading.done():
        await loading
        return True
    loading.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await loading
    return False


def _install_signals(on_stop: Callable[[], None]) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_stop)


def _write_ports(path: os.PathLike[str] | None, ports: Ports) -> None:
    if path is None:
        return
    # Readers poll for the file, so it must appear whole.
    partial = f"{os.fspath(path)}.partial"
    try:
        with open(partial, "w", encoding="utf-8") as file:
            json.dump(asdict(ports), file)
        os.replace(partial, path)
    except OSError as error:
        raise StartupError(
            f"cannot write --ports-file {os.fspath(path)}: {error.strerror or error}; "
            "name a file in a folder that exists and can be written"
        ) from error


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket for the HTTP server. Raises StartupError naming the address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle's algorithm off only where the protocol is named; left on, every small
    # answer waited 40 ms for the client's delayed acknowledgement.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise StartupError(
            f"cannot listen on {host}:{port} for HTTP: {error.strerror or error}; "
            "choose another --host or --http-port"
        ) from error
    return listener


def _bind(server: grpc.aio.Server, host: str, port: int) -> int:
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        return server.add_insecure_port(address)
    except RuntimeError as error:
        raise StartupError(
            f"cannot listen on {address} for gRPC; choose another --host or port"
        ) from error


def _grpc_options(max_request_bytes: int, max_age_seconds: int) -> list[tuple[str, int]]:
    options = [
        ("grpc.max_receive_message_length", max_request_bytes + ENVELOPE_BYTES),
        ("grpc.max_send_message_length", -1),
        # Two servers on one port would share its connections silently.
        ("grpc.so_reuseport", 0),
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ]
    if max_age_seconds:
        options.append(("grpc.max_connection_age_ms", 1000 * max_age_seconds))
    return options
