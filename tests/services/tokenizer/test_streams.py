"""StreamFrames over gRPC and its WebSocket twin: the same messages, the same answers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

import grpc.aio
import httpx
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from scq.codec import FrameCodec
from support.process import ServiceProcess, grpc_failure
from support.streams import StreamEnded, over_grpc, over_websocket
from support.tokenizerd import (
    LABELLED,
    BlockingCodec,
    image_file,
    picture,
    tiny_model,
)
from vqserve.common.lifecycle import Ports, running
from vqserve.tokenizer.app import build_app
from vqserve.tokenizer.config import TokenizerSettings
from vqstack.tokenizer.v1 import tokenizer_pb2 as pb
from vqstack.tokenizer.v1 import tokenizer_pb2_grpc


class Exchange(Protocol):
    """Send all requests, then collect the responses; raises StreamEnded when it failed."""

    async def __call__(
        self, requests: Sequence[pb.StreamFramesRequest]
    ) -> list[pb.StreamFramesResponse]: ...


@pytest.fixture(params=["grpc", "websocket"])
def exchange(request: pytest.FixtureRequest, service: ServiceProcess) -> Exchange:
    async def send(requests: Sequence[pb.StreamFramesRequest]) -> list[pb.StreamFramesResponse]:
        if request.param == "grpc":
            return await over_grpc(service.grpc_address, requests)
        return await over_websocket(f"ws://127.0.0.1:{service.ports.http}/v1/stream", requests)

    return send


def config(
    operation: pb.StreamOperation.ValueType, model: str = "labelled", max_age_ms: int = 0
) -> pb.StreamFramesRequest:
    settings = pb.StreamConfig(model=model, operation=operation, max_age_ms=max_age_ms)
    return pb.StreamFramesRequest(config=settings)


def image_frame(seq: int, image: bytes) -> pb.StreamFramesRequest:
    frame = pb.StreamFrame(seq=seq, capture_ns=1000 + seq, image=image)
    return pb.StreamFramesRequest(frame=frame)


def codes_frame(seq: int, codes: bytes) -> pb.StreamFramesRequest:
    return pb.StreamFramesRequest(frame=pb.StreamFrame(seq=seq, capture_ns=7, codes=codes))


ENCODE = pb.STREAM_OPERATION_ENCODE
DECODE = pb.STREAM_OPERATION_DECODE
RECOGNIZE = pb.STREAM_OPERATION_RECOGNIZE


async def test_an_encode_stream_answers_each_frame_in_order(exchange: Exchange) -> None:
    images = [image_file("PNG", 40 + 8 * step, 32) for step in range(5)]
    frames = [image_frame(seq * 3, image) for seq, image in enumerate(images)]
    ready, *results = await exchange([config(ENCODE), *frames])
    assert ready.ready.model.name == "labelled"
    assert ready.ready.max_payload_bytes == 200_000
    assert [result.result.seq for result in results] == [0, 3, 6, 9, 12]
    assert [result.result.capture_ns for result in results] == [1000, 1003, 1006, 1009, 1012]
    for step, response in enumerate(results):
        codes = response.result.codes
        assert response.result.bpp == pytest.approx(8 * len(codes) / ((40 + 8 * step) * 32))
        assert {timing.stage for timing in response.result.timings} >= {"encoder", "entropy"}


async def test_streamed_codes_decode_and_recognize_as_single_ones(exchange: Exchange) -> None:
    _, encoded = await exchange([config(ENCODE), image_frame(0, image_file())])
    codes = encoded.result.codes
    _, decoded = await exchange([config(DECODE, model=""), codes_frame(1, codes)])
    _, by_codes, by_image = await exchange(
        [config(RECOGNIZE), codes_frame(2, codes), image_frame(3, image_file())]
    )
    assert decoded.result.image.startswith(b"\x89PNG")
    assert [label.name for label in by_codes.result.labels]
    assert by_codes.result.labels == by_image.result.labels
    assert by_image.result.codes == codes


async def test_a_bad_frame_is_reported_and_the_stream_goes_on(exchange: Exchange) -> None:
    codes = FrameCodec(tiny_model(LABELLED)).encode(picture()).codes
    bad = [
        image_frame(1, b"not a picture"),
        image_frame(2, b""),
        codes_frame(3, codes),
        pb.StreamFramesRequest(frame=pb.StreamFrame(seq=4)),
        image_frame(5, bytes(200_001)),
    ]
    _, *results = await exchange([config(ENCODE), *bad, image_frame(6, image_file())])
    errors = [response.result.error for response in results]
    assert [error.reason for error in errors] == [
        "INVALID_IMAGE",
        "EMPTY_PAYLOAD",
        "INVALID_STREAM",
        "EMPTY_PAYLOAD",
        "PAYLOAD_TOO_LARGE",
        "",
    ]
    assert [error.code for error in errors] == [3, 3, 3, 3, 8, 0]
    assert results[-1].result.codes


@pytest.mark.parametrize(
    ("requests", "reason"),
    [
        ([image_frame(0, b"x")], "INVALID_STREAM"),
        ([config(pb.STREAM_OPERATION_UNSPECIFIED)], "INVALID_STREAM"),
        ([config(ENCODE, model="nope")], "UNKNOWN_MODEL"),
        ([config(ENCODE, model="")], "INVALID_ARGUMENT"),
        # Nothing follows: a grpc.aio client that is writing when the status arrives loses it.
        ([config(ENCODE), config(ENCODE)], "INVALID_STREAM"),
    ],
    ids=["frame before config", "no operation", "unknown model", "no model", "second config"],
)
async def test_a_stream_that_breaks_the_rules_is_ended_with_the_reason(
    exchange: Exchange, requests: list[pb.StreamFramesRequest], reason: str
) -> None:
    with pytest.raises(StreamEnded, match=f"^{reason}$"):
        await exchange(requests)


async def test_an_empty_stream_is_refused_over_grpc(service: ServiceProcess) -> None:
    with pytest.raises(StreamEnded, match="INVALID_STREAM"):
        await over_grpc(service.grpc_address, [])


async def test_undecodable_bytes_end_a_grpc_stream_with_the_reason(
    service: ServiceProcess,
) -> None:
    name = pb.DESCRIPTOR.services_by_name["TokenizerService"].full_name
    async with grpc.aio.insecure_channel(service.grpc_address) as channel:
        path = f"/{name}/StreamFrames"
        method: grpc.aio.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(path)
        call = method(timeout=20)
        await call.write(b"\xff\xff\xff")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
    assert grpc_failure(caught.value).reason == "MALFORMED_REQUEST"


@pytest.mark.parametrize("message", ["text", b"\xff\xff\xff"])
async def test_a_websocket_takes_serialized_messages_only(
    service: ServiceProcess, message: str | bytes
) -> None:
    async with connect(f"ws://127.0.0.1:{service.ports.http}/v1/stream") as socket:
        await socket.send(message)
        with pytest.raises(ConnectionClosed) as caught:
            await socket.recv()
    assert caught.value.rcvd is not None
    assert caught.value.rcvd.code == 1008
    assert caught.value.rcvd.reason.startswith("INVALID_STREAM")


async def test_stale_frames_are_dropped_and_counted(
    blocked: tuple[Ports, BlockingCodec],
) -> None:
    ports, codec = blocked
    channel = grpc.aio.insecure_channel(f"{ports.host}:{ports.grpc}")
    async with channel, asyncio.timeout(20):
        call = tokenizer_pb2_grpc.TokenizerServiceStub(channel).StreamFrames()
        await call.write(config(ENCODE, max_age_ms=300))
        await call.read()
        for seq in range(7):
            await call.write(image_frame(seq, image_file()))
        await asyncio.to_thread(codec.entered.wait, 10)
        await asyncio.sleep(0.4)
        codec.release.set()
        first = await call.read()
        assert isinstance(first, pb.StreamFramesResponse)
        await call.write(image_frame(99, image_file()))
        second = await call.read()
        assert isinstance(second, pb.StreamFramesResponse)
    assert (first.result.seq, second.result.seq) == (0, 99)
    assert first.result.dropped_before + second.result.dropped_before == 6


async def test_a_cancelled_stream_is_no_longer_active(
    blocked: tuple[Ports, BlockingCodec],
) -> None:
    ports, codec = blocked
    channel = grpc.aio.insecure_channel(f"{ports.host}:{ports.grpc}")
    async with channel, asyncio.timeout(20):
        call = tokenizer_pb2_grpc.TokenizerServiceStub(channel).StreamFrames()
        await call.write(config(ENCODE))
        await call.read()
        for seq in range(10):
            await call.write(image_frame(seq, image_file()))
        await asyncio.to_thread(codec.entered.wait, 10)
        call.cancel()
        await _until_metric(ports, "scq_streams_active 0.0")
    codec.release.set()
    assert codec.encode_calls == 1


async def test_a_draining_server_answers_what_it_read_and_ends_its_streams(
    model_files: str,
) -> None:
    settings = TokenizerSettings(grpc_port=0, http_port=0, models=model_files)
    app = build_app(settings)
    async with running(app) as ports, asyncio.timeout(20):
        channel = grpc.aio.insecure_channel(f"{ports.host}:{ports.grpc}")
        call = tokenizer_pb2_grpc.TokenizerServiceStub(channel).StreamFrames()
        await call.write(config(ENCODE))
        await call.read()
        await call.write(image_frame(1, image_file()))
        answer = await call.read()
        app.runtime.state.mark_draining()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        await channel.close()
    assert isinstance(answer, pb.StreamFramesResponse)
    assert answer.result.codes
    assert grpc_failure(caught.value).reason == "DRAINING"


async def _until_metric(ports: Ports, line: str) -> None:
    async with httpx.AsyncClient() as client:
        while True:
            text = (await client.get(f"http://{ports.host}:{ports.http}/metrics")).text
            if line in text.splitlines():
                return
            await asyncio.sleep(0.02)


async def test_the_log_line_of_a_stream_tells_its_totals(service: ServiceProcess) -> None:
    frames = [image_frame(0, image_file()), image_frame(1, b"bad"), image_frame(2, image_file())]
    _, *results = await over_grpc(service.grpc_address, [config(ENCODE), *frames])
    coded_bytes = sum(len(response.result.codes) for response in results)
    line = service.wait_for_event(failed=1)
    assert (line["frames"], line["coded_bytes"]) == (3, coded_bytes)
    assert (line["model"], line["operation"]) == ("labelled", "encode")
