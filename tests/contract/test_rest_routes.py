"""The REST routes that the protos promise are the ones that tokenizerd has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vqserve.tokenizer.app import build_app
from vqserve.tokenizer.config import TokenizerSettings

PROTO = Path(__file__).parents[2] / "proto/vqstack/tokenizer/v1/tokenizer.proto"
OPERATIONS = {"/livez", "/readyz", "/startupz", "/metrics"}


@pytest.fixture(scope="module")
def routes() -> set[str]:
    """METHOD and path of every route, without FastAPI's own documentation routes."""
    app = build_app(TokenizerSettings()).http
    document = app.openapi()["paths"]
    return {
        f"{method.upper()} {path}"
        for path, methods in document.items()
        if path not in OPERATIONS
        for method in methods
    }


def test_every_promised_route_exists_and_no_other(routes: set[str]) -> None:
    promised = set(re.findall(r"REST: ((?:GET|POST) /v1/[\w/{}]+)", PROTO.read_text()))
    assert len(promised) == 6
    assert routes == promised


def test_the_websocket_twin_exists() -> None:
    app = build_app(TokenizerSettings()).http
    (promised,) = re.findall(r"WebSocket twin: (/v1/\w+)", PROTO.read_text())
    assert app.url_path_for("stream") == promised
