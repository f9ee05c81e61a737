"""Key frames over streams: options, frame types, and the request that heals a lost frame."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from grpc import StatusCode

from vqclient import (
    ClientOptions,
    Coding,
    EntropyMode,
    Frame,
    FrameStream,
    FrameType,
    InternalError,
    NotFoundError,
    Operation,
    RetryPolicy,
    StreamOptions,
    TokenizerClient,
    UnavailableError,
    frame_stream,
    testing,
)
from vqclient.testing import FakeTokenizerService, refusal, serve
from vqstack.tokenizer.v1 import tokenizer_pb2

KEY, DELTA = FrameType.KEY, FrameType.DELTA
QUICK = ClientOptions(retry=RetryPolicy(initial_backoff=0.001, max_backoff=0.002))


@pytest.fixture
def service() -> FakeTokenizerService:
    return FakeTokenizerService()


@pytest.fixture
async def client(service: FakeTokenizerService) -> AsyncIterator[TokenizerClient]:
    async with serve(service) as address, TokenizerClient(address, QUICK) as client:
        async with asyncio.timeout(60):
            yield client


async def test_options_of_a_stream_reach_the_service(
    client: TokenizerClient, service: FakeTokenizerService
) -> None:
    options = StreamOptions(
        coding=Coding(EntropyMode.RANS, 8, 0.5),
        keyframe_interval=2,
        model_hash="abababab",
        allow_partial=True,
    )
    frames = [Frame(seq, b"x", request_keyframe=seq == 3) for seq in range(4)]
    results = [r async for r in client.stream_frames(frames, model="nav", options=options)]
    assert [result.frame_type for result in results] == [KEY, DELTA, KEY, KEY]
    (config,) = service.configs
    coding = tokenizer_pb2.CodingOptions(
        entropy=tokenizer_pb2.ENTROPY_MODE_RANS, tile_side=8, rate_weight=0.5
    )
    assert config.coding == coding
    assert (config.keyframe_interval, config.model_hash) == (2, "abababab")
    assert config.allow_partial
    assert service.keyframe_seqs == [3]


async def test_coding_options_of_a_picture_reach_the_service(
    client: TokenizerClient, service: FakeTokenizerService
) -> None:
    encoded = await client.encode(b"x", coding=Coding(EntropyMode.RAW, 4, 0.25))
    assert (service.encodings[0].tile_side, service.encodings[0].rate_weight) == (4, 0.25)
    assert encoded.frame_type is KEY
    cut = await client.decode(encoded.codes[: encoded.base_bytes], allow_partial=True)
    assert (cut.image, cut.complete) == (b"x", False)


async def results_of(stream: FrameStream, count: int) -> list[FrameType | None]:
    return [(await anext(stream)).frame_type for _ in range(count)]


async def test_a_lost_frame_brings_a_key_frame_by_itself(
    client: TokenizerClient, service: FakeTokenizerService
) -> None:
    options = StreamOptions(keyframe_interval=1000)
    async with client.open_stream(model="nav", options=options) as camera:
        viewer = client.open_stream(
            operation=Operation.DECODE, on_keyframe_needed=camera.request_keyframe
        )
        async with viewer:
            seen = []
            for number in range(8):
                await camera.send(image=b"picture %d" % number)
                coded = await anext(camera)
                if number == 2:
                    continue  # Lost on the way: the viewer's next deltas have no reference.
                service.bad_seqs = {2} if number == 3 else set()
                await viewer.send(codes=coded.codes)
                seen.append((await anext(viewer)).error is None)
            await viewer.finish()
        await camera.finish()
        assert [result async for result in camera] == []
    assert seen == [True, True, False, True, True, True, True]
    assert service.keyframe_seqs == [4]


async def test_a_key_frame_is_asked_for_again_only_after_a_while(
    client: TokenizerClient,
    service: FakeTokenizerService,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = 0

    def ask() -> None:
        nonlocal asked
        asked += 1

    codes = [r.codes async for r in client.stream_frames(two_pictures(), model="nav")][1]
    async with client.open_stream(operation=Operation.DECODE, on_keyframe_needed=ask) as viewer:
        for _ in range(3):
            await viewer.send(codes=codes)
            assert (await anext(viewer)).keyframe_needed
        assert asked == 1
        monkeypatch.setattr(frame_stream, "ASK_AGAIN_AFTER", 0.0)
        await viewer.send(codes=codes)
        await anext(viewer)
    assert asked == 2


def two_pictures() -> list[Frame]:
    return [Frame(0, b"one"), Frame(1, b"two")]


async def test_sending_into_a_stream_that_ended_is_an_error(client: TokenizerClient) -> None:
    async with client.open_stream(model="nope-is-fine-for-the-fake") as stream:
        await stream.send(image=b"x")
        await anext(stream)
        await stream.finish()
        assert [result async for result in stream] == []
        with pytest.raises(UnavailableError, match="results say why"):
            await stream.send(image=b"y")


async def test_files_of_a_model_are_listed_and_downloaded(client: TokenizerClient) -> None:
    listed = await client.model("nav", artifacts=["codebook.bin"])
    assert [file.name for file in listed.artifacts] == ["codebook.bin", "encoder.onnx"]
    assert [len(file.data) for file in listed.artifacts] == [8192, 0]
    graph = await client.artifact("nav", "encoder.onnx")
    assert graph.data == b"graph" * 200_000
    assert graph.size_bytes == len(graph.data)


async def test_a_download_goes_on_where_it_broke_off(
    client: TokenizerClient, service: FakeTokenizerService
) -> None:
    gone = refusal(StatusCode.UNAVAILABLE, "gone", reason="DRAINING", retry_after=0.001)
    service.calls.failures.extend([gone, gone])
    graph = await client.artifact("nav", "encoder.onnx")
    assert graph.data == b"graph" * 200_000


async def test_an_unknown_file_is_not_found(client: TokenizerClient) -> None:
    with pytest.raises(NotFoundError, match="UNKNOWN_ARTIFACT"):
        await client.artifact("nav", "weights.pkl")


async def test_a_damaged_download_is_refused(
    client: TokenizerClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = testing._fake_artifact

    def other_hash(name: str, *, with_data: bool = False) -> tokenizer_pb2.Artifact:
        artifact = original(name, with_data=with_data)
        artifact.sha256 = "0" * 64
        return artifact

    monkeypatch.setattr(testing, "_fake_artifact", other_hash)
    with pytest.raises(InternalError, match="arrived damaged"):
        await client.artifact("nav", "codebook.bin")


@pytest.mark.parametrize("options", [{"keyframe_interval": 0}, {"max_in_flight": 0}])
def test_senseless_options_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        StreamOptions(**options)  # type: ignore[arg-type]
