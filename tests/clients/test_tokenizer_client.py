"""TokenizerClient against an in-process fake of the service."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest
from grpc import StatusCode

from vqclient import (
    NO_RETRY,
    ClientOptions,
    DeadlineExceededError,
    Frame,
    ImageFormat,
    InvalidArgumentError,
    NotFoundError,
    Operation,
    ResourceExhaustedError,
    RetryPolicy,
    StreamOptions,
    TokenizerClient,
    UnavailableError,
    VqError,
)
from vqclient.errors import UNREACHABLE
from vqclient.testing import FakeTokenizerService, refusal, serve

QUICK = ClientOptions(retry=RetryPolicy(initial_backoff=0.001, max_backoff=0.002))
BUSY = refusal(StatusCode.RESOURCE_EXHAUSTED, "full", reason="QUEUE_FULL", retry_after=0.01)


@pytest.fixture
def service() -> FakeTokenizerService:
    return FakeTokenizerService()


@pytest.fixture
async def client(service: FakeTokenizerService) -> AsyncIterator[TokenizerClient]:
    async with serve(service) as address, TokenizerClient(address, QUICK) as client:
        yield client


async def test_encode_gives_codes_that_decode_to_the_picture(client: TokenizerClient) -> None:
    encoded = await client.encode(b"a photograph", model="nav")
    decoded = await client.decode(encoded.codes, format=ImageFormat.WEBP)
    assert decoded.image == b"a photograph"
    assert decoded.format is ImageFormat.WEBP
    assert (decoded.width, decoded.height) == (encoded.width, encoded.height)
    assert encoded.bpp == 8 * len(encoded.codes) / (encoded.width * encoded.height)
    assert encoded.source_bytes == len(b"a photograph")
    assert encoded.timings == {"encoder": 0.001}


async def test_recognize_takes_an_image_or_codes(
    client: TokenizerClient, service: FakeTokenizerService
) -> None:
    from_image = await client.recognize(image=b"soup", model="nav", top_k=2)
    assert service.top_k == 2
    codes = (await client.encode(b"soup")).codes
    from_codes = await client.recognize(codes=codes)
    assert [label.name for label in from_image.labels] == ["bibimbap", "pizza"]
    assert from_codes.coded_bytes == len(codes)


@pytest.mark.parametrize("inputs", [{}, {"image": b"a", "codes": b"b"}])
async def test_recognize_refuses_none_or_both_inputs(
    client: TokenizerClient, inputs: dict[str, bytes]
) -> None:
    with pytest.raises(ValueError, match="exactly one of image and codes"):
        await client.recognize(image=inputs.get("image", b""), codes=inputs.get("codes", b""))


async def test_models_are_described(client: TokenizerClient) -> None:
    (model,) = await client.models()
    codebook = await client.model("nav")
    assert (model.name, model.kind, model.stride) == ("nav", "frame", 16)
    assert len(codebook.data) == 4 * model.num_codes * model.code_dim


async def test_error_details_reach_the_caller(client: TokenizerClient) -> None:
    with pytest.raises(NotFoundError) as caught:
        await client.encode(b"x", model="nope")
    error = caught.value
    assert (error.code, error.reason) == (StatusCode.NOT_FOUND, "UNKNOWN_MODEL")
    assert (error.field, error.retry_after) == ("model", None)
    assert error.request_id == "fake-request"
    assert str(error) == "UNKNOWN_MODEL: unknown model 'nope'; available: nav (field model)"


async def test_a_busy_server_is_asked_again_after_its_pause(
    client: TokenizerClient, service: FakeTokenizerService
) -> None:
    service.calls.failures.extend([BUSY, BUSY])
    await client.encode(b"x")
    assert service.calls.num_started == 3


async def test_a_busy_server_is_given_up_after_the_last_attempt(
    client: TokenizerClient, service: FakeTokenizerService
) -> None:
    service.calls.failures.extend([BUSY] * 9)
    with pytest.raises(ResourceExhaustedError) as caught:
        await client.encode(b"x")
    assert caught.value.retry_after == 0.01
    assert service.calls.num_started == client.options.retry.max_attempts


async def test_a_pause_beyond_the_deadline_is_not_waited_for(
    client: TokenizerClient, service: FakeTokenizerService
) -> None:
    service.calls.failures.append(
        refusal(StatusCode.RESOURCE_EXHAUSTED, "full", reason="QUEUE_FULL", retry_after=3600)
    )
    with pytest.raises(ResourceExhaustedError):
        await client.encode(b"x", timeout=5)
    assert service.calls.num_started == 1


async def test_too_large_messages_are_not_sent_again(
    client: TokenizerClient, service: FakeTokenizerService
) -> None:
    service.calls.failures.append(
        refusal(StatusCode.RESOURCE_EXHAUSTED, "too large", reason="PAYLOAD_TOO_LARGE")
    )
    with pytest.raises(ResourceExhaustedError):
        await client.encode(b"x")
    assert service.calls.num_started == 1


async def test_own_message_limit_refuses_before_sending(service: FakeTokenizerService) -> None:
    options = ClientOptions(max_message_bytes=1000)
    async with serve(service) as address, TokenizerClient(address, options) as client:
        with pytest.raises(ResourceExhaustedError):
            await client.encode(bytes(2000))
    assert service.calls.num_started == 0


async def test_deadline_of_the_call_is_kept(service: FakeTokenizerService) -> None:
    service.calls.delay = 30.0
    async with serve(service) as address, TokenizerClient(address) as client:
        with pytest.raises(DeadlineExceededError):
            await client.encode(b"x", timeout=0.05)


async def test_unreachable_server_is_named_with_its_address() -> None:
    options = ClientOptions(retry=NO_RETRY)
    async with TokenizerClient("127.0.0.1:1", options) as client:
        with pytest.raises(
            UnavailableError, match=r"tokenizer service at 127\.0\.0\.1:1"
        ) as caught:
            await client.models(timeout=5)
    assert caught.value.reason == UNREACHABLE


async def test_key_and_metadata_are_sent_with_every_attempt(service: FakeTokenizerService) -> None:
    tokens = iter(["first", "second"])
    options = ClientOptions(
        api_key="secret",
        metadata=lambda: [("x-session", next(tokens))],
        retry=RetryPolicy(initial_backoff=0.001),
    )
    service.calls.failures.append(BUSY)
    async with serve(service) as address, TokenizerClient(address, options) as client:
        await client.encode(b"x")
    assert [seen["x-session"] for seen in service.calls.metadata] == ["first", "second"]
    assert {seen["authorization"] for seen in service.calls.metadata} == {"Bearer secret"}


def frames(count: int) -> list[Frame]:
    return [Frame(seq=seq, image=b"frame %d" % seq, capture_ns=1000 + seq) for seq in range(count)]


async def test_stream_answers_every_frame_in_order(client: TokenizerClient) -> None:
    results = [result async for result in client.stream_frames(frames(20), model="nav")]
    assert [result.seq for result in results] == list(range(20))
    assert [result.capture_ns for result in results] == list(range(1000, 1020))
    assert all(result.codes and result.bpp > 0 for result in results)


async def test_stream_decodes_what_a_stream_encoded(client: TokenizerClient) -> None:
    coded = [result.codes async for result in client.stream_frames(frames(3), model="nav")]
    back = [Frame(seq=seq, codes=codes) for seq, codes in enumerate(coded)]
    pictures = client.stream_frames(back, operation=Operation.DECODE)
    assert [result.image async for result in pictures] == [b"frame 0", b"frame 1", b"frame 2"]


async def test_a_bad_frame_does_not_end_the_stream(
    client: TokenizerClient, service: FakeTokenizerService
) -> None:
    service.bad_seqs = {1}
    results = [result async for result in client.stream_frames(frames(3), model="nav")]
    assert [isinstance(result.error, InvalidArgumentError) for result in results] == [0, 1, 0]
    assert results[1].error is not None
    assert results[1].error.reason == "CORRUPT_CODES"


async def test_window_bounds_the_frames_in_flight(
    client: TokenizerClient, service: FakeTokenizerService
) -> None:
    service.calls.delay = 0.002
    options = StreamOptions(max_in_flight=3)
    results = [result async for result in client.stream_frames(frames(30), options=options)]
    assert len(results) == 30
    assert service.max_unanswered <= 3


async def test_slow_reader_holds_the_source_back(client: TokenizerClient) -> None:
    pulled: list[int] = []

    async def camera() -> AsyncIterator[Frame]:
        for frame in frames(50):
            pulled.append(frame.seq)
            yield frame

    options = StreamOptions(max_in_flight=2)
    async with aclosing(client.stream_frames(camera(), options=options)) as results:
        await anext(results)
        await asyncio.sleep(0.05)
        assert len(pulled) <= 3  # one answered, two in flight


async def test_dropped_frames_are_counted_and_do_not_block(
    client: TokenizerClient, service: FakeTokenizerService
) -> None:
    service.dropped_seqs = {2, 3, 4, 9}
    options = StreamOptions(max_age_ms=20, max_in_flight=2)
    results = [result async for result in client.stream_frames(frames(10), options=options)]
    assert [result.seq for result in results] == [0, 1, 5, 6, 7, 8]
    assert [result.dropped_before for result in results] == [0, 0, 3, 0, 0, 0]


async def test_failing_source_ends_the_stream_with_its_error(client: TokenizerClient) -> None:
    async def broken_camera() -> AsyncIterator[Frame]:
        yield Frame(seq=0, image=b"x")
        raise OSError("camera unplugged")

    with pytest.raises(OSError, match="camera unplugged"):
        [result async for result in client.stream_frames(broken_camera())]


async def test_refused_stream_raises_the_typed_error(
    client: TokenizerClient, service: FakeTokenizerService
) -> None:
    service.calls.failures.append(refusal(StatusCode.NOT_FOUND, "no", reason="UNKNOWN_MODEL"))
    with pytest.raises(NotFoundError):
        [result async for result in client.stream_frames(frames(1), model="x")]


async def test_opening_a_stream_is_retried(
    client: TokenizerClient, service: FakeTokenizerService
) -> None:
    service.calls.failures.append(BUSY)
    results = [result async for result in client.stream_frames(frames(2))]
    assert len(results) == 2
    assert service.calls.num_started == 2


async def test_stream_that_is_not_opened_in_time_says_so(service: FakeTokenizerService) -> None:
    service.calls.delay = 30.0
    options = ClientOptions(timeout=0.05)
    async with serve(service) as address, TokenizerClient(address, options) as client:
        with pytest.raises(DeadlineExceededError, match="did not open the stream"):
            [result async for result in client.stream_frames(frames(1))]


async def test_frame_larger_than_the_server_takes_is_refused_here(client: TokenizerClient) -> None:
    huge = Frame(seq=7, image=bytes((1 << 20) + 1))
    with pytest.raises(InvalidArgumentError, match="frame 7 has 1048577 bytes"):
        [result async for result in client.stream_frames([huge])]


async def test_leaving_a_stream_early_leaves_the_client_usable(client: TokenizerClient) -> None:
    async with aclosing(client.stream_frames(frames(100))) as results:
        await anext(results)
    assert await client.models()


async def test_cancelling_the_task_is_not_taken_for_a_server_error(
    client: TokenizerClient, service: FakeTokenizerService
) -> None:
    service.calls.delay = 30.0
    task = asyncio.create_task(client.encode(b"x"))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_call_that_the_server_cancels_raises_a_typed_error(
    client: TokenizerClient, service: FakeTokenizerService
) -> None:
    service.calls.failures.append(refusal(StatusCode.CANCELLED, "stop", reason="SHUTDOWN"))
    with pytest.raises(VqError) as caught:
        await client.encode(b"x")
    assert caught.value.code is StatusCode.CANCELLED
