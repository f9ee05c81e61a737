"""The files of a model that a device downloads, over both protocols, and bundles beside models."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import replace
from pathlib import Path

import grpc.aio
import httpx
import numpy as np
import pytest

from support.process import ServiceProcess
from support.tokenizerd import LABELLED, PLAIN, tiny_model
from vqserve.common.admission import AdmissionGate
from vqserve.common.metrics import ServerMetrics
from vqserve.tokenizer.artifacts import Artifact, Artifacts
from vqserve.tokenizer.codecs import ModelStore, ServedModel
from vqserve.tokenizer.core import CHUNK_BYTES, MAX_INLINE_ARTIFACT_BYTES, TokenizerCore
from vqserve.tokenizer.errors import ArtifactsTooLarge, InvalidModel
from vqserve.tokenizer.loading import serve, with_bundle
from vqserve.tokenizer.metrics import ScqMetrics
from vqserve.tokenizer.pipeline import FramePipeline
from vqstack.tokenizer.v1 import tokenizer_pb2 as pb
from vqstack.tokenizer.v1 import tokenizer_pb2_grpc

MAX_PIXELS = 250_000


async def test_a_file_comes_the_same_over_both_protocols(service: ServiceProcess) -> None:
    url = f"{service.http_url}/v1/models/labelled"
    async with grpc.aio.insecure_channel(service.grpc_address) as channel:
        stub = tokenizer_pb2_grpc.TokenizerServiceStub(channel)
        listed = (await stub.GetModel(pb.GetModelRequest(model="labelled"))).artifacts
        call = stub.GetModelArtifact(
            pb.GetModelArtifactRequest(model="labelled", name="tables.safetensors")
        )
        replies = [reply async for reply in call]
    assert [file.name for file in listed] == ["codebook.bin", "tables.safetensors"]
    assert not any(file.data for file in listed)
    assert replies[0].artifact == listed[1]
    by_http = httpx.get(f"{url}/artifacts/tables.safetensors")
    assert by_http.content == b"".join(reply.chunk for reply in replies)
    assert hashlib.sha256(by_http.content).hexdigest() == listed[1].sha256
    assert by_http.headers["etag"] == f'"{listed[1].sha256}"'
    inline = httpx.get(f"{url}?artifacts=tables.safetensors").json()["artifacts"]
    assert [base64.b64decode(file["data"]) for file in inline] == [b"", by_http.content]


def test_a_file_that_the_client_has_is_not_sent_again(service: ServiceProcess) -> None:
    url = f"{service.http_url}/v1/models/labelled/artifacts/codebook.bin"
    etag = httpx.get(url).headers["etag"]
    again = httpx.get(url, headers={"if-none-match": etag})
    assert (again.status_code, again.content) == (304, b"")


async def test_the_integer_codebook_is_the_float_one(service: ServiceProcess) -> None:
    async with grpc.aio.insecure_channel(service.grpc_address) as channel:
        stub = tokenizer_pb2_grpc.TokenizerServiceStub(channel)
        request = pb.GetModelRequest(model="labelled", artifacts=["codebook.bin"])
        reply = await stub.GetModel(request)
    integers = np.frombuffer(reply.artifacts[0].data, "<i2").astype(np.float64)
    values = integers * 2.0**-reply.model.codebook_exponent
    np.testing.assert_array_equal(values, np.frombuffer(reply.codebook, "<f4"))


def core_with(model: ServedModel) -> TokenizerCore:
    server = ServerMetrics("artifacts", "0")
    models = ModelStore([model])
    pipeline = FramePipeline(models, 1, MAX_PIXELS)
    metrics = ScqMetrics(server.registry, 16)
    return TokenizerCore(models, pipeline, AdmissionGate(8, 1, server), metrics, 1_000_000)


def model_with_file(num_bytes: int) -> ServedModel:
    file = Artifact.of("encoder.onnx", np.random.default_rng(0).bytes(num_bytes))
    return replace(serve(tiny_model(PLAIN), MAX_PIXELS), artifacts=Artifacts([file]))


@pytest.mark.parametrize("offset", [0, 5, CHUNK_BYTES, 2 * CHUNK_BYTES + 7])
def test_chunks_go_on_from_any_offset(offset: int) -> None:
    model = model_with_file(2 * CHUNK_BYTES + 7)
    request = pb.GetModelArtifactRequest(model="plain", name="encoder.onnx", offset=offset)
    replies = list(core_with(model).artifact_chunks(request))
    assert b"".join(r.chunk for r in replies) == model.artifacts.get("encoder.onnx").data[offset:]
    assert [reply.HasField("artifact") for reply in replies] == [True] + [False] * (
        len(replies) - 1
    )
    assert all(reply.ByteSize() < 4 * 1024 * 1024 for reply in replies)


def test_more_than_one_answer_holds_is_refused() -> None:
    core = core_with(model_with_file(MAX_INLINE_ARTIFACT_BYTES + 1))
    assert core.get_model(pb.GetModelRequest(model="plain")).artifacts
    with pytest.raises(ArtifactsTooLarge, match="GetModelArtifact"):
        core.get_model(pb.GetModelRequest(model="plain", artifacts=["encoder.onnx"]))


def write_bundle(folder: Path, model_id: str) -> None:
    """A bundle as `scq export` writes it, with one file that is no real graph."""
    folder.mkdir(parents=True)
    data = b"a graph"
    (folder / "encoder.onnx").write_bytes(data)
    entry = {
        "name": "encoder.onnx",
        "media_type": "application/onnx",
        "size_bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    manifest = {"format": "scq-bundle-1", "model": {"model_id": model_id}, "artifacts": [entry]}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_bundle_of_the_models_name_is_served_with_it(tmp_path: Path) -> None:
    model = serve(tiny_model(LABELLED), MAX_PIXELS)
    write_bundle(tmp_path / "labelled", model.card.model_hash)
    files = with_bundle(model, tmp_path).artifacts.all()
    assert [file.name for file in files] == [
        "codebook.bin",
        "encoder.onnx",
        "manifest.json",
        "tables.safetensors",
    ]
    assert files[1].media_type == "application/onnx"
    assert with_bundle(serve(tiny_model(PLAIN), MAX_PIXELS), tmp_path).name == "plain"


def test_a_bundle_root_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidModel, match="nowhere is not a folder"):
        with_bundle(serve(tiny_model(PLAIN), MAX_PIXELS), tmp_path / "nowhere")


def test_a_bundle_of_another_model_is_refused(tmp_path: Path) -> None:
    write_bundle(tmp_path / "labelled", "0" * 64)
    with pytest.raises(InvalidModel, match="export it again"):
        with_bundle(serve(tiny_model(LABELLED), MAX_PIXELS), tmp_path)


def test_a_bundle_with_a_changed_file_is_refused(tmp_path: Path) -> None:
    model = serve(tiny_model(LABELLED), MAX_PIXELS)
    write_bundle(tmp_path / "labelled", model.card.model_hash)
    (tmp_path / "labelled" / "encoder.onnx").write_bytes(b"another graph")
    with pytest.raises(InvalidModel, match=r"encoder\.onnx"):
        with_bundle(model, tmp_path)
