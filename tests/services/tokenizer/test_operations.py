"""What operators see of a real process: probes, health, reflection, metrics, admin, drain."""

from __future__ import annotations

import asyncio
import shutil
import signal
import subprocess
from pathlib import Path

import grpc.aio
import httpx
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from prometheus_client.parser import text_string_to_metric_families

from support.forkserver import start_module
from support.process import (
    ServiceProcess,
    grpc_failure,
    http_failure,
    service_process,
)
from support.tokenizerd import image_file
from vqstack.admin.v1 import admin_pb2, admin_pb2_grpc
from vqstack.tokenizer.v1 import tokenizer_pb2 as pb
from vqstack.tokenizer.v1 import tokenizer_pb2_grpc

SERVICE = "vqstack.tokenizer.v1.TokenizerService"


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/startupz"])
def test_probes_pass_while_serving(service: ServiceProcess, path: str) -> None:
    assert httpx.get(service.http_url + path).status_code == 200


@pytest.mark.parametrize("name", ["", SERVICE])
async def test_grpc_health_says_serving(service: ServiceProcess, name: str) -> None:
    async with grpc.aio.insecure_channel(service.grpc_address) as channel:
        check = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        reply = await check(health_pb2.HealthCheckRequest(service=name))
    assert reply.status == health_pb2.HealthCheckResponse.SERVING


async def test_reflection_lists_the_services(service: ServiceProcess) -> None:
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    async with grpc.aio.insecure_channel(service.grpc_address) as channel:
        info = channel.stream_stream(
            "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )
        replies = [reply async for reply in info(iter([request]))]
    names = {entry.name for entry in replies[0].list_services_response.service}
    assert {SERVICE, "grpc.health.v1.Health"} <= names


def use_every_series(service: ServiceProcess) -> None:
    url = service.http_url
    codes = httpx.post(f"{url}/v1/encode?model=labelled", content=image_file()).content
    httpx.post(f"{url}/v1/decode", content=codes)
    octets = {"content-type": "application/octet-stream"}
    httpx.post(f"{url}/v1/recognize", content=codes, headers=octets)
    httpx.post(f"{url}/v1/decode", content=b"bad")


def test_metrics_tell_bitrate_latency_and_codebook_use(service: ServiceProcess) -> None:
    use_every_series(service)
    text = httpx.get(f"{service.http_url}/metrics").text
    samples = {
        (sample.name, *sorted(pair for pair in sample.labels.items() if pair[0] != "version")): (
            sample.value
        )
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    model = ("model", "labelled")
    for key in [
        ("scq_coded_bytes_total", ("direction", "out"), ("frame_type", "key"), model),
        ("scq_coded_bytes_total", ("direction", "in"), ("frame_type", "key"), model),
        ("scq_source_bytes_total", model),
        ("scq_source_pixels_total", model),
        ("scq_frame_bpp_count", ("frame_type", "key"), model),
        ("scq_coded_latents_total", model, ("support", "2")),
        ("scq_frame_latency_seconds_sum", model, ("op", "encode")),
        ("scq_stage_duration_seconds_sum", model, ("stage", "encoder")),
        ("scq_codebook_perplexity", model),
        ("scq_codebook_usage_ratio", model),
        ("server_ready",),
    ]:
        assert samples[key] > 0, key
    assert "http_request_duration_seconds_bucket" in text
    assert 'route="/v1/models/{model}"' in text or 'route="/v1/encode"' in text


def test_promtool_finds_nothing_to_complain_about(service: ServiceProcess) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed: apt-get install prometheus")
    use_every_series(service)
    text = httpx.get(f"{service.http_url}/metrics").text
    check = subprocess.run(
        [promtool, "check", "metrics"], input=text, text=True, capture_output=True, check=False
    )
    assert (check.returncode, check.stdout + check.stderr) == (0, "")


def test_unknown_paths_and_methods_do_not_grow_the_series(service: ServiceProcess) -> None:
    for number in range(5):
        httpx.get(f"{service.http_url}/nothing/{number}")
        httpx.request(f"METHOD{number}", f"{service.http_url}/v1/encode")
        httpx.post(f"{service.http_url}/v1/encode?model=m{number}", content=b"x")
    text = httpx.get(f"{service.http_url}/metrics").text
    assert "/nothing" not in text
    assert "METHOD" not in text
    assert 'model="m0"' not in text


async def test_the_admin_listener_loads_and_unloads(
    service: ServiceProcess, model_files: str
) -> None:
    path = model_files.split(",")[1]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{service.ports.admin}") as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        loaded = await stub.LoadModel(admin_pb2.LoadModelRequest(path=path, name="second"))
        status = await stub.GetStatus(admin_pb2.GetStatusRequest())
        served = httpx.post(f"{service.http_url}/v1/encode?model=second", content=image_file())
        await stub.UnloadModel(admin_pb2.UnloadModelRequest(name="second"))
    gone = httpx.post(f"{service.http_url}/v1/encode?model=second", content=image_file())
    assert loaded.name == "second"
    assert list(status.models) == ["labelled", "plain", "second"]
    assert (status.service, status.draining) == ("tokenizerd", False)
    assert (served.status_code, gone.status_code) == (200, 404)


@pytest.mark.parametrize(
    ("path", "name", "reason"),
    [
        ("/etc/hostname", "x", "PATH_NOT_ALLOWED"),
        ("relative", "x", "PATH_NOT_ALLOWED"),
        ("{root}/../outside.safetensors", "x", "PATH_NOT_ALLOWED"),
        ("{root}/missing.safetensors", "x", "PATH_NOT_ALLOWED"),
        ("{root}/plain.safetensors", "plain", "MODEL_NAME_TAKEN"),
        ("{root}/plain.safetensors", "Not a name", "INVALID_MODEL"),
        ("{root}/garbage.safetensors", "x", "INVALID_MODEL"),
    ],
)
async def test_the_admin_listener_refuses_bad_loads(
    service: ServiceProcess, model_files: str, path: str, name: str, reason: str
) -> None:
    root = Path(model_files.split(",")[0]).parent
    (root / "garbage.safetensors").write_bytes(b"garbage")
    async with grpc.aio.insecure_channel(f"127.0.0.1:{service.ports.admin}") as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        request = admin_pb2.LoadModelRequest(path=path.format(root=root), name=name)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.LoadModel(request)
    assert grpc_failure(caught.value).reason == reason


async def test_the_data_port_does_not_offer_admin(service: ServiceProcess) -> None:
    async with grpc.aio.insecure_channel(service.grpc_address) as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Drain(admin_pb2.DrainRequest())
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def _keep_encoding(address: str, outcomes: list[str]) -> None:
    """Call Encode until the server is gone; note each outcome."""
    request = pb.EncodeRequest(model="labelled", image=image_file("JPEG", 200, 160))
    async with grpc.aio.insecure_channel(address) as channel:
        stub = tokenizer_pb2_grpc.TokenizerServiceStub(channel)
        while True:
            try:
                reply = await stub.Encode(request)
                outcomes.append("ok" if reply.codes else "empty")
            except grpc.aio.AioRpcError as error:
                failure = grpc_failure(error)
                outcomes.append(failure.reason or failure.code)
                return


async def _keep_encoding_over_http(url: str, outcomes: list[str]) -> None:
    body = image_file("JPEG", 200, 160)
    async with httpx.AsyncClient(timeout=20) as client:
        while True:
            try:
                response = await client.post(f"{url}/v1/encode?model=labelled", content=body)
            except (httpx.ConnectError, httpx.ReadError, httpx.RemoteProtocolError):
                outcomes.append("closed")
                return
            if response.status_code != 200:
                outcomes.append(http_failure(response.json(), response.headers).reason)
                return
            outcomes.append("ok")


async def test_sigterm_under_load_drops_no_accepted_request(
    model_files: str, tmp_path: Path
) -> None:
    args = ["--models", model_files]
    with service_process("vqserve.tokenizer", args, tmp_path) as loaded:
        outcomes: list[str] = []
        callers = [_keep_encoding(loaded.grpc_address, outcomes) for _ in range(4)]
        callers += [_keep_encoding_over_http(loaded.http_url, outcomes) for _ in range(4)]
        calling = asyncio.gather(*callers)
        async with asyncio.timeout(30):
            while len(outcomes) < 40:
                await asyncio.sleep(0.01)
            loaded.process.send_signal(signal.SIGTERM)
            await calling
            status = await asyncio.to_thread(loaded.process.wait)
        events = loaded.events()
    assert status == 0
    assert outcomes.count("ok") >= 40
    # Whoever was not served was told so before any work was done, or found the door closed.
    assert set(outcomes) <= {"ok", "DRAINING", "UNAVAILABLE", "closed"}
    accepted = [event for event in events if event["event"] == "request"]
    codes = {event["code"] for event in accepted}
    assert codes <= {"OK", "200", "UNAVAILABLE", "503"}
    assert sum(event["code"] in ("OK", "200") for event in accepted) == outcomes.count("ok")
    assert [event["event"] for event in events][-1] == "stopped"


async def test_drain_by_admin_ends_the_process_with_status_0(
    model_files: str, tmp_path: Path
) -> None:
    args = ["--models", model_files, "--admin-port", "0", "--drain-delay-seconds", "1.5"]
    with service_process("vqserve.tokenizer", args, tmp_path) as draining:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{draining.ports.admin}") as channel:
            await admin_pb2_grpc.AdminServiceStub(channel).Drain(admin_pb2.DrainRequest())
        async with asyncio.timeout(20):
            while httpx.get(f"{draining.http_url}/readyz").status_code == 200:
                await asyncio.sleep(0.01)
            late = httpx.post(f"{draining.http_url}/v1/encode?model=labelled", content=image_file())
            status = await asyncio.to_thread(draining.process.wait)
    assert late.status_code == 200
    assert status == 0


def test_a_service_that_cannot_start_says_why(tmp_path: Path) -> None:
    model, log = "/nowhere/x.safetensors", tmp_path / "service.log"
    process = start_module("vqserve.tokenizer", ["--models", model], log)
    assert process.wait(60) == 2
    last = log.read_text().strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert model in last
    assert "Traceback" not in log.read_text()
