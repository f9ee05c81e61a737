"""Every bad input gets the same specific answer over gRPC and HTTP, and serving goes on."""

from __future__ import annotations

import asyncio
import io
import math
from collections.abc import Callable
from dataclasses import dataclass

import grpc.aio
import httpx
import pytest
from PIL import Image

from scq.bitstream import pack_delta, parse_header
from scq.codec import FrameCodec
from support.lattices import random_assignment, random_tables
from support.process import Failure, ServiceProcess, grpc_failure, http_failure
from support.tokenizerd import (
    LABELLED,
    NAN,
    PLAIN,
    image_file,
    picture,
    png_claiming,
    resealed,
    tiny_model,
)
from vqserve.common.errors import HTTP_STATUS
from vqserve.common.lifecycle import running
from vqserve.tokenizer.app import build_app
from vqserve.tokenizer.codecs import ServedModel
from vqserve.tokenizer.config import TokenizerSettings
from vqserve.tokenizer.loading import serve
from vqstack.tokenizer.v1 import tokenizer_pb2 as pb
from vqstack.tokenizer.v1 import tokenizer_pb2_grpc

OCTETS = {"content-type": "application/octet-stream"}
TOO_MANY_BYTES = 200_001

Request = (
    pb.EncodeRequest
    | pb.DecodeRequest
    | pb.RecognizeRequest
    | pb.GetModelRequest
    | pb.GetModelArtifactRequest
)


@dataclass(frozen=True)
class Case:
    """One bad input on both wires, and the answer it must get."""

    name: str
    request: Request
    path: str
    body: bytes
    code: str
    reason: str
    http_status: int | None = None
    headers: tuple[tuple[str, str], ...] = ()


def codes_of(config_name: str = "labelled") -> bytes:
    config = LABELLED if config_name == "labelled" else PLAIN
    return FrameCodec(tiny_model(config)).encode(picture()).codes


def flipped(codes: bytes, position: int) -> bytes:
    return codes[:position] + bytes([codes[position] ^ 0xFF]) + codes[position + 1 :]


def with_bytes(codes: bytes, position: int, replacement: bytes) -> bytes:
    return codes[:position] + replacement + codes[position + len(replacement) :]


def gif() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture()).save(buffer, "GIF")
    return buffer.getvalue()


def encode_case(
    name: str, image: bytes, reason: str, model: str = "labelled", code: str = "INVALID_ARGUMENT"
) -> Case:
    request = pb.EncodeRequest(model=model, image=image)
    return Case(name, request, f"/v1/encode?model={model}", image, code, reason)


def decode_case(name: str, codes: bytes, reason: str, code: str = "INVALID_ARGUMENT") -> Case:
    return Case(name, pb.DecodeRequest(codes=codes), "/v1/decode", codes, code, reason)


def coding_case(
    name: str, coding: pb.CodingOptions, query: str, model: str = "labelled", reason: str = ""
) -> Case:
    image = image_file()
    request = pb.EncodeRequest(model=model, image=image, coding=coding)
    path = f"/v1/encode?model={model}&{query}"
    code = "FAILED_PRECONDITION" if reason else "INVALID_ARGUMENT"
    return Case(name, request, path, image, code, reason or code)


def coding_cases() -> list[Case]:
    options = pb.CodingOptions
    return [
        coding_case("unknown entropy mode", options(entropy=9), "entropy=zip"),  # type: ignore[arg-type]
        coding_case("tile of 256 latents", options(tile_side=256), "tile_side=256"),
        coding_case("rate weight NaN", options(rate_weight=math.nan), "rate_weight=nan"),
        coding_case("infinite rate weight", options(rate_weight=math.inf), "rate_weight=inf"),
        coding_case("negative rate weight", options(rate_weight=-0.1), "rate_weight=-0.1"),
        coding_case(
            "rANS without tables",
            options(entropy=pb.ENTROPY_MODE_RANS),
            "entropy=rans",
            "plain",
            "NO_ENTROPY_TABLES",
        ),
    ]


def encode_cases() -> list[Case]:
    jpeg = image_file("JPEG")
    return [
        encode_case("random bytes as image", b"\x13\x37" * 400, "INVALID_IMAGE"),
        encode_case("truncated JPEG", jpeg[: len(jpeg) // 2], "INVALID_IMAGE"),
        encode_case("truncated PNG", image_file("PNG")[:200], "INVALID_IMAGE"),
        encode_case("truncated WebP", image_file("WEBP")[:60], "INVALID_IMAGE"),
        encode_case("GIF, which is not accepted", gif(), "INVALID_IMAGE"),
        encode_case("100-megapixel PNG header", png_claiming(10_000, 10_000), "IMAGE_TOO_LARGE"),
        encode_case("4-gigapixel PNG header", png_claiming(65_535, 65_535), "IMAGE_TOO_LARGE"),
        encode_case("zero-size PNG", png_claiming(0, 16), "INVALID_IMAGE"),
        encode_case("empty image", b"", "EMPTY_PAYLOAD"),
        encode_case("unknown model", image_file(), "UNKNOWN_MODEL", "nope", "NOT_FOUND"),
        encode_case("no model named", image_file(), "INVALID_ARGUMENT", ""),
    ]


def delta_codes() -> bytes:
    """A delta frame of the labelled model; what it changes does not matter."""
    code = LABELLED.lattice
    still = random_assignment(code, 6)
    model_hash = FrameCodec(tiny_model(LABELLED)).frame_hash
    return pack_delta(model_hash, still, code, (2, 3), reference=still, tables=random_tables(code))


def decode_cases() -> list[Case]:
    codes = codes_of("plain")
    header = parse_header(codes)
    start = header.num_bytes
    out_of_range = resealed(codes[:start] + b"\xff" * (len(codes) - start))
    # Width and height of 48x32 are one byte each.
    wide = codes[:10] + b"\xff\xff\x03" * 2 + codes[12:]
    return [
        decode_case("no codes", b"", "EMPTY_PAYLOAD"),
        decode_case("three bytes as codes", b"S\x20\x01", "CORRUPT_CODES"),
        decode_case("wrong magic", resealed(b"X" + codes[1:]), "CORRUPT_CODES"),
        decode_case("version 1", b"SQ\x01" + codes[3:], "CORRUPT_CODES"),
        decode_case("version 3", resealed(with_bytes(codes, 1, b"\x30")), "CORRUPT_CODES"),
        decode_case("wrong full check", flipped(codes, 8), "CORRUPT_CODES"),
        decode_case("flipped payload bit", flipped(codes, len(codes) - 1), "CORRUPT_CODES"),
        decode_case("truncated codes", codes[:-1], "CORRUPT_CODES"),
        decode_case("truncated codes, resealed", resealed(codes[:-1]), "CORRUPT_CODES"),
        decode_case("index out of range", out_of_range, "CORRUPT_CODES"),
        decode_case(
            "size that its payload cannot fill",
            resealed(with_bytes(codes, 10, b"\x7f")),
            "CORRUPT_CODES",
        ),
        decode_case("header that asks for 4 gigapixels", resealed(wide), "IMAGE_TOO_LARGE"),
        decode_case(
            "codes of a model that is not loaded",
            resealed(with_bytes(codes, 2, b"\x00\x01\x02\x03")),
            "UNKNOWN_MODEL",
            "NOT_FOUND",
        ),
        decode_case("delta frame by itself", delta_codes(), "REFERENCE_MISMATCH"),
        Case(
            "frame cut inside its base layer",
            pb.DecodeRequest(codes=codes[: start + 1], allow_partial=True),
            "/v1/decode?allow_partial=true",
            codes[: start + 1],
            "INVALID_ARGUMENT",
            "CORRUPT_CODES",
        ),
        Case(
            "unknown picture format",
            pb.DecodeRequest(codes=codes, format=99),  # type: ignore[arg-type]
            "/v1/decode?format=tiff",
            codes,
            "INVALID_ARGUMENT",
            "INVALID_ARGUMENT",
        ),
    ]


def recognize_cases() -> list[Case]:
    codes, plain = codes_of(), codes_of("plain")
    headers = tuple(OCTETS.items())
    return [
        Case(
            "recognize without a head",
            pb.RecognizeRequest(codes=plain),
            "/v1/recognize",
            plain,
            "FAILED_PRECONDITION",
            "NO_RECOGNITION_HEAD",
            headers=headers,
        ),
        Case(
            "recognize an image without a head",
            pb.RecognizeRequest(image=image_file(), model="plain"),
            "/v1/recognize?model=plain",
            image_file(),
            "FAILED_PRECONDITION",
            "NO_RECOGNITION_HEAD",
            headers=(("content-type", "image/png"),),
        ),
        Case(
            "recognize codes of another model",
            pb.RecognizeRequest(codes=codes, model="plain"),
            "/v1/recognize?model=plain",
            codes,
            "INVALID_ARGUMENT",
            "MODEL_MISMATCH",
            headers=headers,
        ),
        Case(
            "recognize nothing",
            pb.RecognizeRequest(),
            "/v1/recognize",
            b"",
            "INVALID_ARGUMENT",
            "EMPTY_PAYLOAD",
            headers=headers,
        ),
        Case(
            "too many labels wanted",
            pb.RecognizeRequest(codes=codes, top_k=101),
            "/v1/recognize?top_k=101",
            codes,
            "INVALID_ARGUMENT",
            "INVALID_ARGUMENT",
            headers=headers,
        ),
    ]


def other_cases() -> list[Case]:
    too_much = bytes(TOO_MANY_BYTES)
    return [
        Case(
            "one byte above the request limit",
            pb.DecodeRequest(codes=too_much),
            "/v1/decode",
            too_much,
            "RESOURCE_EXHAUSTED",
            "PAYLOAD_TOO_LARGE",
            http_status=413,
        ),
        Case(
            "unknown model described",
            pb.GetModelRequest(model="deadbeefdead"),
            "/v1/models/deadbeefdead",
            b"",
            "NOT_FOUND",
            "UNKNOWN_MODEL",
        ),
        Case(
            "unknown artifact wanted",
            pb.GetModelRequest(model="labelled", artifacts=["weights.pkl"]),
            "/v1/models/labelled?artifacts=weights.pkl",
            b"",
            "NOT_FOUND",
            "UNKNOWN_ARTIFACT",
        ),
        Case(
            "unknown artifact fetched",
            pb.GetModelArtifactRequest(model="labelled", name="..%2f..%2fetc"),
            "/v1/models/labelled/artifacts/weights.pkl",
            b"",
            "NOT_FOUND",
            "UNKNOWN_ARTIFACT",
        ),
        Case(
            "artifact of an unknown model",
            pb.GetModelArtifactRequest(model="nope", name="codebook.bin"),
            "/v1/models/nope/artifacts/codebook.bin",
            b"",
            "NOT_FOUND",
            "UNKNOWN_MODEL",
        ),
    ]


CASES = [*encode_cases(), *coding_cases(), *decode_cases(), *recognize_cases(), *other_cases()]


async def over_grpc(address: str, request: Request) -> Failure:
    async with grpc.aio.insecure_channel(address) as channel:
        stub = tokenizer_pb2_grpc.TokenizerServiceStub(channel)
        calls: dict[type, Callable[..., object]] = {
            pb.EncodeRequest: stub.Encode,
            pb.DecodeRequest: stub.Decode,
            pb.RecognizeRequest: stub.Recognize,
            pb.GetModelRequest: stub.GetModel,
            pb.GetModelArtifactRequest: lambda asked, timeout: stub.GetModelArtifact(
                asked, timeout=timeout
            ).read(),
        }
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await calls[type(request)](request, timeout=20)  # type: ignore[misc]
        return grpc_failure(caught.value)


def over_http(url: str, case: Case) -> tuple[int, Failure]:
    method = "GET" if case.path.startswith("/v1/models") else "POST"
    headers = dict(case.headers)
    response = httpx.request(
        method, url + case.path, content=case.body or None, headers=headers, timeout=20
    )
    return response.status_code, http_failure(response.json(), response.headers)


async def still_serves(service: ServiceProcess) -> None:
    good = image_file()
    url = f"{service.http_url}/v1/encode?model=labelled"
    response = httpx.post(url, content=good, timeout=20)
    assert response.status_code == 200
    async with grpc.aio.insecure_channel(service.grpc_address) as channel:
        stub = tokenizer_pb2_grpc.TokenizerServiceStub(channel)
        reply = await stub.Encode(pb.EncodeRequest(model="labelled", image=good), timeout=20)
    assert reply.codes == response.content


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
async def test_both_protocols_give_the_same_specific_error(
    case: Case, service: ServiceProcess
) -> None:
    by_grpc = await over_grpc(service.grpc_address, case.request)
    status, by_http = over_http(service.http_url, case)

    assert (by_grpc.code, by_grpc.reason) == (case.code, case.reason)
    assert (by_http.code, by_http.reason) == (case.code, case.reason)
    assert status == (case.http_status or HTTP_STATUS[grpc.StatusCode[case.code]])
    assert len(by_grpc.message) > 20
    assert by_grpc.request_id
    assert by_http.request_id
    await still_serves(service)


async def test_an_encoder_that_yields_nan_is_reported_over_both_protocols() -> None:
    def load(spec: str, max_image_pixels: int) -> ServedModel:
        config = NAN if spec == "nan" else LABELLED
        return serve(tiny_model(config), max_image_pixels)

    settings = TokenizerSettings(grpc_port=0, http_port=0, models="nan,labelled")
    case = encode_case("NaN latents", image_file(), "INVALID_LATENTS", "nan")
    async with running(build_app(settings, load)) as ports:
        url = f"http://127.0.0.1:{ports.http}"
        by_grpc = await over_grpc(f"127.0.0.1:{ports.grpc}", case.request)
        status, by_http = await asyncio.to_thread(over_http, url, case)
        async with httpx.AsyncClient(base_url=url) as client:
            good = await client.post("/v1/encode?model=labelled", content=image_file())
    assert (by_grpc.code, by_grpc.reason) == (by_http.code, by_http.reason)
    assert (by_http.code, by_http.reason, status) == (case.code, case.reason, 400)
    assert good.status_code == 200


def test_the_table_names_every_case_once() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)


async def test_a_compressed_request_is_limited_by_its_real_size(service: ServiceProcess) -> None:
    bomb = pb.DecodeRequest(codes=bytes(50_000_000))
    async with grpc.aio.insecure_channel(
        service.grpc_address, compression=grpc.Compression.Gzip
    ) as channel:
        stub = tokenizer_pb2_grpc.TokenizerServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Decode(bomb, timeout=20)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    await still_serves(service)


@pytest.mark.parametrize(
    ("method", "path", "status", "reason"),
    [
        ("GET", "/v1/nothing", 404, "NO_SUCH_ROUTE"),
        ("DELETE", "/v1/encode", 405, "METHOD_NOT_ALLOWED"),
        ("POST", "/v1/recognize?model=labelled", 400, "INVALID_ARGUMENT"),
        ("POST", "/v1/recognize?top_k=-1", 400, "INVALID_ARGUMENT"),
    ],
)
def test_what_only_http_can_get_wrong(
    service: ServiceProcess, method: str, path: str, status: int, reason: str
) -> None:
    response = httpx.request(method, service.http_url + path, content=b"x", timeout=20)
    assert response.status_code == status
    assert http_failure(response.json(), response.headers).reason == reason


def test_a_body_without_declared_length_is_limited_too(service: ServiceProcess) -> None:
    chunks = (bytes(50_000) for _ in range(10))
    response = httpx.post(f"{service.http_url}/v1/decode", content=chunks, timeout=20)
    assert response.status_code == 413


@pytest.mark.parametrize("route", ["/v1/encode?model=labelled", "/v1/decode"])
async def test_a_form_is_told_to_send_the_file_itself(service: ServiceProcess, route: str) -> None:
    form = {"image": ("a.png", image_file(), "image/png")}
    response = httpx.post(service.http_url + route, files=form, timeout=20)
    failure = http_failure(response.json(), response.headers)
    assert (response.status_code, failure.field) == (400, "content-type")
    assert "--data-binary" in failure.message
