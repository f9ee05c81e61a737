"""The official OpenAI client and curl against a real process, streaming and not."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI

from support.llmd import ANSWER, LlmServer, embedded_llmd

QUESTION = "What is on the picture?"


@pytest.fixture
async def client(fast: LlmServer) -> AsyncIterator[AsyncOpenAI]:
    """OpenAI's own client, pointed at llmd."""
    async with AsyncOpenAI(base_url=f"{fast.http_url}/v1", api_key="none", max_retries=0) as made:
        yield made


async def test_chat(client: AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model="fast",
        messages=[{"role": "user", "content": QUESTION}],
        max_completion_tokens=12,
        temperature=0,
    )
    assert answer.object == "chat.completion"
    assert answer.model == "fast"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == ANSWER.encode()[:12].decode()
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12


async def test_chat_streams_role_pieces_reason_usage(client: AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="fast",
        messages=[
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": QUESTION}]},
        ],
        max_tokens=12,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    *pieces, ending, usage = chunks
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in pieces) == "A road, grö"
    assert {chunk.choices[0].finish_reason for chunk in pieces} == {None}
    assert ending.choices[0].finish_reason == "length"
    assert usage.choices == []
    assert usage.usage is not None
    assert usage.usage.completion_tokens == 12
    assert len({chunk.id for chunk in chunks}) == 1


async def test_a_stop_string_is_not_part_of_the_answer(client: AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model="fast",
        messages=[{"role": "user", "content": QUESTION}],
        stop=["größer", "never"],
        temperature=0,
    )
    assert answer.choices[0].message.content == "A road, "
    assert answer.choices[0].finish_reason == "stop"


async def test_chat_without_a_limit_fills_the_context(client: AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model="fast", messages=[{"role": "user", "content": QUESTION}], temperature=0
    )
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.total_tokens == 256


async def test_a_conversation_can_be_carried_on(client: AsyncOpenAI) -> None:
    first = await client.chat.completions.create(
        model="fast", messages=[{"role": "user", "content": QUESTION}], max_tokens=5
    )
    question: Any = {"role": "user", "content": QUESTION}
    reply: Any = first.choices[0].message.model_dump()
    second = await client.chat.completions.create(
        model="fast",
        messages=[question, reply, question],
        max_tokens=5,
    )
    assert first.usage is not None
    assert second.usage is not None
    assert second.usage.prompt_tokens > first.usage.prompt_tokens


async def test_completions(client: AsyncOpenAI) -> None:
    answer = await client.completions.create(model="fast", prompt="Once", temperature=0)
    assert answer.object == "text_completion"
    assert answer.choices[0].text == ANSWER.encode()[:16].decode()
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 4


async def test_completions_stream(client: AsyncOpenAI) -> None:
    stream = await client.completions.create(
        model="fast", prompt=[1, 2, 3], max_tokens=7, temperature=0, stream=True
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks) == ANSWER[:7]
    assert chunks[-1].choices[0].finish_reason == "length"
    assert chunks[-1].usage is None


async def test_chat_reports_log_probabilities(client: AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model="fast",
        messages=[{"role": "user", "content": QUESTION}],
        max_tokens=3,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
    )
    reported = answer.choices[0].logprobs
    assert reported is not None
    assert reported.content is not None
    assert "".join(entry.token for entry in reported.content) == ANSWER[:3]
    assert [bytes(entry.bytes or ()).decode() for entry in reported.content] == list(ANSWER[:3])
    for entry in reported.content:
        first, second = entry.top_logprobs
        assert (first.token, first.logprob) == (entry.token, entry.logprob)
        assert second.logprob <= first.logprob <= 0


async def test_completions_report_log_probabilities_with_offsets(client: AsyncOpenAI) -> None:
    whole = await client.completions.create(
        model="fast", prompt="Once", max_tokens=4, temperature=0, logprobs=1
    )
    reported = whole.choices[0].logprobs
    assert reported is not None
    assert reported.tokens == list(ANSWER[:4])
    assert reported.text_offset == [0, 1, 2, 3]
    assert [list(top) for top in reported.top_logprobs or ()] == [[c] for c in ANSWER[:4]]
    stream = await client.completions.create(
        model="fast", prompt="Once", max_tokens=4, temperature=0, logprobs=1, stream=True
    )
    pieces = [c.choices[0].logprobs for chunk in [stream] async for c in chunk]
    assert [p.text_offset for p in pieces if p is not None] == [[0], [1], [2], [3]]


async def test_a_bias_moves_the_choice(client: AsyncOpenAI, http: httpx.AsyncClient) -> None:
    (z,) = (await http.post("/v1/tokenize", json={"text": "z"})).json()["token_ids"]
    answer = await client.completions.create(
        model="fast", prompt="Once", max_tokens=3, temperature=0, logit_bias={str(z): 100}
    )
    assert answer.choices[0].text == "zzz"


async def test_models(client: AsyncOpenAI) -> None:
    listed = [model.id async for model in await client.models.list()]
    assert listed == ["fast"]
    model = await client.models.retrieve("fast")
    extension = model.model_dump()
    assert extension["quantization"]["method"] == "gptq"
    assert extension["context_length"] == 256


async def test_errors_arrive_as_openais_own_types(client: AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        await client.completions.create(model="fast", prompt="x" * 300)
    assert bad.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError) as missing:
        await client.completions.create(model="gpt-4", prompt="x")
    assert missing.value.code == "model_not_found"
    assert missing.value.param == "model"


async def test_extensions_pass_through_extra_body(client: AsyncOpenAI) -> None:
    answer = await client.completions.create(
        model="fast",
        prompt="Once",
        max_tokens=4,
        extra_body={"top_k": 1, "min_p": 0.1, "repetition_penalty": 1.0, "ignore_eos": True},
    )
    assert answer.choices[0].text == ANSWER[:4]


async def test_tokens_make_the_round_trip(http: httpx.AsyncClient) -> None:
    text = "größer, 더 크다"
    tokens = await http.post("/v1/tokenize", json={"model": "fast", "text": text})
    ids = tokens.json()["token_ids"]
    assert len(ids) == len(text.encode())
    back = await http.post("/v1/detokenize", json={"token_ids": ids})
    assert back.json() == {"text": text}


async def test_the_wire_format_of_a_stream(http: httpx.AsyncClient) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2, "stream": True}
    async with http.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["x-accel-buffering"] == "no"
        events = (await response.aread()).decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    first = json.loads(events[0].removeprefix("data: "))
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert first["object"] == "chat.completion.chunk"


async def test_a_silent_stream_sends_comments_that_clients_ignore(tmp_path: Path) -> None:
    body = {"prompt": "x", "max_tokens": 4, "temperature": 0, "stream": True}
    async with (
        embedded_llmd(tmp_path / "slow", heartbeat_seconds=0.002) as url,
        httpx.AsyncClient(base_url=url) as http,
        AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client,
    ):
        events = (await http.post("/v1/completions", json=body)).text
        assert ": ping\n\n" in events
        assert events.endswith("data: [DONE]\n\n")
        stream = await client.completions.create(
            model="slow", prompt="x", max_tokens=4, temperature=0, stream=True
        )
        assert "".join([chunk.choices[0].text async for chunk in stream]) == ANSWER[:4]


async def test_a_failure_in_mid_stream_is_an_error_event(tmp_path: Path) -> None:
    async with (
        embedded_llmd(tmp_path / "broken") as url,
        AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        stream = await client.completions.create(
            model="broken", prompt="x", max_tokens=9, stream=True
        )
        with pytest.raises(openai.APIError, match="engine failed"):
            [chunk async for chunk in stream]
        answer = await client.completions.create(model="broken", prompt="x", max_tokens=2)
        assert answer.choices[0].text == ANSWER[:2]


def test_curl_streams(fast: LlmServer) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    messages = [{"role": "user", "content": "hi"}]
    body = {"messages": messages, "max_tokens": 6, "temperature": 0, "stream": True}
    done = subprocess.run(
        ["curl", "-sSN", f"{fast.http_url}/v1/chat/completions", "-H",
         "content-type: application/json", "-d", json.dumps(body)],
        capture_output=True, text=True, timeout=30, check=True,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line]
    assert lines[-1] == "data: [DONE]"
    deltas = [json.loads(line[6:])["choices"][0]["delta"] for line in lines[:-1]]
    assert "".join(delta.get("content", "") for delta in deltas) == ANSWER[:6]


async def test_the_routes_are_documented(http: httpx.AsyncClient) -> None:
    paths = (await http.get("/openapi.json")).json()["paths"]
    assert {
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/models",
        "/v1/models/{model}",
        "/v1/tokenize",
        "/v1/detokenize",
    } <= paths.keys()
    assert (await http.get("/docs")).status_code == 200
