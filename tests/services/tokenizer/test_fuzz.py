"""Whatever bytes come in, the answer is a result or a client error, never a fault of ours."""

from __future__ import annotations

import random
from collections.abc import Coroutine, Iterator
from typing import Any

import pytest
from google.protobuf.message import DecodeError

from support.tokenizerd import LABELLED, PLAIN, image_file, resealed, tiny_model
from vqserve.common.admission import AdmissionGate
from vqserve.common.errors import ServiceError
from vqserve.common.metrics import ServerMetrics
from vqserve.tokenizer.codecs import ModelStore
from vqserve.tokenizer.core import TokenizerCore
from vqserve.tokenizer.loading import serve
from vqserve.tokenizer.metrics import ScqMetrics
from vqserve.tokenizer.pipeline import FramePipeline
from vqstack.tokenizer.v1 import tokenizer_pb2 as pb

MAX_PIXELS = 250_000
ROUNDS = 60


@pytest.fixture
def core() -> Iterator[TokenizerCore]:
    models = ModelStore(serve(tiny_model(config), MAX_PIXELS) for config in (LABELLED, PLAIN))
    server = ServerMetrics("fuzz", "0")
    metrics = ScqMetrics(server.registry, 16)
    pipeline = FramePipeline(models, 1, MAX_PIXELS)
    yield TokenizerCore(models, pipeline, AdmissionGate(8, 1, server), metrics, 1_000_000)
    pipeline.close()


def mutated(payload: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, cut out or repeated."""
    data = bytearray(payload)
    for _ in range(rng.randint(1, 4)):
        position = rng.randrange(len(data))
        kind = rng.choice(("change", "cut", "repeat"))
        if kind == "change":
            data[position] = rng.randrange(256)
        elif kind == "cut" and len(data) > 20:
            del data[position : position + rng.randint(1, 8)]
        else:
            data[position:position] = data[position : position + rng.randint(1, 8)]
    return bytes(data)


async def answer_to(call: Coroutine[Any, Any, Any]) -> tuple[str, int]:
    """Reason and pixels of the picture; the reason is OK when there was no error."""
    try:
        reply = await call
    except ServiceError as error:
        return (error.reason if error.http_status < 500 else "FAULT"), 0
    return "OK", getattr(reply, "width", 0) * getattr(reply, "height", 0)


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP"])
async def test_damaged_images_are_client_errors(core: TokenizerCore, image_format: str) -> None:
    rng = random.Random(image_format)
    source = image_file(image_format)
    requests = [
        pb.EncodeRequest(model="labelled", image=mutated(source, rng)) for _ in range(ROUNDS)
    ]
    answers = [await answer_to(core.encode(request, "grpc")) for request in requests]
    assert {reason for reason, _ in answers} <= {"OK", "INVALID_IMAGE", "IMAGE_TOO_LARGE"}
    assert max(pixels for _, pixels in answers) <= MAX_PIXELS
    assert any(reason != "OK" for reason, _ in answers)


@pytest.mark.parametrize("is_resealed", [False, True], ids=["wrong checksum", "right checksum"])
async def test_damaged_codes_are_client_errors(core: TokenizerCore, is_resealed: bool) -> None:
    rng = random.Random(7)
    encoded = await core.encode(pb.EncodeRequest(model="labelled", image=image_file()), "grpc")
    damaged = [mutated(encoded.codes, rng) for _ in range(ROUNDS)]
    damaged = [codes for codes in damaged if codes != encoded.codes]
    base_end = encoded.base_bytes
    sent = [resealed(codes, base_end) if is_resealed else codes for codes in damaged]
    answers = [await answer_to(core.decode(pb.DecodeRequest(codes=c), "grpc")) for c in sent]
    allowed = {"CORRUPT_CODES", "UNKNOWN_MODEL", "IMAGE_TOO_LARGE", "REFERENCE_MISMATCH"}
    assert {reason for reason, _ in answers} <= (allowed | {"OK"} if is_resealed else allowed)
    assert max(pixels for _, pixels in answers) <= MAX_PIXELS
    assert len(answers) > ROUNDS // 2


async def test_damaged_messages_are_client_errors(core: TokenizerCore) -> None:
    rng = random.Random(11)
    seed = pb.RecognizeRequest(image=image_file(), model="labelled", top_k=3)
    reasons = []
    for _ in range(ROUNDS * 3):
        try:
            request = pb.RecognizeRequest.FromString(mutated(seed.SerializeToString(), rng))
        except DecodeError:
            continue
        reasons.append((await answer_to(core.recognize(request, "grpc")))[0])
    assert "FAULT" not in reasons
    assert len(reasons) > ROUNDS
