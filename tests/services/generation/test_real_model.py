"""llmd as it ships, `python -m vqserve.generation`, on a tiny random llama in both executors."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
from openai import OpenAI

from support.llmd import LlmServer, llm_server, write_tiny_llama


@pytest.fixture(scope="module", params=["onnx", "torch"])
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LlmServer]:
    """A server on the tiny model, once for each executor."""
    if request.param == "onnx" and importlib.util.find_spec("onnxruntime") is None:
        pytest.skip("onnxruntime is not installed")
    root = tmp_path_factory.mktemp("real")
    write_tiny_llama(root / "tiny")
    args = ("--model", str(root / "tiny"), "--executor", request.param, "--num-threads", "1")
    with llm_server(root, args, "vqserve.generation") as started:
        yield started


@pytest.fixture
def client(server: LlmServer) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.http_url}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_greedy_answers_repeat(client: OpenAI) -> None:
    texts = {
        client.completions.create(model="tiny", prompt="abc", max_tokens=20, temperature=0)
        .choices[0]
        .text
        for _ in range(2)
    }
    assert len(texts) == 1


def test_a_seed_repeats_whatever_else_runs(client: OpenAI) -> None:
    def ask(seed: int) -> str:
        chunks = client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "abc"}],
            max_tokens=20,
            seed=seed,
            stream=True,
        )
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    alone = ask(7)
    other = client.completions.create(model="tiny", prompt="z", max_tokens=60, stream=True)
    next(iter(other))
    assert ask(7) == alone
    assert ask(8) != alone
    other.close()


def test_the_model_is_described(client: OpenAI, server: LlmServer) -> None:
    model = client.models.retrieve("tiny").model_dump()
    assert model["context_length"] == 64
    assert model["vocab_size"] == 257
    assert len(model["model_hash"]) == 16
    assert server.metric("llm_model_info", model="tiny", revision=model["model_hash"]) == 1
