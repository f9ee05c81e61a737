"""Deadlines, cancellation and overload: work stops before its next stage, room is bounded."""

from __future__ import annotations

import asyncio

import grpc.aio
import httpx
import pytest

from support.process import grpc_failure, http_failure
from support.tokenizerd import BlockingCodec, image_file
from vqserve.common.lifecycle import Ports
from vqstack.tokenizer.v1 import tokenizer_pb2 as pb
from vqstack.tokenizer.v1 import tokenizer_pb2_grpc

Blocked = tuple[Ports, BlockingCodec]
REQUEST = pb.RecognizeRequest(model="labelled", image=image_file())


def grpc_channel(ports: Ports) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(f"{ports.host}:{ports.grpc}")


def http_client(ports: Ports) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=f"http://{ports.host}:{ports.http}", timeout=20)


async def in_flight(ports: Ports) -> float:
    async with http_client(ports) as client:
        text = (await client.get("/metrics")).text
    line = next(row for row in text.splitlines() if row.startswith("server_requests_in_flight "))
    return float(line.split()[1])


async def until_idle(ports: Ports) -> None:
    async with asyncio.timeout(10):
        while await in_flight(ports):
            await asyncio.sleep(0.02)


async def finish(ports: Ports, codec: BlockingCodec) -> None:
    """Let the blocked stage end, and give a following stage every chance to begin."""
    await until_idle(ports)
    codec.release.set()
    async with http_client(ports) as client:
        await client.post("/v1/encode?model=labelled", content=image_file())


async def test_a_grpc_deadline_stops_the_call_before_its_next_stage(blocked: Blocked) -> None:
    ports, codec = blocked
    async with grpc_channel(ports) as channel:
        stub = tokenizer_pb2_grpc.TokenizerServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Recognize(REQUEST, timeout=0.3)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await finish(ports, codec)
    assert (codec.encode_calls, codec.label_calls) == (2, 0)


async def test_a_cancelled_grpc_call_stops_before_its_next_stage(blocked: Blocked) -> None:
    ports, codec = blocked
    async with grpc_channel(ports) as channel:
        call = tokenizer_pb2_grpc.TokenizerServiceStub(channel).Recognize(REQUEST)
        calling = asyncio.ensure_future(call)
        await asyncio.to_thread(codec.entered.wait, 10)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await calling
        await finish(ports, codec)
    assert (codec.encode_calls, codec.label_calls) == (2, 0)


async def test_an_http_timeout_header_is_a_deadline(blocked: Blocked) -> None:
    ports, codec = blocked
    async with http_client(ports) as client:
        response = await client.post(
            "/v1/recognize?model=labelled",
            content=image_file(),
            headers={"content-type": "image/png", "x-request-timeout-ms": "300"},
        )
    assert response.status_code == 504
    assert http_failure(response.json(), response.headers).reason == "DEADLINE_EXCEEDED"
    await finish(ports, codec)
    assert codec.label_calls == 0


@pytest.mark.parametrize("value", ["0", "-5", "soon"])
async def test_a_senseless_timeout_header_is_refused(blocked: Blocked, value: str) -> None:
    ports, _ = blocked
    async with http_client(ports) as client:
        response = await client.post(
            "/v1/encode?model=labelled",
            content=image_file(),
            headers={"x-request-timeout-ms": value},
        )
    assert response.status_code == 400


async def test_an_http_client_that_leaves_stops_its_request(blocked: Blocked) -> None:
    ports, codec = blocked
    async with http_client(ports) as client:
        request = asyncio.create_task(
            client.post(
                "/v1/recognize?model=labelled",
                content=image_file(),
                headers={"content-type": "image/png"},
            )
        )
        await asyncio.to_thread(codec.entered.wait, 10)
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)
    await finish(ports, codec)
    assert codec.label_calls == 0


async def test_a_full_service_refuses_at_once_and_says_when_to_retry(blocked: Blocked) -> None:
    ports, codec = blocked
    request = pb.EncodeRequest(model="labelled", image=image_file())
    async with grpc_channel(ports) as channel, http_client(ports) as client:
        stub = tokenizer_pb2_grpc.TokenizerServiceStub(channel)
        running = [asyncio.ensure_future(stub.Encode(request)) for _ in range(2)]
        await asyncio.to_thread(codec.entered.wait, 10)
        while await in_flight(ports) < 2:
            await asyncio.sleep(0.02)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Encode(request)
        response = await client.post("/v1/encode?model=labelled", content=image_file())
        metrics = (await client.get("/metrics")).text
        codec.release.set()
        replies = await asyncio.gather(*running)

    by_grpc = grpc_failure(caught.value)
    by_http = http_failure(response.json(), response.headers)
    assert (by_grpc.code, by_grpc.reason) == ("RESOURCE_EXHAUSTED", "QUEUE_FULL")
    assert by_grpc.retry_after_seconds > 0
    assert (response.status_code, by_http.reason) == (429, "QUEUE_FULL")
    assert by_http.retry_after_seconds >= 1
    rejected = 'server_admission_rejections_total{reason="queue_full",service="tokenizerd"} 2.0'
    assert rejected in metrics
    assert "scq_queue_depth 1.0" in metrics
    assert all(reply.codes for reply in replies)
