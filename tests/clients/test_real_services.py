"""The client against both services as real processes: tiny models, the whole wire between."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, aclosing
from pathlib import Path

import pytest

from support.llmd import LlmServer
from support.process import ServiceProcess, service_process
from support.tokenizerd import image_bytes, image_file, picture, png_claiming, write_models
from vqclient import (
    ClientOptions,
    FailedPreconditionError,
    FinishReason,
    Frame,
    FrameType,
    GenerationClient,
    InvalidArgumentError,
    NotFoundError,
    Operation,
    ResourceExhaustedError,
    Sampling,
    StreamOptions,
    TokenizerClient,
    UnavailableError,
    VqError,
    collect,
)
from vqclient.scq1 import is_codes, parse_header

MODEL = "labelled"
START_SECONDS = 240.0  # torch is slow to import while other work has the machine


def tokenizer_process(folder: Path) -> AbstractContextManager[ServiceProcess]:
    """tokenizerd with the tiny models."""
    arguments = ["--models", write_models(folder)]
    return service_process("vqserve.tokenizer", arguments, folder, timeout_seconds=START_SECONDS)


@pytest.fixture(scope="module")
def tokenizerd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    folder = tmp_path_factory.mktemp("tokenizerd")
    with tokenizer_process(folder) as process:
        yield process


@pytest.fixture
async def tokenizer(tokenizerd: ServiceProcess) -> AsyncIterator[TokenizerClient]:
    async with TokenizerClient(tokenizerd.grpc_address) as client:
        yield client


async def test_a_picture_goes_there_and_back(tokenizer: TokenizerClient) -> None:
    encoded = await tokenizer.encode(image_file(width=50, height=33), model=MODEL)
    decoded = await tokenizer.decode(encoded.codes)
    assert is_codes(encoded.codes)
    assert (encoded.width, encoded.height) == (decoded.width, decoded.height) == (50, 33)
    assert encoded.bpp == pytest.approx(8 * len(encoded.codes) / (50 * 33))
    assert decoded.image.startswith(b"\x89PNG")
    assert {"encoder", "quantize", "entropy"} <= encoded.timings.keys()


async def test_labels_of_a_picture_and_of_its_codes_agree(tokenizer: TokenizerClient) -> None:
    image = image_file()
    codes = (await tokenizer.encode(image, model=MODEL)).codes
    from_image = await tokenizer.recognize(image=image, model=MODEL, top_k=3)
    from_codes = await tokenizer.recognize(codes=codes, top_k=3)
    assert from_image.labels == from_codes.labels
    assert {label.name for label in from_codes.labels} == {"car", "tree", "sign"}
    assert sum(label.score for label in from_codes.labels) == pytest.approx(1, abs=1e-3)


async def test_models_carry_their_codebook(tokenizer: TokenizerClient) -> None:
    listed = {model.name: model for model in await tokenizer.models()}
    codebook = await tokenizer.model(listed[MODEL].model_hash[:8])
    assert codebook.model == listed[MODEL]
    assert len(codebook.data) == 4 * listed[MODEL].num_codes * listed[MODEL].code_dim


def broken_codes(codes: bytes) -> bytes:
    return codes[:-1] + bytes([codes[-1] ^ 1])


async def decode_broken(client: TokenizerClient) -> object:
    return await client.decode(broken_codes((await client.encode(image_file(), model=MODEL)).codes))


@pytest.mark.parametrize(
    ("call", "kind", "field"),
    [
        (lambda client: client.encode(b"", model=MODEL), InvalidArgumentError, "image"),
        (lambda client: client.encode(b"no", model=MODEL), InvalidArgumentError, "image"),
        (
            lambda client: client.encode(png_claiming(10_000, 10_000), model=MODEL),
            InvalidArgumentError,
            "image",
        ),
        (lambda client: client.encode(image_file(), model="nope"), NotFoundError, "model"),
        (lambda client: client.encode(image_file(), model="nan"), VqError, None),
        (decode_broken, InvalidArgumentError, "codes"),
        (
            lambda client: client.recognize(image=image_file(), model="plain"),
            FailedPreconditionError,
            "model",
        ),
        (
            lambda client: client.recognize(image=image_file(), model=MODEL, top_k=101),
            InvalidArgumentError,
            "top_k",
        ),
        (lambda client: client.encode(bytes(20 << 20), model=MODEL), ResourceExhaustedError, ""),
    ],
    ids=["empty", "no-image", "huge", "model", "nan", "codes", "headless", "top-k", "payload"],
)
async def test_refusals_are_typed_and_the_service_goes_on(
    tokenizer: TokenizerClient,
    call: Callable[[TokenizerClient], Awaitable[object]],
    kind: type[VqError],
    field: str | None,
) -> None:
    with pytest.raises(kind) as caught:
        await call(tokenizer)
    assert field is None or caught.value.field == field
    assert caught.value.message
    assert await tokenizer.encode(image_file(), model=MODEL)


async def test_a_stream_answers_in_order_and_survives_a_bad_frame(
    tokenizer: TokenizerClient,
) -> None:
    frames = [Frame(seq, image_file(), capture_ns=seq + 5) for seq in range(12)]
    frames[4] = Frame(4, b"no image")
    results = [result async for result in tokenizer.stream_frames(frames, model=MODEL)]
    assert [result.seq for result in results] == list(range(12))
    assert [result.seq for result in results if result.error is not None] == [4]
    assert results[7].capture_ns == 12
    assert results[0].codes == (await tokenizer.encode(image_file(), model=MODEL)).codes
    assert results[7].frame_type is FrameType.DELTA
    assert 0 < results[7].bpp < results[0].bpp


async def test_a_decode_stream_takes_what_an_encode_stream_gave(
    tokenizer: TokenizerClient,
) -> None:
    encoding = tokenizer.stream_frames([Frame(0, image_file())], model=MODEL)
    codes = [result.codes async for result in encoding]
    decoding = tokenizer.stream_frames([Frame(0, codes=codes[0])], operation=Operation.DECODE)
    pictures = [result.image async for result in decoding]
    assert pictures == [(await tokenizer.decode(codes[0])).image]


def scene(number: int) -> bytes:
    """A picture of which a corner changes from number to number."""
    pixels = picture(128, 96)
    pixels[:32, 16 * number : 16 * number + 32] = 255 - 40 * number
    return image_bytes(pixels)


async def test_a_viewer_that_lost_a_frame_is_healed_by_a_key_frame(
    tokenizer: TokenizerClient,
) -> None:
    reasons = []
    options = StreamOptions(keyframe_interval=1000)
    async with tokenizer.open_stream(model=MODEL, options=options) as camera:
        viewer = tokenizer.open_stream(
            operation=Operation.DECODE, on_keyframe_needed=camera.request_keyframe
        )
        async with viewer:
            for number in range(6):
                await camera.send(image=scene(number))
                coded = await anext(camera)
                if number == 2:
                    continue  # Lost on the way to the viewer.
                await viewer.send(codes=coded.codes)
                result = await anext(viewer)
                reasons.append(result.error.reason if result.error else "")
    assert reasons == ["", "", "REFERENCE_MISMATCH", "", ""]


async def test_a_device_gets_its_files_and_pins_its_codebook(tokenizer: TokenizerClient) -> None:
    described = await tokenizer.model(MODEL)
    files = [await tokenizer.artifact(MODEL, file.name) for file in described.artifacts]
    assert [file.name for file in files] == ["codebook.bin", "tables.safetensors"]
    assert len(files[0].data) == 2 * described.model.num_codes * described.model.code_dim
    header = parse_header((await tokenizer.encode(image_file(), model=MODEL)).codes)
    assert described.model.model_hash.startswith(header.model_hash)
    held = StreamOptions(model_hash="0" * 64)
    with pytest.raises(FailedPreconditionError, match="MODEL_HASH_MISMATCH") as caught:
        await anext(tokenizer.stream_frames([Frame(0, b"x")], model=MODEL, options=held))
    assert described.model.model_hash[:16] in caught.value.message


async def test_every_frame_of_a_hurried_stream_is_answered_or_counted_as_dropped(
    tokenizer: TokenizerClient,
) -> None:
    frames = [Frame(seq, image_file(width=256, height=256)) for seq in range(40)]
    options = StreamOptions(max_age_ms=1, max_in_flight=None)
    stream = tokenizer.stream_frames(frames, model=MODEL, options=options)
    results = [result async for result in stream]
    num_dropped = sum(result.dropped_before for result in results)
    seqs = [result.seq for result in results]
    assert seqs == sorted(set(seqs))
    assert len(results) + num_dropped <= 40


async def test_an_unknown_model_does_not_open_a_stream(tokenizer: TokenizerClient) -> None:
    stream = tokenizer.stream_frames([Frame(0, image_file())], model="nope")
    with pytest.raises(NotFoundError):
        await anext(stream)


async def test_a_draining_service_ends_streams_and_refuses_calls_with_a_typed_error(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("draining")
    with tokenizer_process(folder) as process:
        async with TokenizerClient(process.grpc_address, ClientOptions(timeout=5)) as client:

            async def camera() -> AsyncIterator[Frame]:
                seq = 0
                while True:
                    yield Frame(seq, image_file())
                    seq += 1
                    await asyncio.sleep(0.01)

            async with aclosing(client.stream_frames(camera(), model=MODEL)) as results:
                await anext(results)
                process.process.terminate()
                with pytest.raises(UnavailableError):
                    await asyncio.wait_for(_drain(results), 30)
            with pytest.raises(UnavailableError):
                await client.models()
        assert await asyncio.to_thread(process.process.wait, 30) == 0


async def _drain(results: AsyncIterator[object]) -> None:
    async for _ in results:
        pass


@pytest.fixture(scope="module")
def llmd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlmServer]:
    folder = tmp_path_factory.mktemp("llmd")
    model = folder / "slow"
    model.mkdir()
    module, arguments = "support.llmd", ["--model", str(model)]
    with service_process(module, arguments, folder, timeout_seconds=START_SECONDS) as service:
        yield LlmServer(service.process, service.ports, service.log)


@pytest.fixture
async def generation(llmd: LlmServer) -> AsyncIterator[GenerationClient]:
    async with GenerationClient(llmd.grpc_address) as client:
        yield client


async def test_an_answer_streams_and_ends_with_its_usage(generation: GenerationClient) -> None:
    pieces = [piece async for piece in generation.chat("hi", sampling=Sampling(max_tokens=25))]
    assert len(pieces) > 5
    assert "".join(piece.text for piece in pieces).startswith("A road, größer")
    assert pieces[-1].finish_reason is FinishReason.LENGTH
    assert pieces[-1].usage is not None
    assert pieces[-1].usage.completion_tokens == 25


async def test_text_becomes_tokens_and_text_again(generation: GenerationClient) -> None:
    token_ids = await generation.tokenize("größer")
    assert await generation.detokenize(token_ids) == "größer"
    answer = await collect(generation.generate(token_ids, sampling=Sampling(max_tokens=3)))
    assert answer.usage.prompt_tokens == len(token_ids)


@pytest.mark.parametrize(
    ("prompt", "sampling", "model", "kind", "named"),
    [
        ("", Sampling(), "", InvalidArgumentError, "no tokens"),
        ("x" * 1000, Sampling(), "", InvalidArgumentError, "1000 tokens"),
        ("x", Sampling(max_tokens=0), "", InvalidArgumentError, "max_tokens"),
        ("x", Sampling(temperature=9.0), "", InvalidArgumentError, "temperature"),
        ("x", Sampling(), "nope", NotFoundError, "nope"),
    ],
    ids=["empty", "too-long", "no-tokens", "too-hot", "model"],
)
async def test_bad_generation_requests_are_typed(
    generation: GenerationClient,
    prompt: str,
    sampling: Sampling,
    model: str,
    kind: type[VqError],
    named: str,
) -> None:
    with pytest.raises(kind, match=named):
        await collect(generation.generate(prompt, model=model, sampling=sampling))
    assert await generation.models()


async def test_leaving_an_answer_early_frees_its_sequence(
    generation: GenerationClient, llmd: LlmServer
) -> None:
    sampling = Sampling(max_tokens=200, ignore_eos=True)
    async with aclosing(generation.generate("go on", sampling=sampling)) as pieces:
        await anext(pieces)
        assert await asyncio.to_thread(llmd.metric, "llm_requests_running") == 1
    async with asyncio.timeout(60):
        while await asyncio.to_thread(llmd.metric, "llm_requests_running"):
            await asyncio.sleep(0.02)
