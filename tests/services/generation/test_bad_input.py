"""Every bad input over both protocols: code, status and reason agree, and the service goes on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
import httpx
import pytest

from support.llmd import ANSWER, CONTEXT_LENGTH, LlmServer, embedded_llmd
from support.process import grpc_failure
from vqserve.common.errors import HTTP_STATUS
from vqstack.generation.v1 import generation_pb2 as pb

if TYPE_CHECKING:
    from vqstack.generation.v1.generation_pb2_grpc import GenerationServiceAsyncStub

GENERATE = "/vqstack.generation.v1.GenerationService/Generate"
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
NAN, INFINITY = float("nan"), float("inf")
HELLO = [{"role": "user", "content": "hello"}]


@dataclass(frozen=True)
class Case:
    """One bad input as each protocol can say it; None where one cannot."""

    name: str
    reason: str
    rpc: Any = None
    rest: tuple[str, Any] | None = None
    code: grpc.StatusCode = grpc.StatusCode.INVALID_ARGUMENT
    field: str | None = None


def sampling(**values: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(prompt="hello", sampling=pb.SamplingParams(**values))


def chat(*turns: tuple[str, str]) -> pb.GenerateRequest:
    messages = [pb.ChatMessage(role=role, content=content) for role, content in turns]
    return pb.GenerateRequest(chat=pb.ChatMessages(messages=messages))


def prompt(**values: Any) -> tuple[str, Any]:
    return COMPLETIONS, {"prompt": "hello", **values}


# max_tokens = -1 as a careless client in another language puts it on the wire: a varint of 64 ones.
NEGATIVE_MAX_TOKENS = (
    pb.GenerateRequest(prompt="hello").SerializeToString() + b"\x2a\x0b\x08" + b"\xff" * 9 + b"\x01"
)

NOT_FOUND = grpc.StatusCode.NOT_FOUND

CASES = [
    Case(
        "empty prompt",
        "EMPTY_PROMPT",
        pb.GenerateRequest(prompt=""),
        prompt(prompt=""),
        field="prompt",
    ),
    Case("no prompt", "EMPTY_PROMPT", pb.GenerateRequest(), (COMPLETIONS, {})),
    Case(
        "no tokens",
        "EMPTY_PROMPT",
        pb.GenerateRequest(tokens=pb.TokenIds()),
        prompt(prompt=[]),
    ),
    Case("no messages", "EMPTY_PROMPT", chat(), (CHAT, {"messages": []}), field="messages"),
    Case(
        "prompt as long as the context",
        "PROMPT_TOO_LONG",
        pb.GenerateRequest(prompt="x" * CONTEXT_LENGTH),
        prompt(prompt="x" * CONTEXT_LENGTH),
        field="prompt",
    ),
    Case(
        "prompt far too long to tokenize",
        "PROMPT_TOO_LONG",
        pb.GenerateRequest(prompt="x" * 10**6),
        prompt(prompt="x" * 10**6),
        field="prompt",
    ),
    Case(
        "conversation longer than the context",
        "PROMPT_TOO_LONG",
        chat(("user", "x" * CONTEXT_LENGTH)),
        (CHAT, {"messages": [{"role": "user", "content": "x" * CONTEXT_LENGTH}]}),
        field="messages",
    ),
    Case(
        "conversation far too long",
        "PROMPT_TOO_LONG",
        chat(("user", "x" * 10**6)),
        (CHAT, {"messages": [{"role": "user", "content": "x" * 10**6}]}),
        field="messages",
    ),
    Case(
        "prompt token outside the vocabulary",
        "INVALID_PROMPT",
        pb.GenerateRequest(tokens=pb.TokenIds(ids=[1, 257])),
        prompt(prompt=[1, 257]),
    ),
    Case("negative prompt token", "INVALID_PROMPT", rest=prompt(prompt=[-1]), field="prompt"),
    Case(
        "bias of a token id with thousands of digits",
        "INVALID_SAMPLING",
        rest=prompt(logit_bias={"9" * 5000: 1}),
        field="logit_bias",
    ),
    Case(
        "empty stop string",
        "INVALID_SAMPLING",
        sampling(stop=[".", ""]),
        prompt(stop=[".", ""]),
        field="stop",
    ),
    Case(
        "bias of a token outside the vocabulary",
        "INVALID_SAMPLING",
        sampling(logit_bias=[pb.LogitBias(token_id=257, bias=1)]),
        prompt(logit_bias={"257": 1}),
        field="logit_bias",
    ),
    Case(
        "bias out of range",
        "INVALID_SAMPLING",
        sampling(logit_bias=[pb.LogitBias(token_id=5, bias=101)]),
        prompt(logit_bias={"5": 101}),
        field="logit_bias",
    ),
    Case(
        "bias of no token id", "INVALID_SAMPLING", rest=prompt(logit_bias={"a": 1}),
        field="logit_bias",
    ),
    Case(
        "too many log-probabilities",
        "INVALID_SAMPLING",
        sampling(logprobs=21),
        prompt(logprobs=21),
        field="logprobs",
    ),
    Case(
        "unknown role",
        "INVALID_PROMPT",
        chat(("user", "hello"), ("wizard", "hello")),
        (CHAT, {"messages": [*HELLO, {"role": "wizard", "content": "hello"}]}),
        field="messages[1].role",
    ),
    Case(
        "zero max_tokens",
        "INVALID_SAMPLING",
        sampling(max_tokens=0),
        prompt(max_tokens=0),
        field="max_tokens",
    ),
    Case(
        "negative max_tokens",
        "INVALID_SAMPLING",
        NEGATIVE_MAX_TOKENS,
        prompt(max_tokens=-1),
        field="max_tokens",
    ),
    Case(
        "max_tokens above the context",
        "INVALID_SAMPLING",
        sampling(max_tokens=CONTEXT_LENGTH + 1),
        prompt(max_tokens=CONTEXT_LENGTH + 1),
        field="max_tokens",
    ),
    Case("astronomic max_tokens", "INVALID_SAMPLING", rest=prompt(max_tokens=10**40)),
    *(
        Case(
            f"{name} = {value}",
            "INVALID_SAMPLING",
            sampling(**{name: value}),
            prompt(**{name: value}),
            field=name,
        )
        for name, value in (
            ("temperature", -0.1),
            ("temperature", 2.5),
            ("temperature", NAN),
            ("temperature", INFINITY),
            ("top_p", 0.0),
            ("top_p", 1.5),
            ("top_p", NAN),
            ("min_p", -0.5),
            ("min_p", 2.0),
            ("repetition_penalty", 0.0),
            ("repetition_penalty", NAN),
            ("presence_penalty", 2.5),
            ("frequency_penalty", -2.5),
            ("stop", ["a", "b", "c", "d", "e"]),
            ("stop", [""]),
        )
    ),
    Case("negative top_k", "INVALID_SAMPLING", rest=prompt(top_k=-1), field="top_k"),
    Case("seed beyond 64 bits", "INVALID_SAMPLING", rest=prompt(seed=2**70), field="seed"),
    Case(
        "unknown model",
        "UNKNOWN_MODEL",
        pb.GenerateRequest(model="gpt", prompt="hello"),
        prompt(model="gpt"),
        NOT_FOUND,
        field="model",
    ),
    Case(
        "model name that is a path",
        "UNKNOWN_MODEL",
        pb.GenerateRequest(model="../../etc/passwd", prompt="hello"),
        prompt(model="../../etc/passwd"),
        NOT_FOUND,
        field="model",
    ),
    Case("tokenize: unknown model", "UNKNOWN_MODEL", pb.TokenizeRequest(model="gpt", text="x"),
         ("/v1/tokenize", {"model": "gpt", "text": "x"}), NOT_FOUND, field="model"),
    Case("get: unknown model", "UNKNOWN_MODEL", pb.GetModelRequest(model="gpt"),
         ("/v1/models/gpt", None), NOT_FOUND, field="model"),
    Case(
        "detokenize: id outside the vocabulary",
        "INVALID_PROMPT",
        pb.DetokenizeRequest(token_ids=[65, 100_000]),
        ("/v1/detokenize", {"token_ids": [65, 100_000]}),
        field="token_ids",
    ),
    Case("detokenize: negative id", "INVALID_PROMPT", rest=("/v1/detokenize", {"token_ids": [-3]})),
    Case("detokenize: unknown model", "UNKNOWN_MODEL", pb.DetokenizeRequest(model="gpt"),
         ("/v1/detokenize", {"model": "gpt", "token_ids": []}), NOT_FOUND, field="model"),
    Case("unknown field", "UNKNOWN_FIELD", rest=prompt(max_tokenz=3), field="max_tokenz"),
    Case(
        "unknown field in a message",
        "UNKNOWN_FIELD",
        rest=(CHAT, {"messages": [{"role": "user", "content": "x", "mood": "good"}]}),
        field="messages[0].mood",
    ),
    Case("misspelt stream option", "UNKNOWN_FIELD",
         rest=prompt(stream=True, stream_options={"include_usages": True}),
         field="stream_options.include_usages"),
    Case("stream options without a stream", "MALFORMED_REQUEST",
         rest=prompt(stream_options={"include_usage": True}), field="stream_options"),
    Case("text for a number", "MALFORMED_REQUEST", rest=prompt(max_tokens="7"), field="max_tokens"),
    Case("true for a number", "MALFORMED_REQUEST", rest=prompt(max_tokens=True)),
    Case("a fraction of a token", "MALFORMED_REQUEST", rest=prompt(max_tokens=1.5)),
    Case("number for a prompt", "MALFORMED_REQUEST", rest=prompt(prompt=7), field="prompt"),
    Case("no messages field", "MALFORMED_REQUEST", rest=(CHAT, {}), field="messages"),
    Case("message without content", "MALFORMED_REQUEST",
         rest=(CHAT, {"messages": [{"role": "user"}]}), field="messages[0].content"),
    Case("both token limits", "MALFORMED_REQUEST",
         rest=(CHAT, {"messages": HELLO, "max_tokens": 1, "max_completion_tokens": 2})),
    *(
        Case(f"a chat's {field}", "INVALID_SAMPLING",
             rest=(CHAT, {"messages": HELLO, "logprobs": True, field: value}), field=field)
        for field, value in (("top_logprobs", 21), ("max_completion_tokens", 0), ("max_tokens", 0))
    ),
    Case("malformed JSON", "MALFORMED_REQUEST", rest=(COMPLETIONS, b'{"prompt": "hel')),
    Case(
        "a picture in a message",
        "MALFORMED_REQUEST",
        rest=(CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
        field="messages[0].content[0].type",
    ),
    Case("no JSON object", "MALFORMED_REQUEST", rest=(COMPLETIONS, b"[1, 2]")),
    Case("empty body", "MALFORMED_REQUEST", rest=(COMPLETIONS, b"")),
    *(
        Case(f"half a character in {field}", reason, rest=(path, body), field=field)
        for reason, path, body, field in (
            ("MALFORMED_REQUEST", COMPLETIONS, b'{"prompt": "\\ud800"}', "prompt"),
            ("MALFORMED_REQUEST", COMPLETIONS, b'{"prompt": "x", "stop": ["\\ud800"]}', "stop[0]"),
            ("MALFORMED_REQUEST", "/v1/tokenize", b'{"text": "\\udfff"}', "text"),
            (
                "MALFORMED_REQUEST",
                CHAT,
                b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
                "messages[0].content",
            ),
            ("MALFORMED_REQUEST", COMPLETIONS, b'{"prompt": "x", "\\ud800": 1}', None),
        )
    ),
    Case("absurdly deep JSON", "MALFORMED_REQUEST", rest=(COMPLETIONS, b"[" * 100_000)),
    Case(
        "a number of ten thousand digits",
        "MALFORMED_REQUEST",
        rest=(COMPLETIONS, b'{"prompt": "x", "seed": ' + b"7" * 10_000 + b"}"),
    ),
    *(
        Case(f"unsupported {name}", "UNSUPPORTED_FIELD", rest=prompt(**{name: value}), field=name)
        for name, value in (
            ("n", 2), ("best_of", 3), ("echo", True), ("suffix", "."), ("prompt", ["one", "two"]),
        )
    ),
    *(
        Case(
            f"unsupported chat {name}",
            "UNSUPPORTED_FIELD",
            rest=(CHAT, {"messages": HELLO, name: value}),
            field=name,
        )
        for name, value in (
            ("n", 2), ("response_format", {"type": "json_object"}),
            ("tools", [{"type": "function", "function": {"name": "f"}}]), ("store", True),
            ("reasoning_effort", "low"), ("functions", [{"name": "f"}]),
        )
    ),
]  # fmt: skip

METHODS = {
    pb.GenerateRequest: "Generate",
    pb.TokenizeRequest: "Tokenize",
    pb.DetokenizeRequest: "Detokenize",
    pb.GetModelRequest: "GetModel",
}


async def read(call: Any, is_stream: bool) -> None:
    """Wait for the end of a call."""
    if not is_stream:
        await call
        return
    async for _ in call:
        pass


async def refusal(stub: GenerationServiceAsyncStub, request: Any) -> grpc.aio.AioRpcError:
    """The error that a call ends with."""
    call = getattr(stub, METHODS[type(request)])(request)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await read(call, isinstance(request, pb.GenerateRequest))
    return caught.value


async def raw_refusal(target: str, request: bytes) -> grpc.aio.AioRpcError:
    """The same for bytes that no stub would send."""
    async with grpc.aio.insecure_channel(target) as channel:
        generate: Any = channel.unary_stream(GENERATE, request_serializer=bytes)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await read(generate(request), True)
    return caught.value


async def post(client: httpx.AsyncClient, path: str, body: Any) -> httpx.Response:
    if body is None:
        return await client.get(path)
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return await client.post(path, content=content, headers={"content-type": "application/json"})


async def still_serves(client: httpx.AsyncClient) -> bool:
    body = {"prompt": "x", "max_tokens": 3, "temperature": 0}
    answer = await client.post(COMPLETIONS, json=body)
    return bool(answer.json()["choices"][0]["text"] == ANSWER[:3])


def ids(case: Case) -> str:
    return case.name


@pytest.mark.parametrize("case", [case for case in CASES if case.rpc is not None], ids=ids)
async def test_grpc_refuses(
    case: Case, fast: LlmServer, stub: GenerationServiceAsyncStub, http: httpx.AsyncClient
) -> None:
    if isinstance(case.rpc, bytes):
        error = await raw_refusal(fast.grpc_address, case.rpc)
    else:
        error = await refusal(stub, case.rpc)
    failure = grpc_failure(error)
    assert (failure.code, failure.reason) == (case.code.name, case.reason), failure
    assert failure.message
    assert failure.request_id
    if case.field is not None:
        assert failure.field.endswith(case.field)
    assert await still_serves(http)


@pytest.mark.parametrize("case", [case for case in CASES if case.rest is not None], ids=ids)
async def test_http_refuses(case: Case, http: httpx.AsyncClient) -> None:
    assert case.rest is not None
    response = await post(http, *case.rest)
    error = response.json()["error"]
    assert (response.status_code, error["reason"]) == (HTTP_STATUS[case.code], case.reason), error
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    assert error["request_id"] == response.headers["x-request-id"]
    if case.field is not None:
        assert error["param"] == case.field
    assert await still_serves(http)


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.rpc is not None and case.rest is not None], ids=ids
)
async def test_both_protocols_say_the_same(
    case: Case, fast: LlmServer, stub: GenerationServiceAsyncStub, http: httpx.AsyncClient
) -> None:
    assert case.rest is not None
    is_raw = isinstance(case.rpc, bytes)
    error = (
        await raw_refusal(fast.grpc_address, case.rpc) if is_raw else await refusal(stub, case.rpc)
    )
    response = await post(http, *case.rest)
    body = response.json()["error"]
    assert response.status_code == HTTP_STATUS[error.code()]
    assert body["reason"] == grpc_failure(error).reason


async def test_values_at_the_edges_are_accepted(http: httpx.AsyncClient) -> None:
    body = {
        "model": "fast", "prompt": "x", "max_tokens": CONTEXT_LENGTH, "temperature": 0, "top_p": 1,
        "presence_penalty": -2, "frequency_penalty": 2, "seed": 2**64 - 1, "top_k": 0, "min_p": 1,
        "stop": ["größer"], "n": 1, "best_of": 1, "echo": False, "logit_bias": {}, "suffix": None,
        "user": "somebody", "stream": False, "ignore_eos": True,
    }  # fmt: skip
    answer = await http.post(COMPLETIONS, json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["finish_reason"] == "stop"


async def test_a_body_above_the_limit_is_refused_unread(http: httpx.AsyncClient) -> None:
    response = await http.post(COMPLETIONS, content=b"x" * (17 * 1024 * 1024))
    assert response.status_code == 413
    assert response.json()["error"]["reason"] == "PAYLOAD_TOO_LARGE"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v1/nothing", 404), ("GET", COMPLETIONS, 405), ("DELETE", "/v1/models", 405)],
)
async def test_unknown_routes_answer_in_the_same_shape(
    method: str, path: str, status: int, http: httpx.AsyncClient
) -> None:
    response = await http.request(method, path)
    assert response.status_code == status
    assert response.json()["error"]["type"] == "invalid_request_error"


async def test_a_conversation_needs_a_chat_template(tmp_path: Path) -> None:
    async with (
        embedded_llmd(tmp_path / "plain") as url,
        httpx.AsyncClient(base_url=url) as client,
    ):
        response = await client.post(CHAT, json={"messages": HELLO})
        assert response.status_code == 400
        assert response.json()["error"]["reason"] == "NO_CHAT_TEMPLATE"
        assert await still_serves(client)
