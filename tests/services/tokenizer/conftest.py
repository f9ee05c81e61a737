"""tokenizerd with tiny models: as a real process, and inside the test's own loop."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from support.process import ServiceProcess, service_process
from support.tokenizerd import BlockingCodec, blocking_model, write_models
from vqserve.common.lifecycle import Ports, running
from vqserve.tokenizer.app import build_app
from vqserve.tokenizer.codecs import ServedModel
from vqserve.tokenizer.config import TokenizerSettings

MAX_REQUEST_BYTES = 200_000


@pytest.fixture(scope="session")
def model_files(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Value of --models for the two tiny models."""
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def service(model_files: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    """A running tokenizerd with a request limit of 200,000 bytes and its admin listener on."""
    limit = str(MAX_REQUEST_BYTES)
    args = ["--models", model_files, "--max-request-bytes", limit, "--admin-port", "0"]
    model_root = str(Path(model_files.split(",")[0]).parent)
    with service_process(
        "vqserve.tokenizer",
        [*args, "--model-root", model_root],
        tmp_path_factory.mktemp("tokenizerd"),
    ) as running_service:
        yield running_service


@pytest.fixture
async def blocked() -> AsyncIterator[tuple[Ports, BlockingCodec]]:
    """A service in this loop whose encoder waits for the test; it admits two requests at once."""
    codecs: list[BlockingCodec] = []

    def load(spec: str, max_image_pixels: int) -> ServedModel:
        model, codec = blocking_model(max_image_pixels)
        codecs.append(codec)
        return model

    settings = TokenizerSettings(
        grpc_port=0,
        http_port=0,
        models="labelled",
        max_concurrent_requests=2,
        engine_threads=1,
        torch_threads=1,
        drain_grace_seconds=5,
        health_probe_every=0,  # A probe would be one more encoder run to count.
    )
    async with running(build_app(settings, load)) as ports:
        try:
            yield ports, codecs[0]
        finally:
            codecs[0].release.set()
