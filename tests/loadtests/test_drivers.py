"""Every kind of request against in-process fakes of the services."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest
from grpc import StatusCode

from openloop.drivers import DriverName, make_driver
from openloop.generator import Recording, run_open_loop
from openloop.outcome import Fate, RequestFailed
from openloop.workload import Workload
from vqclient import NotFoundError, UnavailableError
from vqclient.testing import FakeGenerationService, FakeTokenizerService, refusal, serve

SMALL = Workload(model="nav", image_width=32, image_height=32, num_images=2, max_tokens=2)
BUSY = refusal(StatusCode.RESOURCE_EXHAUSTED, "full", reason="QUEUE_FULL", retry_after=0.001)


async def record(name: DriverName, address: str, workload: Workload = SMALL) -> Recording:
    async with make_driver(name, address, workload) as driver:
        return await run_open_loop(driver, [0.0, 0.001, 0.002], 20)


@pytest.mark.parametrize("name", [name for name in DriverName if name.startswith("tokenizer")])
async def test_tokenizer_requests_are_answered(name: DriverName) -> None:
    async with serve(FakeTokenizerService()) as address:
        recording = await record(name, address)
    assert [outcome.fate for outcome in recording.outcomes] == [Fate.OK] * 3
    assert all(outcome.reply.sent_bytes > 0 for outcome in recording.outcomes)
    assert all(outcome.reply.received_bytes > 0 for outcome in recording.outcomes)


async def test_rejections_are_counted_and_not_retried() -> None:
    service = FakeTokenizerService()
    async with (
        serve(service) as address,
        make_driver(DriverName.TOKENIZER_ENCODE, address, SMALL) as driver,
    ):
        service.calls.failures.extend([BUSY, BUSY])
        recording = await run_open_loop(driver, [0.0, 0.01, 0.02], 20)
    assert sorted(outcome.fate for outcome in recording.outcomes) == [
        Fate.OK,
        Fate.REJECTED,
        Fate.REJECTED,
    ]
    assert service.calls.num_started == 1 + 3  # the warm-up, and each request once


async def test_dropped_and_failed_frames_are_told_apart() -> None:
    service = FakeTokenizerService()
    service.dropped_seqs, service.bad_seqs = {1}, {2}  # seq 0 is the warm-up
    async with serve(service) as address:
        recording = await record(DriverName.TOKENIZER_STREAM, address)
    assert [(outcome.fate, outcome.reason) for outcome in recording.outcomes] == [
        (Fate.DROPPED, "TOO_OLD"),
        (Fate.ERROR, "CORRUPT_CODES"),
        (Fate.OK, ""),
    ]


async def test_frames_go_over_several_streams() -> None:
    service = FakeTokenizerService()
    workload = Workload(image_width=32, image_height=32, num_images=1, num_streams=3)
    async with serve(service) as address:
        recording = await record(DriverName.TOKENIZER_STREAM, address, workload)
    assert service.calls.num_started == 3
    assert [outcome.fate for outcome in recording.outcomes] == [Fate.OK] * 3


async def test_a_stream_that_breaks_fails_its_frames() -> None:
    service = FakeTokenizerService()
    async with serve(service) as address:
        driver = make_driver(DriverName.TOKENIZER_STREAM, address, SMALL)
        await driver.open()
        service.calls.delay = 30.0
        running = asyncio.create_task(run_open_loop(driver, [0.0, 0.0], 20))
        await asyncio.sleep(0.2)
    recording = await running  # leaving the block stopped the server
    await driver.close()
    assert {outcome.fate for outcome in recording.outcomes} == {Fate.ERROR}


async def test_generation_times_every_piece() -> None:
    async with serve(generation=FakeGenerationService(delay=0.005)) as address:
        recording = await record(DriverName.LLM_GRPC, address)
    for outcome in recording.outcomes:
        assert outcome.fate is Fate.OK
        assert outcome.reply.num_tokens == len(outcome.reply.piece_times) == 2
        assert outcome.time_to_first_token is not None
        assert 0 < outcome.time_to_first_token <= outcome.latency


async def test_generation_requests_have_one_length() -> None:
    service = FakeGenerationService()
    async with serve(generation=service) as address:
        await record(DriverName.LLM_GRPC, address)
    assert {request.sampling.max_tokens for request in service.requests} == {2}
    assert all(request.sampling.ignore_eos for request in service.requests)


async def test_a_refused_warm_up_stops_the_run() -> None:
    async with serve(FakeTokenizerService()) as address:
        workload = Workload(model="unknown", image_width=32, image_height=32)
        with pytest.raises(NotFoundError):
            await record(DriverName.TOKENIZER_ENCODE, address, workload)


@pytest.mark.parametrize("name", [name for name in DriverName if name is not DriverName.LLM_SSE])
async def test_a_service_that_is_down_stops_the_run(name: DriverName) -> None:
    with pytest.raises(UnavailableError):
        await record(name, "127.0.0.1:1")


CHAT = [
    {"choices": [{"delta": {"role": "assistant"}}]},
    {"choices": [{"delta": {"content": "one "}}]},
    {"choices": [{"delta": {"content": "two"}}]},
    {"choices": [{"delta": {}, "finish_reason": "length"}]},
    {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}},
]


@asynccontextmanager
async def http_service(
    events: Sequence[object], *, status: str = "200 OK", is_torn: bool = False
) -> AsyncIterator[str]:
    """Answers GET with one model and POST with `events`, as llmd's HTTP port does."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if head.startswith(b"GET"):
            body, line = json.dumps({"data": [{"id": "tiny"}]}), "200 OK"
        else:
            lines = [f"data: {json.dumps(event)}\n\n" for event in events]
            lines += [": ping\n\n"] + ([] if is_torn else ["data: [DONE]\n\n"])
            body, line = "".join(lines), status
        head_out = f"HTTP/1.1 {line}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        writer.write((head_out + body).encode())
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def test_chat_completions_are_read_as_server_sent_events() -> None:
    async with http_service(CHAT) as address:
        recording = await record(DriverName.LLM_SSE, address, Workload())
    for outcome in recording.outcomes:
        assert outcome.fate is Fate.OK
        assert (outcome.reply.num_tokens, outcome.reply.received_bytes) == (2, len("one two"))
        assert len(outcome.reply.piece_times) == 2


@pytest.mark.parametrize(
    ("events", "status", "is_torn", "fate", "reason"),
    [
        ([], "429 Too Many Requests", False, Fate.REJECTED, "HTTP_429"),
        ([], "500 Oops", False, Fate.ERROR, "HTTP_500"),
        (CHAT, "200 OK", True, Fate.ERROR, "STREAM_WITHOUT_DONE"),
        ([{"error": {"code": "ABORTED"}}], "200 OK", False, Fate.ERROR, "ABORTED"),
    ],
)
async def test_failed_chat_completions_are_told_apart(
    events: Sequence[object], status: str, is_torn: bool, fate: Fate, reason: str
) -> None:
    async with http_service(events, status=status, is_torn=is_torn) as address:
        with pytest.raises(RequestFailed, match=reason) as caught:
            await record(DriverName.LLM_SSE, address)
    assert caught.value.fate is fate


async def test_a_closed_http_port_is_named() -> None:
    with pytest.raises(RequestFailed, match="cannot reach the HTTP port"):
        await record(DriverName.LLM_SSE, "127.0.0.1:1")
