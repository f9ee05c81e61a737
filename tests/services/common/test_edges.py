"""The two edges around a toy service: what every RPC and route gets without asking for it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
import httpx
import pytest
from fastapi import WebSocket
from pydantic import BaseModel
from starlette.responses import StreamingResponse
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from support.process import grpc_failure, http_failure
from vqserve.common.admin import LoadedModel
from vqserve.common.asgi import build_http
from vqserve.common.config import ServiceSettings
from vqserve.common.errors import NotFound, Unavailable
from vqserve.common.lifecycle import (
    GrpcService,
    Ports,
    ServiceApp,
    ServiceHost,
    StartupError,
    listen,
    run,
    running,
)
from vqserve.common.runtime import Runtime
from vqstack.admin.v1 import admin_pb2, admin_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]
TOY = admin_pb2.DESCRIPTOR.services_by_name["AdminService"].full_name


class ToyServicer(admin_pb2_grpc.AdminServiceServicer):
    """Borrows a contract that has four unary RPCs; each one fails or works in its own way."""

    async def GetStatus(
        self, request: admin_pb2.GetStatusRequest, context: Context
    ) -> admin_pb2.GetStatusResponse:
        return admin_pb2.GetStatusResponse(service="toy")

    async def LoadModel(
        self, request: admin_pb2.LoadModelRequest, context: Context
    ) -> admin_pb2.LoadModelResponse:
        raise RuntimeError("a secret of the server")

    async def UnloadModel(
        self, request: admin_pb2.UnloadModelRequest, context: Context
    ) -> admin_pb2.UnloadModelResponse:
        raise NotFound(f"no {request.name}", field="name")

    async def Drain(
        self, request: admin_pb2.DrainRequest, context: Context
    ) -> admin_pb2.DrainResponse:
        await asyncio.sleep(30)
        return admin_pb2.DrainResponse()


class NoModels:
    """A service without models."""

    def model_names(self) -> list[str]:
        return []

    async def load_model(self, path: Path, name: str) -> LoadedModel:
        raise NotFound("toys load nothing")

    async def unload_model(self, name: str) -> None:
        raise NotFound("toys hold nothing")


class Question(BaseModel):
    """A body with one number."""

    number: int


@dataclass
class Toy:
    """A toy service and where it listens."""

    app: ServiceApp
    ports: Ports

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.ports.http}"

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.ports.grpc}"


def toy_app(**settings: Any) -> ServiceApp:
    runtime = Runtime.create("toy", ServiceSettings(max_request_bytes=2048, **settings))
    http = build_http(runtime, "toy")

    @http.post("/ask")
    async def ask(question: Question) -> dict[str, int]:
        return {"answer": question.number + 1}

    @http.get("/broken")
    async def broken() -> None:
        raise RuntimeError("a secret of the server")

    @http.get("/away")
    async def away() -> None:
        raise Unavailable("gone fishing", retry_after_seconds=3)

    @http.get("/drip")
    async def drip() -> StreamingResponse:
        async def drops() -> AsyncIterator[bytes]:
            for _ in range(3):
                yield b"x" * 1000
                await asyncio.sleep(0.01)

        return StreamingResponse(drops())

    @http.websocket("/echo")
    async def echo(websocket: WebSocket) -> None:
        await websocket.accept()
        text = await websocket.receive_text()
        if text == "break":
            raise RuntimeError("a secret of the server")
        await websocket.send_text(text)
        await websocket.close()

    async def nothing() -> None:
        pass

    servicer = ToyServicer()
    service = GrpcService(
        TOY, lambda server: admin_pb2_grpc.add_AdminServiceServicer_to_server(servicer, server)
    )
    return ServiceApp(runtime, (service,), http, NoModels(), nothing, nothing)


@pytest.fixture
async def toy() -> AsyncIterator[Toy]:
    app = toy_app(drain_grace_seconds=0.2)
    async with running(app) as ports:
        yield Toy(app, ports)


async def call(toy: Toy, method: str, request: Any, timeout: float = 10) -> grpc.aio.AioRpcError:
    async with grpc.aio.insecure_channel(toy.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await getattr(admin_pb2_grpc.AdminServiceStub(channel), method)(
                request, timeout=timeout
            )
    return caught.value


async def metric(toy: Toy, line: str) -> bool:
    async with httpx.AsyncClient() as client:
        return line in (await client.get(f"{toy.url}/metrics")).text.splitlines()


async def test_a_service_error_arrives_whole(toy: Toy) -> None:
    request = admin_pb2.UnloadModelRequest(name="blue")
    failure = grpc_failure(await call(toy, "UnloadModel", request))
    assert (failure.code, failure.reason, failure.field) == ("NOT_FOUND", "NOT_FOUND", "name")
    assert failure.message == "no blue"
    assert failure.request_id
    assert await metric(
        toy,
        'grpc_server_handled_total{grpc_code="NOT_FOUND",grpc_method="UnloadModel",'
        f'grpc_service="{TOY}",grpc_type="unary"}} 1.0',
    )


async def test_bytes_that_are_no_message_are_refused_like_any_bad_request(toy: Toy) -> None:
    async with grpc.aio.insecure_channel(toy.address) as channel:
        path = f"/{TOY}/UnloadModel"
        method: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(path)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await method(b"\xff\xff\xff", timeout=10)
    failure = grpc_failure(caught.value)
    assert (failure.code, failure.reason) == ("INVALID_ARGUMENT", "MALFORMED_REQUEST")
    assert "3 bytes" in failure.message
    assert await metric(
        toy,
        'grpc_server_handled_total{grpc_code="INVALID_ARGUMENT",grpc_method="UnloadModel",'
        f'grpc_service="{TOY}",grpc_type="unary"}} 1.0',
    )


async def test_http_answers_do_not_wait_for_delayed_acknowledgements() -> None:
    no_delay: asyncio.Queue[int] = asyncio.Queue()

    def look(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted: socket.socket = writer.get_extra_info("socket")
        no_delay.put_nowait(accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        writer.close()

    listener = listen("127.0.0.1", 0)
    async with await asyncio.start_server(look, sock=listener):
        _, writer = await asyncio.open_connection(*listener.getsockname())
        assert await no_delay.get() != 0
        writer.close()


async def test_an_unexpected_error_is_logged_and_not_leaked(
    toy: Toy, caplog: pytest.LogCaptureFixture
) -> None:
    failure = grpc_failure(await call(toy, "LoadModel", admin_pb2.LoadModelRequest()))
    async with httpx.AsyncClient() as client:
        response = await client.get(f"{toy.url}/broken")
    by_http = http_failure(response.json(), response.headers)
    assert response.status_code == 500
    for told in (failure, by_http):
        assert told.reason == "INTERNAL"
        assert "secret" not in told.message
        assert told.request_id in told.message
    tracebacks = [record.exc_info for record in caplog.records if record.exc_info]
    assert len(tracebacks) == 2


async def test_a_deadline_is_counted_as_one(toy: Toy) -> None:
    error = await call(toy, "Drain", admin_pb2.DrainRequest(), timeout=0.2)
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    line = (
        'grpc_server_handled_total{grpc_code="DEADLINE_EXCEEDED",grpc_method="Drain",'
        f'grpc_service="{TOY}",grpc_type="unary"}} 1.0'
    )
    async with asyncio.timeout(5):
        while not await metric(toy, line):
            await asyncio.sleep(0.02)
    assert toy.app.runtime.state.requests_in_flight == 0


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "reason"),
    [
        ("POST", "/ask", b'{"number": "x"}', 400, "INVALID_ARGUMENT"),
        ("POST", "/ask", b"not json", 400, "INVALID_ARGUMENT"),
        ("POST", "/ask", b"", 400, "INVALID_ARGUMENT"),
        ("POST", "/ask", b'{"number": "\xff"}', 400, "MALFORMED_REQUEST"),
        ("POST", "/ask", b'{"number": %s}' % (b"[" * 1000 + b"]" * 1000), 400, "MALFORMED_REQUEST"),
        ("POST", "/readyz", b"", 405, "METHOD_NOT_ALLOWED"),
        ("DELETE", "/metrics", b"", 405, "METHOD_NOT_ALLOWED"),
        ("POST", "/ask", bytes(2049), 413, "PAYLOAD_TOO_LARGE"),
        ("POST", "/ask", bytes(100_000), 413, "PAYLOAD_TOO_LARGE"),
        ("GET", "/ask", b"", 405, "METHOD_NOT_ALLOWED"),
        ("GET", "/nowhere", b"", 404, "NO_SUCH_ROUTE"),
        ("GET", "/away", b"", 503, "UNAVAILABLE"),
    ],
)
async def test_every_http_failure_has_the_same_shape(
    toy: Toy, method: str, path: str, body: bytes, status: int, reason: str
) -> None:
    headers = {"content-type": "application/json"}
    async with httpx.AsyncClient() as client:
        response = await client.request(method, toy.url + path, content=body, headers=headers)
    failure = http_failure(response.json(), response.headers)
    assert (response.status_code, failure.reason) == (status, reason)
    assert failure.request_id == response.headers["x-request-id"]


async def test_a_body_that_is_no_text_is_told_where(toy: Toy) -> None:
    headers = {"content-type": "application/json"}
    async with httpx.AsyncClient() as client:
        response = await client.post(f"{toy.url}/ask", content=b'{"n\xff": 1}', headers=headers)
    failure = http_failure(response.json(), response.headers)
    assert "byte 3 is not UTF-8" in failure.message


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/startupz", "/metrics"])
async def test_probes_answer_a_load_balancer_that_sends_head(toy: Toy, path: str) -> None:
    async with httpx.AsyncClient() as client:
        response = await client.head(toy.url + path)
    assert (response.status_code, response.content) == (200, b"")


@pytest.mark.parametrize("value", ["\u00b2", "9" * 400, "9" * 5000, "", "+1", "1_0"])
async def test_a_timeout_that_is_no_number_is_the_clients_mistake(toy: Toy, value: str) -> None:
    headers = [(b"x-request-timeout-ms", value.encode("latin-1"))]
    async with httpx.AsyncClient() as client:
        response = await client.get(f"{toy.url}/drip", headers=headers)
    failure = http_failure(response.json(), response.headers)
    assert (response.status_code, failure.field) == (400, "x-request-timeout-ms")


async def test_a_body_that_does_not_arrive_gives_its_place_back(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vqserve.common.asgi.BODY_SECONDS", 0.1)

    async def trickle() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(1)
        yield b"}"

    async with httpx.AsyncClient() as client:
        response = await client.post(f"{toy.url}/ask", content=trickle())
    assert response.status_code == 504
    assert toy.app.runtime.state.requests_in_flight == 0


async def test_good_requests_pass_and_streams_arrive_whole(toy: Toy) -> None:
    async with httpx.AsyncClient() as client:
        answer = await client.post(f"{toy.url}/ask", json={"number": 41})
        drops = await client.get(f"{toy.url}/drip")
    assert answer.json() == {"answer": 42}
    assert drops.content == b"x" * 3000


async def test_a_websocket_is_a_request_like_others(toy: Toy) -> None:
    state = toy.app.runtime.state
    url = f"ws://127.0.0.1:{toy.ports.http}/echo"
    async with connect(url, additional_headers={"x-request-id": "ws-1"}) as websocket:
        assert websocket.response is not None
        assert websocket.response.headers["x-request-id"] == "ws-1"
        assert state.requests_in_flight == 1
        await websocket.send("hello")
        assert await websocket.recv() == "hello"
    async with asyncio.timeout(5):
        while state.requests_in_flight:
            await asyncio.sleep(0.01)


async def test_a_websocket_handler_that_fails_leaks_nothing(toy: Toy) -> None:
    async with connect(f"ws://127.0.0.1:{toy.ports.http}/echo") as websocket:
        await websocket.send("break")
        with pytest.raises(ConnectionClosed) as caught:
            await websocket.recv()
    assert caught.value.rcvd is not None
    assert (caught.value.rcvd.code, caught.value.rcvd.reason) == (1011, "INTERNAL")


async def test_a_draining_service_refuses_websockets_before_they_open() -> None:
    app = toy_app()
    async with running(app) as ports:
        app.runtime.state.mark_draining()
        with pytest.raises(InvalidStatus) as caught:
            await connect(f"ws://127.0.0.1:{ports.http}/echo")
    assert caught.value.response.status_code == 503
    assert b"DRAINING" in (caught.value.response.body or b"")


async def test_a_starting_service_is_alive_but_not_ready() -> None:
    loading, loaded = asyncio.Event(), asyncio.Event()
    app = toy_app()

    async def load() -> None:
        loading.set()
        await loaded.wait()

    slow = ServiceApp(
        app.runtime, app.grpc_services, app.http, app.models, load=load, close=app.close
    )
    host = ServiceHost(slow)
    toy = Toy(slow, await host.start())
    load_task = asyncio.create_task(host.load())
    await loading.wait()
    async with httpx.AsyncClient(base_url=toy.url) as client:
        before = [(await client.get(path)).status_code for path in ("/livez", "/startupz")]
        refused = await client.post("/ask", json={"number": 1})
        loaded.set()
        await load_task
        after = [(await client.get(path)).status_code for path in ("/startupz", "/readyz")]
    await host.drain()
    await host.stop()
    assert (before, after) == ([200, 503], [200, 200])
    failure = http_failure(refused.json(), refused.headers)
    assert (refused.status_code, failure.reason) == (503, "NOT_READY")


async def test_draining_refuses_new_requests_and_waits_for_running_ones() -> None:
    app = toy_app(drain_grace_seconds=5)
    host = ServiceHost(app)
    toy = Toy(app, await host.start())
    await host.load()
    async with (
        httpx.AsyncClient(base_url=toy.url) as client,
        grpc.aio.insecure_channel(toy.address) as channel,
    ):
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        await stub.GetStatus(admin_pb2.GetStatusRequest())
        with app.runtime.state.request():
            draining = asyncio.create_task(host.drain())
            await app.runtime.state.refusing.wait()
            refused = await client.post("/ask", json={"number": 1})
            ready = await client.get("/readyz")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.GetStatus(admin_pb2.GetStatusRequest())
            assert not draining.done()
        assert await draining
    await host.stop()
    assert (refused.status_code, ready.status_code) == (503, 503)
    assert grpc_failure(caught.value).reason == "DRAINING"


async def test_a_request_beyond_the_grace_is_reported_as_cut_off() -> None:
    app = toy_app(drain_grace_seconds=0.05)
    host = ServiceHost(app)
    await host.start()
    await host.load()
    with app.runtime.state.request():
        assert not await host.drain()
    await host.stop()


@pytest.mark.parametrize("listener", ["grpc_port", "http_port"])
async def test_a_taken_port_is_named(listener: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        host = ServiceHost(toy_app(**{listener: port}))
        with pytest.raises(StartupError, match=str(port)):
            await host.start()


def test_a_ports_file_that_cannot_be_written_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ports_file = tmp_path / "nowhere" / "ports.json"
    ports: dict[str, Any] = {"grpc_port": 0, "http_port": 0, "ports_file": ports_file}
    assert run(lambda: toy_app(**ports)) == 2
    message = capsys.readouterr().err
    assert str(ports_file) in message
    assert "name a file in a folder" in message
