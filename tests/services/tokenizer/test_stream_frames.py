"""Key and delta frames of a stream: what is coded when, what is lost, and how it heals."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import pytest

from scq.bitstream import parse_header
from scq.codec import FrameCodec
from support.process import ServiceProcess
from support.streams import StreamEnded, over_grpc, over_websocket
from support.tokenizerd import LABELLED, PLAIN, image_bytes, image_file, picture, tiny_model
from vqserve.common.admission import AdmissionGate
from vqserve.common.errors import FailedPrecondition, ServiceError
from vqserve.common.metrics import ServerMetrics
from vqserve.tokenizer.codecs import ModelStore
from vqserve.tokenizer.core import TokenizerCore
from vqserve.tokenizer.loading import serve
from vqserve.tokenizer.metrics import ScqMetrics
from vqserve.tokenizer.pipeline import FramePipeline
from vqserve.tokenizer.streams import FrameStreams, StreamLimits
from vqstack.tokenizer.v1 import tokenizer_pb2 as pb

KEY, DELTA = pb.FRAME_TYPE_KEY, pb.FRAME_TYPE_DELTA
ENCODE = pb.STREAM_OPERATION_ENCODE
DECODE = pb.STREAM_OPERATION_DECODE
RECOGNIZE = pb.STREAM_OPERATION_RECOGNIZE
STILL = image_file()


class Streams:
    """StreamFrames without a process or a wire: all requests in, all results out."""

    def __init__(self, streams: FrameStreams, metrics: ServerMetrics) -> None:
        self._streams = streams
        self._metrics = metrics
        self.ready = pb.StreamReady()

    async def run(
        self, config: pb.StreamConfig, frames: Sequence[pb.StreamFrame]
    ) -> list[pb.FrameResult]:
        """The results of a whole stream; `ready` is its first answer."""
        results = []
        async with asyncio.timeout(60):
            async for response in self._streams.stream(_requests(config, frames), "grpc"):
                if response.HasField("ready"):
                    self.ready = response.ready
                else:
                    results.append(response.result)
        return results

    def metric(self, name: str, **labels: str) -> float:
        """A metric's value for the labelled model; 0 before its first sample."""
        versions = {"model": "labelled", "version": VERSION, **labels}
        return self._metrics.registry.get_sample_value(name, versions) or 0.0


async def _requests(
    config: pb.StreamConfig, frames: Sequence[pb.StreamFrame]
) -> AsyncIterator[pb.StreamFramesRequest]:
    yield pb.StreamFramesRequest(config=config)
    for frame in frames:
        yield pb.StreamFramesRequest(frame=frame)


VERSION = tiny_model(LABELLED).model_hash[:8]


@pytest.fixture
async def streams() -> AsyncIterator[Streams]:
    models = ModelStore(serve(tiny_model(config), 250_000) for config in (LABELLED, PLAIN))
    server = ServerMetrics("streams", "0")
    metrics = ScqMetrics(server.registry, 16)
    for model in models.all():
        metrics.model_loaded(model.name, model.card.model_hash, model.card.num_codes)
    pipeline = FramePipeline(models, 2, 250_000)
    core = TokenizerCore(models, pipeline, AdmissionGate(8, 2, server), metrics, 200_000)
    limits = StreamLimits(keyframe_interval=4)
    gate = AdmissionGate(4, 4, server)
    yield Streams(FrameStreams(core, gate, limits, asyncio.Event()), server)
    pipeline.close()


def encode_config(**options: object) -> pb.StreamConfig:
    return pb.StreamConfig(model="labelled", operation=ENCODE, **options)  # type: ignore[arg-type]


def stills(count: int, keyframe_at: int | None = None) -> list[pb.StreamFrame]:
    return [
        pb.StreamFrame(seq=seq, image=STILL, request_keyframe=seq == keyframe_at)
        for seq in range(count)
    ]


def codes_frames(codes: Sequence[bytes]) -> list[pb.StreamFrame]:
    return [pb.StreamFrame(seq=seq, codes=frame) for seq, frame in enumerate(codes)]


def film(frames: int, interval: int = 100) -> list[bytes]:
    """Codes of a scene that changes a little from frame to frame: a key frame, then deltas."""
    encoder = FrameCodec(tiny_model(LABELLED)).frame_encoder(keyframe_interval=interval)
    codes = []
    for step in range(frames):
        pixels = picture(128, 96)
        pixels[:32, 16 * step : 16 * step + 32] = 255 - 40 * step
        codes.append(encoder.encode(pixels).codes)
    return codes


def types(results: Sequence[pb.FrameResult]) -> list[int]:
    return [result.frame_type for result in results]


async def test_a_key_frame_comes_first_and_after_every_interval(streams: Streams) -> None:
    results = await streams.run(encode_config(), stills(6))
    assert types(results) == [KEY, DELTA, DELTA, DELTA, KEY, DELTA]
    assert streams.ready.keyframe_interval == 4
    assert len(results[1].codes) < len(results[0].codes)
    assert all(result.complete and 0 < result.base_bytes <= len(result.codes) for result in results)
    assert [parse_header(result.codes).frame_type for result in results[:2]] == ["key", "delta"]


async def test_the_client_chooses_the_interval(streams: Streams) -> None:
    results = await streams.run(encode_config(keyframe_interval=2), stills(4))
    assert types(results) == [KEY, DELTA, KEY, DELTA]
    assert types(await streams.run(encode_config(keyframe_interval=1), stills(3))) == [KEY] * 3


async def test_a_key_frame_comes_when_it_is_asked_for(streams: Streams) -> None:
    results = await streams.run(encode_config(keyframe_interval=50), stills(4, keyframe_at=2))
    assert types(results) == [KEY, DELTA, KEY, DELTA]
    assert streams.metric("scq_keyframe_requests_total", direction="received") == 1


async def test_a_wish_for_a_key_frame_outlives_a_picture_that_fails(streams: Streams) -> None:
    bad = pb.StreamFrame(seq=2, image=b"not a picture", request_keyframe=True)
    frames = [*stills(2), bad, *stills(2)]
    results = await streams.run(encode_config(keyframe_interval=50), frames)
    assert results[2].error.reason == "INVALID_IMAGE"
    assert types(results) == [KEY, DELTA, 0, KEY, DELTA]


async def test_a_failed_picture_does_not_break_the_chain(streams: Streams) -> None:
    frames = [*stills(1), pb.StreamFrame(seq=1, image=b"x"), *stills(1)]
    first, _, third = await streams.run(encode_config(keyframe_interval=50), frames)
    decoder = FrameCodec(tiny_model(LABELLED)).frame_decoder()
    assert third.frame_type == DELTA
    assert (decoder.decode(first.codes) == decoder.decode(third.codes)).all()


@pytest.mark.parametrize("model", ["labelled", "plain"])
async def test_what_cannot_have_delta_frames_has_key_frames(streams: Streams, model: str) -> None:
    coding = pb.CodingOptions(entropy=pb.ENTROPY_MODE_RAW if model == "labelled" else 0)  # type: ignore[arg-type]
    config = pb.StreamConfig(model=model, operation=ENCODE, coding=coding, keyframe_interval=9)
    assert types(await streams.run(config, stills(3))) == [KEY] * 3
    assert streams.ready.keyframe_interval == 1


async def test_coding_options_reach_the_encoder(streams: Streams) -> None:
    coding = pb.CodingOptions(entropy=pb.ENTROPY_MODE_RANS, tile_side=2)
    results = await streams.run(encode_config(coding=coding), stills(2))
    headers = [parse_header(result.codes) for result in results]
    assert [(header.entropy, header.tile) for header in headers] == [("rans", 2)] * 2


async def test_a_decode_stream_follows_key_and_delta_frames(streams: Streams) -> None:
    codes = film(4)
    config = pb.StreamConfig(operation=DECODE)
    results = await streams.run(config, codes_frames(codes))
    assert types(results) == [KEY, DELTA, DELTA, DELTA]
    decoder = FrameCodec(tiny_model(LABELLED)).frame_decoder()
    for frame, result in zip(codes, results, strict=True):
        assert result.bpp == pytest.approx(8 * len(frame) / (128 * 96))
        assert image_bytes(decoder.decode(frame)) == result.image
        assert result.complete
        assert not result.keyframe_needed


async def test_a_lost_frame_is_told_and_the_next_key_frame_heals(streams: Streams) -> None:
    codes = film(6, interval=4)
    results = await streams.run(
        pb.StreamConfig(operation=DECODE), codes_frames([codes[0], *codes[2:]])
    )
    assert [result.error.reason for result in results] == [
        "",
        "REFERENCE_MISMATCH",
        "REFERENCE_MISMATCH",
        "",
        "",
    ]
    assert [result.keyframe_needed for result in results] == [False, True, True, False, False]
    assert streams.metric("scq_frames_dropped_total", reason="no_keyframe") == 2
    assert streams.metric("scq_keyframe_requests_total", direction="sent") == 2


async def test_a_delta_frame_cannot_come_first(streams: Streams) -> None:
    codes = film(2)
    results = await streams.run(
        pb.StreamConfig(operation=RECOGNIZE), codes_frames([codes[1], codes[0]])
    )
    assert results[0].error.reason == "REFERENCE_MISMATCH"
    assert results[0].error.code == 3
    assert results[0].keyframe_needed
    assert results[1].labels


async def test_codes_of_another_stream_are_a_mismatch(streams: Streams) -> None:
    other = FrameCodec(tiny_model(LABELLED)).frame_encoder()
    foreign = [other.encode(picture(128, 96, seed=9)).codes for _ in range(2)]
    results = await streams.run(
        pb.StreamConfig(operation=DECODE), codes_frames([film(1)[0], foreign[1]])
    )
    assert results[1].error.reason == "REFERENCE_MISMATCH"


async def test_a_stream_keeps_to_the_model_of_its_first_codes(streams: Streams) -> None:
    plain = FrameCodec(tiny_model(PLAIN)).encode(picture()).codes
    codes = film(2)
    results = await streams.run(
        pb.StreamConfig(operation=DECODE), codes_frames([codes[0], plain, codes[1]])
    )
    assert [result.error.reason for result in results] == ["", "MODEL_MISMATCH", ""]
    assert not results[1].keyframe_needed


async def test_a_cut_frame_is_read_in_part_only_when_allowed(streams: Streams) -> None:
    key, delta = film(2)
    frames = codes_frames([key[:-1], delta])
    refused = await streams.run(pb.StreamConfig(operation=DECODE), frames)
    assert refused[0].error.reason == "CORRUPT_CODES"
    assert "allow_partial" in refused[0].error.message
    taken = await streams.run(pb.StreamConfig(operation=DECODE, allow_partial=True), frames)
    assert taken[0].image
    assert (taken[0].complete, taken[0].keyframe_needed) == (False, True)
    assert taken[1].error.reason == "REFERENCE_MISMATCH"
    assert streams.metric("scq_partial_decodes_total", op="decode") == 1


async def test_recognize_streams_tell_the_rate_of_images_and_codes(streams: Streams) -> None:
    codes = film(1)[0]
    frames = [*stills(2), pb.StreamFrame(seq=2, codes=codes), *stills(1)]
    config = pb.StreamConfig(model="labelled", operation=RECOGNIZE, keyframe_interval=50)
    results = await streams.run(config, frames)
    assert types(results) == [KEY, DELTA, KEY, DELTA]
    sizes = [48 * 32, 48 * 32, 128 * 96, 48 * 32]
    sent = [result.codes or codes for result in results]
    expected = [8 * len(one) / size for one, size in zip(sent, sizes, strict=True)]
    assert [result.bpp for result in results] == pytest.approx(expected)
    assert all(result.labels for result in results)


async def test_a_model_without_head_is_refused_before_it_is_pinned(streams: Streams) -> None:
    plain = FrameCodec(tiny_model(PLAIN)).encode(picture()).codes
    results = await streams.run(
        pb.StreamConfig(operation=RECOGNIZE), codes_frames([plain, film(1)[0]])
    )
    assert results[0].error.reason == "NO_RECOGNITION_HEAD"
    assert results[1].labels


async def test_a_stream_is_refused_to_who_holds_another_codebook(streams: Streams) -> None:
    with pytest.raises(FailedPrecondition) as caught:
        await streams.run(encode_config(model_hash="0" * 8), stills(1))
    assert caught.value.reason == "MODEL_HASH_MISMATCH"
    assert caught.value.metadata["model_hash"].startswith(VERSION)
    assert VERSION in caught.value.message


async def test_the_hash_alone_names_the_model(streams: Streams) -> None:
    config = pb.StreamConfig(model_hash=VERSION.upper(), operation=ENCODE)
    assert types(await streams.run(config, stills(1))) == [KEY]
    assert streams.ready.model.name == "labelled"


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"model_hash": "xyz"}, "model_hash"),
        ({"model_hash": VERSION[:7]}, "model_hash"),
        ({"keyframe_interval": 100_001}, "keyframe_interval"),
        ({"coding": pb.CodingOptions(tile_side=999)}, "coding.tile_side"),
        ({"coding": pb.CodingOptions(rate_weight=float("nan"))}, "coding.rate_weight"),
        ({"coding": pb.CodingOptions(rate_weight=-1)}, "coding.rate_weight"),
    ],
)
async def test_impossible_options_end_the_stream(
    streams: Streams, options: dict[str, object], field: str
) -> None:
    with pytest.raises(ServiceError) as caught:
        await streams.run(encode_config(**options), stills(1))
    assert (caught.value.reason, caught.value.field) == ("INVALID_ARGUMENT", field)


async def test_metrics_tell_frames_by_type_and_the_share_of_unchanged_latents(
    streams: Streams,
) -> None:
    results = await streams.run(encode_config(), stills(3))
    for name in ("scq_frame_bpp_count", "scq_coded_frame_size_bytes_count"):
        assert streams.metric(name, frame_type="key") == 1
        assert streams.metric(name, frame_type="delta") == 2
    sent = streams.metric("scq_coded_bytes_total", direction="out", frame_type="delta")
    assert sent == sum(len(result.codes) for result in results[1:])
    assert streams.metric("scq_delta_latents_total", mode="skip") == 12
    assert streams.metric("scq_delta_latents_total", mode="new") == 0


async def test_the_age_of_frames_counts_from_the_quickest(streams: Streams) -> None:
    frames = [pb.StreamFrame(seq=seq, capture_ns=10**18, image=STILL) for seq in range(3)]
    await streams.run(encode_config(), frames)
    assert streams.metric("scq_frame_age_seconds_count") == 3
    assert streams.metric("scq_frame_age_seconds_bucket", le="0.001") >= 1


async def test_a_request_for_a_key_frame_crosses_the_wires(service: ServiceProcess) -> None:
    config = pb.StreamFramesRequest(config=encode_config(keyframe_interval=50))
    requests = [config, *(pb.StreamFramesRequest(frame=frame) for frame in stills(4, 2))]
    by_grpc = await over_grpc(service.grpc_address, requests)
    url = f"ws://127.0.0.1:{service.ports.http}/v1/stream"
    by_socket = await over_websocket(url, requests)
    for _, *answers in (by_grpc, by_socket):
        assert types([answer.result for answer in answers]) == [KEY, DELTA, KEY, DELTA]


async def test_another_codebook_is_refused_on_both_wires(service: ServiceProcess) -> None:
    requests = [pb.StreamFramesRequest(config=encode_config(model_hash="00000000"))]
    with pytest.raises(StreamEnded, match="MODEL_HASH_MISMATCH"):
        await over_grpc(service.grpc_address, requests)
    with pytest.raises(StreamEnded, match="MODEL_HASH_MISMATCH"):
        await over_websocket(f"ws://127.0.0.1:{service.ports.http}/v1/stream", requests)
