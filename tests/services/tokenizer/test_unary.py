"""Encode, decode, recognize and the model list over both protocols, on a real process."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator
from pathlib import Path

import grpc.aio
import httpx
import numpy as np
import pytest
from google.protobuf.json_format import ParseDict
from PIL import Image

from scq.bitstream import parse_header
from scq.codec import FrameCodec
from scq.model import ScqAutoencoder, load_model, save_model
from support.process import ServiceProcess
from support.tokenizerd import LABELLED, image_file, picture, tiny_model
from vqstack.tokenizer.v1 import tokenizer_pb2 as pb
from vqstack.tokenizer.v1 import tokenizer_pb2_grpc


@pytest.fixture
async def stub(
    service: ServiceProcess,
) -> AsyncIterator[tokenizer_pb2_grpc.TokenizerServiceAsyncStub]:
    async with grpc.aio.insecure_channel(service.grpc_address) as channel:
        yield tokenizer_pb2_grpc.TokenizerServiceStub(channel)


def test_rest_encode_returns_the_codes_that_the_engine_makes(
    service: ServiceProcess, tmp_path: Path
) -> None:
    source = image_file()
    response = httpx.post(f"{service.http_url}/v1/encode?model=labelled", content=source)
    codec = FrameCodec(tiny_model_as_stored(tmp_path))
    assert response.content == codec.encode(picture()).codes
    assert response.headers["x-vqstack-model"] == "labelled"
    assert response.headers["x-vqstack-width"] == "48"
    assert response.headers["x-vqstack-height"] == "32"
    bpp = 8 * len(response.content) / (48 * 32)
    assert float(response.headers["x-vqstack-bpp"]) == pytest.approx(bpp, abs=1e-6)
    assert "encoder;dur=" in response.headers["server-timing"]


def tiny_model_as_stored(folder: Path) -> ScqAutoencoder:
    """The served model: its weights went through float16, its codebook through int16."""
    path = folder / "stored.safetensors"
    save_model(tiny_model(LABELLED), path)
    return load_model(path)


async def test_both_protocols_encode_alike(
    service: ServiceProcess, stub: tokenizer_pb2_grpc.TokenizerServiceAsyncStub
) -> None:
    source = image_file("JPEG", 50, 37)
    by_grpc = await stub.Encode(pb.EncodeRequest(model="labelled", image=source))
    response = httpx.post(
        f"{service.http_url}/v1/encode?model=labelled",
        content=source,
        headers={"accept": "application/json"},
    )
    by_http = ParseDict(response.json(), pb.EncodeResponse())
    for reply in (by_grpc, by_http):
        del reply.timings[:]
    assert by_grpc == by_http
    assert (by_grpc.width, by_grpc.height, by_grpc.source_bytes) == (50, 37, len(source))


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("png", pb.IMAGE_FORMAT_PNG),
        ("jpeg", pb.IMAGE_FORMAT_JPEG),
        ("webp", pb.IMAGE_FORMAT_WEBP),
    ],
)
async def test_decode_gives_the_original_size_in_the_format_asked_for(
    service: ServiceProcess,
    stub: tokenizer_pb2_grpc.TokenizerServiceAsyncStub,
    name: str,
    number: pb.ImageFormat.ValueType,
) -> None:
    encoded = await stub.Encode(pb.EncodeRequest(model="labelled", image=image_file("PNG", 33, 21)))
    decoded = await stub.Decode(pb.DecodeRequest(codes=encoded.codes, format=number))
    response = httpx.post(f"{service.http_url}/v1/decode?format={name}", content=encoded.codes)
    image = Image.open(io.BytesIO(decoded.image))
    assert (image.format, image.size) == (name.upper(), (33, 21))
    assert (decoded.model, decoded.width, decoded.height) == ("labelled", 33, 21)
    assert response.content == decoded.image
    assert response.headers["content-type"] == f"image/{name}"


async def test_png_and_webp_carry_the_decoded_pixels_exactly(
    stub: tokenizer_pb2_grpc.TokenizerServiceAsyncStub,
) -> None:
    encoded = await stub.Encode(pb.EncodeRequest(model="labelled", image=image_file()))
    pictures = []
    for number in (pb.IMAGE_FORMAT_UNSPECIFIED, pb.IMAGE_FORMAT_WEBP):
        reply = await stub.Decode(pb.DecodeRequest(codes=encoded.codes, format=number))
        pictures.append(np.asarray(Image.open(io.BytesIO(reply.image)).convert("RGB")))
    np.testing.assert_array_equal(pictures[0], pictures[1])


async def test_recognizing_an_image_is_recognizing_its_codes(
    service: ServiceProcess, stub: tokenizer_pb2_grpc.TokenizerServiceAsyncStub
) -> None:
    source = image_file()
    encoded = await stub.Encode(pb.EncodeRequest(model="labelled", image=source))
    by_image = await stub.Recognize(pb.RecognizeRequest(model="labelled", image=source))
    by_codes = await stub.Recognize(pb.RecognizeRequest(codes=encoded.codes))
    assert by_image.labels == by_codes.labels
    assert by_codes.coded_bytes == len(encoded.codes)
    scores = [label.score for label in by_codes.labels]
    assert scores == sorted(scores, reverse=True)
    assert sum(scores) == pytest.approx(1, abs=1e-5)

    response = httpx.post(
        f"{service.http_url}/v1/recognize?model=labelled&top_k=2",
        content=source,
        headers={"content-type": "image/png"},
    )
    by_http = ParseDict(response.json(), pb.RecognizeResponse())
    assert by_http.labels == by_image.labels[:2]


async def test_models_are_listed_and_described_alike(
    service: ServiceProcess,
    stub: tokenizer_pb2_grpc.TokenizerServiceAsyncStub,
    tmp_path: Path,
) -> None:
    by_grpc = await stub.ListModels(pb.ListModelsRequest())
    by_http = ParseDict(httpx.get(f"{service.http_url}/v1/models").json(), pb.ListModelsResponse())
    assert by_grpc == by_http
    assert [model.name for model in by_grpc.models] == ["labelled", "plain"]

    described = await stub.GetModel(pb.GetModelRequest(model="labelled"))
    by_hash = await stub.GetModel(pb.GetModelRequest(model=described.model.model_hash[:8]))
    rest = httpx.get(f"{service.http_url}/v1/models/labelled").json()
    assert described == by_hash == ParseDict(rest, pb.GetModelResponse())
    codebook = np.frombuffer(described.codebook, "<f4").reshape(32, 16)
    stored = tiny_model_as_stored(tmp_path)
    np.testing.assert_array_equal(codebook, stored.quantizer.codebook.detach().numpy())
    assert described.model.codebook_exponent == stored.codebook_int16()[1]
    assert described.model.has_entropy_tables
    assert list(described.model.classes) == list(LABELLED.classes)


async def test_a_request_id_is_echoed_or_made(service: ServiceProcess) -> None:
    url = f"{service.http_url}/v1/models"
    assert httpx.get(url, headers={"x-request-id": "abc"}).headers["x-request-id"] == "abc"
    assert len(httpx.get(url, headers={"x-request-id": "a" * 500}).headers["x-request-id"]) == 32
    async with grpc.aio.insecure_channel(service.grpc_address) as channel:
        call = tokenizer_pb2_grpc.TokenizerServiceStub(channel).ListModels(
            pb.ListModelsRequest(), metadata=(("x-request-id", "from-grpc"),)
        )
        await call
        trailing = dict(await call.trailing_metadata() or ())
    assert trailing["x-request-id"] == "from-grpc"
    for request_id in ("abc", "from-grpc"):
        assert service.wait_for_event(request_id=request_id)["code"] in ("200", "OK")


def test_logs_are_json_and_hold_sizes_but_no_payload(service: ServiceProcess) -> None:
    httpx.post(
        f"{service.http_url}/v1/encode?model=labelled",
        content=image_file(),
        headers={"x-request-id": "sizes"},
    )
    line = service.wait_for_event(request_id="sizes")
    assert line["event"] == "request"
    assert line["code"] == "200"
    assert line["bytes_in"] == len(image_file())
    assert line["model"] == "labelled"
    assert all(len(str(value)) < 200 for value in line.values())


def test_the_api_describes_itself(service: ServiceProcess) -> None:
    document = httpx.get(f"{service.http_url}/openapi.json").json()
    assert {"/v1/encode", "/v1/decode", "/v1/recognize", "/v1/models"} <= set(document["paths"])
    content = document["paths"]["/v1/encode"]["post"]["requestBody"]["content"]
    assert set(content) == {"image/png", "image/jpeg", "image/webp"}
    assert httpx.get(f"{service.http_url}/docs").status_code == 200


async def test_a_cut_frame_shows_its_base_layer_on_both_protocols(
    service: ServiceProcess, stub: tokenizer_pb2_grpc.TokenizerServiceAsyncStub
) -> None:
    coding = pb.CodingOptions(entropy=pb.ENTROPY_MODE_RAW)
    request = pb.EncodeRequest(model="labelled", image=image_file(), coding=coding)
    encoded = await stub.Encode(request)
    cut = encoded.codes[: encoded.base_bytes]
    assert 0 < len(cut) < len(encoded.codes)
    by_grpc = await stub.Decode(pb.DecodeRequest(codes=cut, allow_partial=True))
    by_http = httpx.post(f"{service.http_url}/v1/decode?allow_partial=true", content=cut)
    whole = await stub.Decode(pb.DecodeRequest(codes=encoded.codes, allow_partial=True))
    assert (by_grpc.complete, whole.complete) == (False, True)
    assert by_http.headers["x-vqstack-complete"] == "false"
    assert by_http.content == by_grpc.image
    labels = await stub.Recognize(pb.RecognizeRequest(codes=cut, allow_partial=True))
    assert not labels.complete
    assert labels.labels


async def test_coding_options_mean_the_same_on_both_protocols(
    service: ServiceProcess, stub: tokenizer_pb2_grpc.TokenizerServiceAsyncStub
) -> None:
    source = image_file("PNG", 128, 96)
    coding = pb.CodingOptions(entropy=pb.ENTROPY_MODE_RANS, tile_side=4, rate_weight=0.5)
    by_grpc = await stub.Encode(pb.EncodeRequest(model="labelled", image=source, coding=coding))
    query = "model=labelled&entropy=rans&tile_side=4&rate_weight=0.5"
    by_http = httpx.post(f"{service.http_url}/v1/encode?{query}", content=source)
    header = parse_header(by_grpc.codes)
    assert by_http.content == by_grpc.codes
    assert by_http.headers["x-vqstack-base-bytes"] == str(by_grpc.base_bytes)
    assert (header.entropy, header.tile) == ("rans", 4)
    coding.rate_weight = 0
    nearest = await stub.Encode(pb.EncodeRequest(model="labelled", image=source, coding=coding))
    assert len(by_grpc.codes) < len(nearest.codes)
