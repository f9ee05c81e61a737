"""Fixtures of llmd's tests: real processes over a fake executor, started as few times as can be."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING

import grpc.aio
import httpx
import pytest

from support.llmd import LlmServer, llm_server
from vqstack.generation.v1.generation_pb2_grpc import GenerationServiceStub

if TYPE_CHECKING:
    from vqstack.generation.v1.generation_pb2_grpc import GenerationServiceAsyncStub

Start = Callable[..., LlmServer]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Start llmd on a fake model: `start("slow", "--max-num-sequences", "1")`."""
    with ExitStack() as stack:

        def start_one(model: str, *flags: str) -> LlmServer:
            root = tmp_path_factory.mktemp("llmd")
            folder = root / model
            folder.mkdir()
            args = ("--model", str(folder), *flags)
            return stack.enter_context(llm_server(root, args))

        yield start_one


@pytest.fixture(scope="module")
def fast(start: Start) -> LlmServer:
    """A server that answers at once."""
    return start("fast")


@pytest.fixture
async def stub(
    fast: LlmServer,
) -> AsyncIterator[GenerationServiceAsyncStub]:
    """A gRPC stub on the fast server."""
    async with grpc.aio.insecure_channel(fast.grpc_address) as channel:
        yield GenerationServiceStub(channel)


@pytest.fixture
async def http(fast: LlmServer) -> AsyncIterator[httpx.AsyncClient]:
    """An HTTP client on the fast server."""
    async with httpx.AsyncClient(base_url=fast.http_url, timeout=30) as client:
        yield client
