"""The admin listener of a real process: status, load, unload and drain."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
import httpx
import pytest

from support.llmd import ANSWER, LlmServer, llm_server
from support.process import grpc_failure
from vqstack.admin.v1 import admin_pb2 as pb
from vqstack.admin.v1.admin_pb2_grpc import AdminServiceStub

if TYPE_CHECKING:
    from vqstack.admin.v1.admin_pb2_grpc import AdminServiceAsyncStub

FOLDERS = ("slow", "second", "corrupt")


@contextmanager
def administered(root: Path) -> Iterator[LlmServer]:
    """llmd serving `slow`, with more model folders in its model root."""
    models = root / "models"
    for name in FOLDERS:
        (models / name).mkdir(parents=True)
    args = ("--model", str(models / "slow"), "--model-root", str(models), "--admin-port", "0")
    with llm_server(root, args) as started:
        yield started


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlmServer]:
    """A server that tests leave as they found it."""
    with administered(tmp_path_factory.mktemp("admin")) as started:
        yield started


@asynccontextmanager
async def admin(server: LlmServer) -> AsyncIterator[AdminServiceAsyncStub]:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.ports.admin}") as channel:
        yield AdminServiceStub(channel)


def model_root(server: LlmServer) -> str:
    args = server.process.args
    return args[args.index("--model-root") + 1]


async def refused(call: Any) -> tuple[str, str]:
    """Code and reason of a call that fails."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    failure = grpc_failure(caught.value)
    return failure.code, failure.reason


async def complete(server: LlmServer, **body: Any) -> httpx.Response:
    async with httpx.AsyncClient(base_url=server.http_url, timeout=30) as http:
        return await http.post("/v1/completions", json={"prompt": "x", "temperature": 0, **body})


async def test_a_model_can_be_loaded_used_and_unloaded(server: LlmServer) -> None:
    root = model_root(server)
    async with admin(server) as stub:
        status = await stub.GetStatus(pb.GetStatusRequest())
        assert (status.service, list(status.models)) == ("llmd", ["slow"])

        loaded = await stub.LoadModel(pb.LoadModelRequest(path=f"{root}/second", name="again"))
        assert (loaded.name, loaded.model_hash) == ("again", "0" * 16)
        status = await stub.GetStatus(pb.GetStatusRequest())
        assert list(status.models) == ["again", "slow"]
        answer = await complete(server, model="again", max_tokens=5)
        assert answer.json()["choices"][0]["text"] == ANSWER[:5]
        unnamed = await complete(server)
        assert unnamed.json()["error"]["reason"] == "AMBIGUOUS_MODEL"
        assert server.metric("llm_model_info", model="again") == 1

        running = asyncio.create_task(complete(server, model="slow", max_tokens=30))
        await asyncio.to_thread(server.wait_for_metric, "llm_requests_running", 1, model="slow")
        await stub.UnloadModel(pb.UnloadModelRequest(name="slow"))
        assert (await running).json()["usage"]["completion_tokens"] == 30
        assert (await complete(server, model="slow")).status_code == 404
        assert server.metric("llm_model_info", model="slow") == 0
        assert (await complete(server, max_tokens=1)).json()["model"] == "again"

        await stub.LoadModel(pb.LoadModelRequest(path=f"{root}/slow"))
        await stub.UnloadModel(pb.UnloadModelRequest(name="again"))
        assert (await complete(server, model="slow", max_tokens=1)).status_code == 200


async def test_what_admin_refuses(server: LlmServer) -> None:
    root = model_root(server)
    cases = {
        ("ALREADY_EXISTS", "ALREADY_EXISTS"): {"path": f"{root}/second", "name": "slow"},
        ("INVALID_ARGUMENT", "INVALID_MODEL"): {"path": f"{root}/corrupt"},
        ("INVALID_ARGUMENT", "PATH_NOT_ALLOWED"): {"path": "/etc"},
    }
    async with admin(server) as stub:
        for expected, request in cases.items():
            assert await refused(stub.LoadModel(pb.LoadModelRequest(**request))) == expected
        bad_name = pb.LoadModelRequest(path=f"{root}/second", name="../x")
        assert (await refused(stub.LoadModel(bad_name)))[1] == "INVALID_MODEL"
        last = stub.UnloadModel(pb.UnloadModelRequest(name="slow"))
        assert await refused(last) == ("FAILED_PRECONDITION", "LAST_MODEL")
        for name in ("nothing", ""):
            unknown = stub.UnloadModel(pb.UnloadModelRequest(name=name))
            assert await refused(unknown) == ("NOT_FOUND", "UNKNOWN_MODEL")
        status = await stub.GetStatus(pb.GetStatusRequest())
        assert list(status.models) == ["slow"]
    assert (await complete(server, max_tokens=1)).status_code == 200


@pytest.fixture
def doomed(tmp_path: Path) -> Iterator[LlmServer]:
    """A server to be drained."""
    with administered(tmp_path) as started:
        yield started


async def test_drain_finishes_what_runs_and_stops(doomed: LlmServer) -> None:
    server = doomed
    running = asyncio.create_task(complete(server, max_tokens=40))
    await asyncio.to_thread(server.wait_for_metric, "llm_requests_running", 1)
    async with admin(server) as stub:
        drained = await stub.Drain(pb.DrainRequest())
        assert drained.requests_in_flight == 1
    assert (await running).json()["usage"]["completion_tokens"] == 40
    assert await asyncio.to_thread(server.process.wait, 30) == 0
