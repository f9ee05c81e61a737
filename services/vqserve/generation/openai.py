"""The HTTP routes of llmd: OpenAI's completions and chat, models, tokenize, detokenize.

Every error has OpenAI's shape, with our reason and the request id beside it. Knows no engine:
bodies become `GenerationRequest`s and go to the same core as gRPC.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.responses import JSONResponse, Response

from vqserve.common.errors import InvalidArgument, MalformedRequest, ServiceError, http_headers
from vqserve.generation import errors
from vqserve.generation.core import Generation, GenerationCore
from vqserve.generation.models import ServedModel
from vqserve.generation.replies import ChatReply, CompletionReply, Reply, TokenStream
from vqserve.generation.schemas import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    GenerationBody,
    TokenizeBody,
)

_ERROR_CODES = {
    "INVALID_SAMPLING": "invalid_value",
    "PROMPT_TOO_LONG": "context_length_exceeded",
    "QUEUE_FULL": "rate_limit_exceeded",
    "UNKNOWN_FIELD": "unknown_parameter",
    "UNKNOWN_MODEL": "model_not_found",
    "UNSUPPORTED_FIELD": "unsupported_parameter",
}

# How pydantic names the alternatives of a field in the location of a problem.
_UNION_MEMBERS = ("str", "int", "bool", "float")


def add_routes(app: FastAPI, core: GenerationCore, heartbeat_seconds: float = 15.0) -> None:
    """Add every /v1 route to an app made by `vqserve.common.asgi.build_http`.

    A stream that has nothing to say for `heartbeat_seconds` sends a comment, so that proxies
    keep its connection open.
    """
    app.add_exception_handler(RequestValidationError, _raise_invalid_body)
    _add_generation(app, core, heartbeat_seconds)
    _add_models(app, core)
    _add_tokens(app, core)


def render_error(error: ServiceError, request_id: str) -> Response:
    """A failure in OpenAI's shape, with the HTTP status of its google.rpc.Code."""
    return JSONResponse(
        error_body(error, request_id), status_code=error.http_status, headers=http_headers(error)
    )


def error_body(error: ServiceError, request_id: str) -> dict[str, Any]:
    """OpenAI's error object; `reason` and `request_id` are additions of ours."""
    parameter = _parameter(error.field)
    return {
        "error": {
            "message": _encodable(error.message),
            "type": _error_type(error.http_status),
            "param": None if parameter is None else _encodable(parameter),
            "code": _ERROR_CODES.get(error.reason, error.reason.lower()),
            "reason": error.reason,
            "request_id": request_id,
        }
    }


def _add_generation(app: FastAPI, core: GenerationCore, heartbeat_seconds: float) -> None:
    async def reply(body: GenerationBody, generation: Generation, shape: type[Reply]) -> Response:
        answer = shape(generation)
        if body.stream:
            return TokenStream(answer, error_body, body.includes_usage, heartbeat_seconds)
        return JSONResponse(await answer.collect())

    @app.post("/v1/completions", tags=["generation"])
    async def completions(body: CompletionBody) -> Response:
        """Continue a prompt; with `stream` as server-sent events."""
        return await reply(body, await core.start(body.request()), CompletionReply)

    @app.post("/v1/chat/completions", tags=["generation"])
    async def chat_completions(body: ChatBody) -> Response:
        """Answer a conversation; with `stream` as server-sent events."""
        return await reply(body, await core.start(body.request()), ChatReply)


def _add_models(app: FastAPI, core: GenerationCore) -> None:
    @app.get("/v1/models", tags=["models"])
    async def list_models() -> dict[str, Any]:
        """The loaded models."""
        return {"object": "list", "data": [_describe(model) for model in core.models]}

    @app.get("/v1/models/{model}", tags=["models"])
    async def get_model(model: str) -> dict[str, Any]:
        """One loaded model."""
        return _describe(core.models.get(model))


def _add_tokens(app: FastAPI, core: GenerationCore) -> None:
    @app.post("/v1/tokenize", tags=["tokens"])
    async def tokenize(body: TokenizeBody) -> dict[str, list[int]]:
        """Token ids of a text."""
        return {"token_ids": await core.tokenize(body.model, body.text)}

    @app.post("/v1/detokenize", tags=["tokens"])
    async def detokenize(body: DetokenizeBody) -> dict[str, str]:
        """Text of token ids."""
        return {"text": await core.detokenize(body.model, body.token_ids)}


def _describe(model: ServedModel) -> dict[str, Any]:
    """OpenAI's model object; everything after `owned_by` is an addition of ours."""
    info = model.info
    return {
        "id": model.name,
        "object": "model",
        "created": model.loaded_at,
        "owned_by": "vqstack",
        "architecture": model.architecture,
        "quantization": {
            "method": info.method,
            "bits": info.bits,
            "bpw": info.bpw,
            "group_size": info.group_size,
        },
        "model_hash": info.revision,
        "context_length": model.context_length,
        "num_parameters": info.num_parameters,
        "vocab_size": model.vocab_size,
        "executor": model.executor,
    }


async def _raise_invalid_body(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    # Of the alternatives that a field has, the one that got furthest is what the client meant.
    raise _invalid_body(max(error.errors(), key=lambda problem: len(problem["loc"])))


def _invalid_body(problem: dict[str, Any]) -> InvalidArgument:
    """A problem that pydantic found, as one of our errors."""
    kind, context = problem["type"], problem.get("ctx", {})
    field = context.get("param") or _path(problem["loc"])
    if kind == "unsupported_parameter":
        return errors.UnsupportedField(problem["msg"], field=field)
    if kind == "extra_forbidden":
        return errors.UnknownField(f"unknown field {field[:80]!r}; remove it", field=field[:80])
    if kind == "json_invalid":
        return MalformedRequest(f"the body is not JSON: {context.get('error', '')}")
    if not field:
        return MalformedRequest(
            "the body is not a JSON object; send one with content-type: application/json"
        )
    return MalformedRequest(f"{field}: {problem['msg']}", field=field)


def _path(location: tuple[int | str, ...]) -> str:
    """`messages[0].role` from pydantic's location, without the union members it tried."""
    path = ""
    for part in location[1:]:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part not in _UNION_MEMBERS and not part.startswith(("list[", "function-")):
            path += f".{part}" if path else part
    return path


def _error_type(http_status: int) -> str:
    if http_status == 429:
        return "rate_limit_error"
    return "invalid_request_error" if http_status < 500 else "server_error"


def _parameter(field: str | None) -> str | None:
    """The name that an OpenAI client knows the field by."""
    if field == "tokens.ids":
        return "prompt"
    return None if field is None else field.removeprefix("sampling.").removeprefix("chat.")


def _encodable(text: str) -> str:
    """A client may name fields that UTF-8 cannot express; the answer must still be sent."""
    return text.encode("utf-8", errors="backslashreplace").decode()
