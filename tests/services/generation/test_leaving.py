"""Clients that leave in mid-generation, a full queue, and a server told to stop under load."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
import httpx
import openai
import pytest
from openai import AsyncOpenAI

from support.llmd import LlmServer
from support.process import grpc_failure
from vqstack.generation.v1 import generation_pb2 as pb
from vqstack.generation.v1.generation_pb2_grpc import GenerationServiceStub

if TYPE_CHECKING:
    from vqstack.generation.v1.generation_pb2_grpc import GenerationServiceAsyncStub

Start = Callable[..., LlmServer]

# 250 steps of 40 ms: nobody here waits for the end.
ENDLESS = pb.GenerateRequest(
    prompt="x", sampling=pb.SamplingParams(max_tokens=250, ignore_eos=True)
)
ENDLESS_BODY: dict[str, Any] = {"prompt": "x", "max_tokens": 250, "ignore_eos": True}


@pytest.fixture(scope="module")
def slow(start: Start) -> LlmServer:
    """A server that takes 40 ms a token."""
    return start("slow")


@pytest.fixture(scope="module")
def narrow(start: Start) -> LlmServer:
    """A slow server that runs one request and lets one more wait."""
    return start("slow", "--max-num-sequences", "1", "--max-concurrent-requests", "2")


@asynccontextmanager
async def connected(server: LlmServer) -> AsyncIterator[GenerationServiceAsyncStub]:
    async with grpc.aio.insecure_channel(server.grpc_address) as channel:
        yield GenerationServiceStub(channel)


async def rest_of(call: Any) -> list[pb.GenerateResponse]:
    """What a call that was `read` from still has to say."""
    responses = []
    while (response := await call.read()) is not grpc.aio.EOF:
        responses.append(response)
    return responses


class Counted:
    """What one departure changes in a server's metrics."""

    def __init__(self, server: LlmServer) -> None:
        self._server = server
        self._aborted = server.metric("llm_requests_total", finish_reason="abort")

    def check_freed(self) -> None:
        """The sequence is gone, and the engine stops stepping."""
        server = self._server
        server.wait_for_metric("llm_requests_total", self._aborted + 1, finish_reason="abort")
        assert server.metric("llm_requests_running") == 0
        assert server.metric("llm_kv_cache_usage_ratio") == 0
        steps = server.metric("llm_step_duration_seconds_count")
        time.sleep(0.1)
        assert server.metric("llm_step_duration_seconds_count") == steps
        server.wait_for_metric("server_requests_in_flight", 0)


async def test_cancelling_the_call_frees_the_sequence(slow: LlmServer) -> None:
    counted = Counted(slow)
    async with connected(slow) as stub:
        call = stub.Generate(ENDLESS)
        await call.read()
        assert slow.metric("llm_requests_running") == 1
        call.cancel()
    await asyncio.to_thread(counted.check_freed)


async def test_a_vanished_channel_frees_the_sequence(slow: LlmServer) -> None:
    counted = Counted(slow)
    async with connected(slow) as stub:
        await stub.Generate(ENDLESS).read()
    await asyncio.to_thread(counted.check_freed)


async def test_an_expired_deadline_frees_the_sequence(slow: LlmServer) -> None:
    counted = Counted(slow)
    async with connected(slow) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as expired:
            [response async for response in stub.Generate(ENDLESS, timeout=0.3)]
        assert expired.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await asyncio.to_thread(counted.check_freed)


async def test_closing_an_event_stream_frees_the_sequence(slow: LlmServer) -> None:
    counted = Counted(slow)
    async with (
        httpx.AsyncClient(base_url=slow.http_url) as http,
        http.stream("POST", "/v1/completions", json=ENDLESS_BODY | {"stream": True}) as response,
    ):
        await anext(response.aiter_lines())
    await asyncio.to_thread(counted.check_freed)


def test_a_killed_connection_frees_the_sequence(slow: LlmServer) -> None:
    counted = Counted(slow)
    body = b'{"prompt": "x", "max_tokens": 250}'
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
    with socket.create_connection(("127.0.0.1", slow.ports.http)) as connection:
        connection.sendall(head.encode() + b"content-type: application/json\r\n\r\n" + body)
        slow.wait_for_metric("llm_requests_running", 1)
    counted.check_freed()


async def test_an_http_deadline_frees_the_sequence(slow: LlmServer) -> None:
    counted = Counted(slow)
    async with httpx.AsyncClient(base_url=slow.http_url) as http:
        response = await http.post(
            "/v1/completions", json=ENDLESS_BODY, headers={"x-request-timeout-ms": "300"}
        )
    assert response.status_code == 504
    assert response.json()["error"]["reason"] == "DEADLINE_EXCEEDED"
    await asyncio.to_thread(counted.check_freed)


async def test_an_http_deadline_ends_a_stream_with_an_error_event(slow: LlmServer) -> None:
    counted = Counted(slow)
    async with (
        httpx.AsyncClient(base_url=slow.http_url) as http,
        http.stream(
            "POST",
            "/v1/completions",
            json=ENDLESS_BODY | {"stream": True},
            headers={"x-request-timeout-ms": "500"},
        ) as response,
    ):
        events = [line async for line in response.aiter_lines() if line]
    assert response.status_code == 200
    assert len(events) > 2
    error = json.loads(events[-1].removeprefix("data: "))["error"]
    assert (error["reason"], error["type"]) == ("DEADLINE_EXCEEDED", "server_error")
    assert error["request_id"] == response.headers["x-request-id"]
    await asyncio.to_thread(counted.check_freed)


async def test_one_departure_leaves_the_others_alone(slow: LlmServer) -> None:
    counted = Counted(slow)
    body = {"prompt": "x", "max_tokens": 40, "temperature": 0}
    async with connected(slow) as stub, httpx.AsyncClient(base_url=slow.http_url) as http:
        staying = asyncio.create_task(http.post("/v1/completions", json=body, timeout=30))
        call = stub.Generate(ENDLESS)
        await call.read()
        call.cancel()
        answer = (await staying).json()
    assert answer["usage"]["completion_tokens"] == 40
    await asyncio.to_thread(counted.check_freed)


async def test_a_full_queue_answers_429_and_resource_exhausted(narrow: LlmServer) -> None:
    server = narrow
    async with connected(server) as stub, httpx.AsyncClient(base_url=server.http_url) as http:
        running = stub.Generate(ENDLESS)
        await running.read()
        waiting = stub.Generate(ENDLESS)
        await asyncio.to_thread(server.wait_for_metric, "llm_requests_waiting", 1)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            [response async for response in stub.Generate(ENDLESS)]
        failure = grpc_failure(refused.value)
        assert (failure.code, failure.reason) == ("RESOURCE_EXHAUSTED", "QUEUE_FULL")
        assert failure.retry_after_seconds > 0
        response = await http.post("/v1/completions", json=ENDLESS_BODY)
        assert response.status_code == 429
        assert int(response.headers["retry-after"]) >= 1
        assert response.json()["error"]["code"] == "rate_limit_exceeded"
        async with AsyncOpenAI(
            base_url=f"{server.http_url}/v1", api_key="none", max_retries=0
        ) as client:
            with pytest.raises(openai.RateLimitError):
                await client.completions.create(model="slow", prompt="x")
        assert server.metric("llm_requests_rejected_total", reason="queue_full") == 3
        assert server.metric("server_admission_rejections_total", reason="queue_full") == 3
        running.cancel()
        await waiting.read()
        waiting.cancel()
        await asyncio.to_thread(server.wait_for_metric, "llm_requests_running", 0)
        answer = await http.post("/v1/completions", json={"prompt": "x", "max_tokens": 1})
        assert answer.status_code == 200


async def test_a_request_can_be_cancelled_while_it_waits(narrow: LlmServer) -> None:
    server = narrow
    async with connected(server) as stub:
        running = stub.Generate(ENDLESS)
        await running.read()
        waiting = stub.Generate(ENDLESS)
        await asyncio.to_thread(server.wait_for_metric, "llm_requests_waiting", 1)
        waiting.cancel()
        await asyncio.to_thread(server.wait_for_metric, "llm_requests_waiting", 0)
        assert server.metric("llm_requests_running") == 1
        running.cancel()
        await asyncio.to_thread(server.wait_for_metric, "llm_requests_running", 0)


async def test_sigterm_drops_no_accepted_request(start: Start) -> None:
    server = start("slow", "--max-num-sequences", "2")
    request = pb.GenerateRequest(prompt="x", sampling=pb.SamplingParams(max_tokens=30))
    body = {"prompt": "x", "max_tokens": 30}
    async with connected(server) as stub, httpx.AsyncClient(base_url=server.http_url) as http:

        async def over_grpc() -> int:
            return sum([len(piece.token_ids) async for piece in stub.Generate(request)])

        async def over_sse() -> int:
            streamed = body | {"stream": True}
            async with http.stream("POST", "/v1/completions", json=streamed, timeout=30) as got:
                lines = [line async for line in got.aiter_lines() if line]
            assert lines[-1] == "data: [DONE]"
            return lines.count("data: [DONE]")

        async def whole() -> int:
            answer = await http.post("/v1/completions", json=body, timeout=30)
            return int(answer.json()["usage"]["completion_tokens"])

        accepted = [asyncio.create_task(make()) for make in (over_grpc, over_sse, whole) * 2]
        await asyncio.to_thread(server.wait_for_metric, "server_requests_in_flight", 6)
        server.process.terminate()
        assert await asyncio.gather(*accepted) == [30, 1, 30] * 2
    assert await asyncio.to_thread(server.process.wait, 30) == 0


async def test_a_draining_server_refuses_newcomers(start: Start) -> None:
    server = start("slow")
    async with connected(server) as stub, httpx.AsyncClient(base_url=server.http_url) as http:
        await http.get("/v1/models")
        running = stub.Generate(
            pb.GenerateRequest(prompt="x", sampling=pb.SamplingParams(max_tokens=100))
        )
        await running.read()
        server.process.terminate()
        await asyncio.to_thread(server.wait_for_metric, "server_draining", 1)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            [response async for response in stub.Generate(ENDLESS)]
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        response = await http.post("/v1/completions", json=ENDLESS_BODY)
        assert response.status_code == 503
        assert response.json()["error"]["reason"] == "DRAINING"
        assert (await rest_of(running))[-1].finish_reason == pb.FINISH_REASON_LENGTH
    assert await asyncio.to_thread(server.process.wait, 30) == 0


async def test_requests_past_the_grace_period_are_told_so(start: Start) -> None:
    server = start("slow", "--drain-grace-seconds", "0.5")
    async with connected(server) as stub, httpx.AsyncClient(base_url=server.http_url) as http:
        whole = asyncio.create_task(http.post("/v1/completions", json=ENDLESS_BODY))
        call = stub.Generate(ENDLESS)
        await asyncio.to_thread(server.wait_for_metric, "llm_requests_running", 2)
        streamed = ENDLESS_BODY | {"stream": True}
        async with http.stream("POST", "/v1/completions", json=streamed) as events:
            server.process.terminate()
            last_event = (await events.aread()).decode().split("\n\n")[-2]
        assert (await rest_of(call))[-1].finish_reason == pb.FINISH_REASON_ABORT
        assert '"reason":"ABORTED"' in last_event
        answer = await whole
        assert answer.status_code == 503
        assert answer.json()["error"]["reason"] == "ABORTED"
    assert await asyncio.to_thread(server.process.wait, 30) == 0


async def test_a_server_that_lost_its_engine_answers_and_ends(start: Start) -> None:
    server = start("lost")
    async with httpx.AsyncClient(base_url=server.http_url) as http:
        answer = await http.post("/v1/completions", json=ENDLESS_BODY)
    assert answer.status_code == 500
    assert answer.json()["error"]["reason"] == "ENGINE_FAILED"
    assert await asyncio.to_thread(server.process.wait, 30) == 0
