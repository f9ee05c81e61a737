"""TLS and mutual TLS against a real listener, with certificates made for the test."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from vqclient import (
    NO_RETRY,
    ClientOptions,
    TlsOptions,
    TokenizerClient,
    UnavailableError,
)
from vqclient.testing import FakeTokenizerService
from vqstack.tokenizer.v1 import tokenizer_pb2_grpc


@dataclass(frozen=True)
class KeyPair:
    """A self-signed certificate for localhost, which is also its own authority."""

    certificate: bytes
    key: bytes


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> KeyPair:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs the openssl command to make a certificate")
    folder: Path = tmp_path_factory.mktemp("tls")
    subprocess.run(
        [
            *(openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-nodes", "-days", "2", "-subj", "/CN=localhost"),
            *("-addext", "subjectAltName=DNS:localhost"),
            *("-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")),
        ],
        check=True,
        capture_output=True,
    )
    return KeyPair((folder / "cert.pem").read_bytes(), (folder / "key.pem").read_bytes())


@pytest.fixture(params=[False, True], ids=["server-only", "mutual"])
def is_mutual(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
async def address(pair: KeyPair, is_mutual: bool) -> AsyncIterator[str]:
    server = grpc.aio.server()
    tokenizer_pb2_grpc.add_TokenizerServiceServicer_to_server(FakeTokenizerService(), server)
    credentials = grpc.ssl_server_credentials(
        [(pair.key, pair.certificate)], pair.certificate if is_mutual else None, is_mutual
    )
    port = server.add_secure_port("localhost:0", credentials)
    await server.start()
    yield f"localhost:{port}"
    await server.stop(None)


async def test_encrypted_calls_are_answered(address: str, pair: KeyPair, is_mutual: bool) -> None:
    tls = TlsOptions(pair.certificate)
    if is_mutual:
        tls = TlsOptions(pair.certificate, pair.key, pair.certificate)
    async with TokenizerClient(address, ClientOptions(tls=tls, api_key="secret")) as client:
        assert [model.name for model in await client.models()] == ["nav"]


async def test_a_server_of_an_unknown_authority_is_not_trusted(address: str) -> None:
    options = ClientOptions(tls=TlsOptions(), retry=NO_RETRY)
    async with TokenizerClient(address, options) as client:
        with pytest.raises(UnavailableError, match="cannot reach the tokenizer service"):
            await client.models()
