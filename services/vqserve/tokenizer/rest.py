"""The HTTP face of tokenizerd: raw bytes in and out, JSON on request, and the WebSocket.

Every handler builds the same request message that gRPC carries and calls the same core.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request, WebSocket
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import DecodeError, Message
from starlette.responses import JSONResponse, Response
from starlette.websockets import WebSocketDisconnect

from scq.bitstream.frame import EntropyChoice
from vqserve.common.asgi import WS_INTERNAL_ERROR, WS_TRY_AGAIN_LATER
from vqserve.common.errors import InvalidArgument, ServiceError
from vqserve.tokenizer import convert
from vqserve.tokenizer.convert import MAX_TILE_SIDE
from vqserve.tokenizer.core import MAX_TOP_K, TokenizerCore
from vqserve.tokenizer.errors import InvalidStream
from vqserve.tokenizer.pictures import MEDIA_TYPES, ImageFormat
from vqserve.tokenizer.streams import FrameStreams
from vqstack.tokenizer.v1 import tokenizer_pb2

CODES_MEDIA_TYPE = "application/octet-stream"
JSON_MEDIA_TYPE = "application/json"
WS_POLICY_VIOLATION = 1008
# A close frame has room for 123 bytes of reason.
MAX_CLOSE_REASON = 123

ModelQuery = Annotated[str, Query(description="Model name, for example nav")]
FormatQuery = Annotated[ImageFormat, Query(description="File format of the picture")]
TopKQuery = Annotated[int, Query(ge=0, le=MAX_TOP_K, description="Labels wanted; 5 when 0")]
EntropyQuery = Annotated[EntropyChoice, Query(description="Entropy coder; auto takes the smaller")]
TileQuery = Annotated[
    int, Query(ge=0, le=MAX_TILE_SIDE, description="Side of a tile in latents; 0 for one tile")
]
RateQuery = Annotated[float, Query(description="Squared latent error that one bit is worth")]
PartialQuery = Annotated[bool, Query(description="Read a truncated frame's base layer")]
ArtifactsQuery = Annotated[list[str] | None, Query(description="Files wanted in the answer")]


def add_routes(app: FastAPI, core: TokenizerCore, streams: FrameStreams) -> None:
    """Add tokenizerd's routes to an app made by `vqserve.common.asgi.build_http`."""
    _add_encode(app, core)
    _add_decode(app, core)
    _add_recognize(app, core)
    _add_models(app, core)
    _add_stream(app, streams)


def _add_encode(app: FastAPI, core: TokenizerCore) -> None:
    @app.post("/v1/encode", tags=["frames"], openapi_extra=_body(*MEDIA_TYPES.values()))
    async def encode(
        request: Request,
        model: ModelQuery = "",
        entropy: EntropyQuery = "auto",
        tile_side: TileQuery = 0,
        rate_weight: RateQuery = 0.0,
    ) -> Response:
        """Image file (JPEG, PNG or WebP) to SCQ1 codes; JSON with base64 when accepted."""
        coding = tokenizer_pb2.CodingOptions(
            entropy=convert.entropy_number(entropy), tile_side=tile_side, rate_weight=rate_weight
        )
        message = tokenizer_pb2.EncodeRequest(
            model=model, image=await _file(request), coding=coding
        )
        reply = await core.encode(message, "rest")
        if JSON_MEDIA_TYPE in request.headers.get("accept", ""):
            return _json(reply)
        headers = {
            "x-vqstack-model": reply.model,
            "x-vqstack-bpp": f"{reply.bpp:.6f}",
            "x-vqstack-width": str(reply.width),
            "x-vqstack-height": str(reply.height),
            "x-vqstack-source-bytes": str(reply.source_bytes),
            "x-vqstack-base-bytes": str(reply.base_bytes),
            "server-timing": _server_timing(reply.timings),
        }
        return Response(reply.codes, media_type=CODES_MEDIA_TYPE, headers=headers)


def _add_decode(app: FastAPI, core: TokenizerCore) -> None:
    @app.post("/v1/decode", tags=["frames"], openapi_extra=_body(CODES_MEDIA_TYPE))
    async def decode(
        request: Request, format: FormatQuery = "png", allow_partial: PartialQuery = False
    ) -> Response:
        """SCQ1 codes to an image file of the original's size."""
        message = tokenizer_pb2.DecodeRequest(
            codes=await _file(request),
            format=convert.image_format_number(format),
            allow_partial=allow_partial,
        )
        reply = await core.decode(message, "rest")
        if JSON_MEDIA_TYPE in request.headers.get("accept", ""):
            return _json(reply)
        headers = {
            "x-vqstack-model": reply.model,
            "x-vqstack-width": str(reply.width),
            "x-vqstack-height": str(reply.height),
            "x-vqstack-complete": str(reply.complete).lower(),
            "server-timing": _server_timing(reply.timings),
        }
        return Response(reply.image, media_type=MEDIA_TYPES[format], headers=headers)


def _add_recognize(app: FastAPI, core: TokenizerCore) -> None:
    body = _body(CODES_MEDIA_TYPE, *MEDIA_TYPES.values())

    @app.post("/v1/recognize", tags=["frames"], openapi_extra=body)
    async def recognize(
        request: Request,
        model: ModelQuery = "",
        top_k: TopKQuery = 0,
        allow_partial: PartialQuery = False,
    ) -> JSONResponse:
        """Labels of an image (content type image/*) or of codes (application/octet-stream)."""
        message = tokenizer_pb2.RecognizeRequest(
            model=model, top_k=top_k, allow_partial=allow_partial
        )
        content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if content_type.startswith("image/"):
            message.image = await request.body()
        elif content_type == CODES_MEDIA_TYPE:
            message.codes = await request.body()
        else:
            raise InvalidArgument(
                f"content-type is {content_type[:100]!r}; say image/jpeg, image/png or image/webp "
                f"for a picture and {CODES_MEDIA_TYPE} for codes",
                field="content-type",
            )
        return _json(await core.recognize(message, "rest"))


def _add_models(app: FastAPI, core: TokenizerCore) -> None:
    @app.get("/v1/models", tags=["models"])
    async def list_models() -> JSONResponse:
        """Every loaded model."""
        return _json(core.list_models())

    @app.get("/v1/models/{model}", tags=["models"])
    async def get_model(model: str, artifacts: ArtifactsQuery = None) -> JSONResponse:
        """One model with its codebook (float32, little-endian, base64) and a list of its files."""
        message = tokenizer_pb2.GetModelRequest(model=model, artifacts=artifacts or ())
        return _json(core.get_model(message))

    @app.get("/v1/models/{model}/artifacts/{name}", tags=["models"])
    async def get_artifact(request: Request, model: str, name: str) -> Response:
        """One file of a model; its SHA-256 is the ETag, and If-None-Match is heeded."""
        file = core.artifact(model, name)
        etag = f'"{file.sha256}"'
        headers = {"etag": etag, "x-vqstack-sha256": file.sha256, "cache-control": "no-cache"}
        if etag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(file.data, media_type=file.media_type, headers=headers)


def _add_stream(app: FastAPI, streams: FrameStreams) -> None:
    @app.websocket("/v1/stream")
    async def stream(socket: WebSocket) -> None:
        """StreamFrames over binary WebSocket messages, each one serialized protobuf."""
        await socket.accept()
        try:
            async with aclosing(streams.stream(_requests(socket), "ws")) as responses:
                async for response in responses:
                    await socket.send_bytes(response.SerializeToString())
            await socket.close()
        except WebSocketDisconnect:
            return
        except ServiceError as error:
            await socket.close(_close_code(error), _close_reason(error))


async def _file(request: Request) -> bytes:
    """The body, which is a file as it is; forms wrap theirs."""
    content_type = request.headers.get("content-type", "")
    if content_type.lower().startswith("multipart/"):
        raise InvalidArgument(
            f"content-type is {content_type[:100]!r}; send the file itself as the body, as in "
            "curl --data-binary @FILE",
            field="content-type",
        )
    return await request.body()


async def _requests(socket: WebSocket) -> AsyncIterator[tokenizer_pb2.StreamFramesRequest]:
    while True:
        message = await socket.receive()
        if message["type"] == "websocket.disconnect":
            return
        payload = message.get("bytes")
        if payload is None:
            raise InvalidStream("stream messages are binary; send serialized StreamFramesRequest")
        yield _parsed(payload)


def _parsed(payload: bytes) -> tokenizer_pb2.StreamFramesRequest:
    try:
        return tokenizer_pb2.StreamFramesRequest.FromString(payload)
    except DecodeError as error:
        raise InvalidStream(f"not a StreamFramesRequest: {error}") from error


def _close_code(error: ServiceError) -> int:
    if error.http_status in (429, 503):
        return WS_TRY_AGAIN_LATER
    return WS_POLICY_VIOLATION if error.http_status < 500 else WS_INTERNAL_ERROR


def _close_reason(error: ServiceError) -> str:
    text = f"{error.reason}: {error.message}".encode()[:MAX_CLOSE_REASON]
    return text.decode(errors="ignore")


def _json(message: Message) -> JSONResponse:
    fields = MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return JSONResponse(fields)


def _server_timing(timings: Iterable[tokenizer_pb2.StageTiming]) -> str:
    return ", ".join(f"{timing.stage};dur={timing.seconds * 1000:.3f}" for timing in timings)


def _body(*media_types: str) -> dict[str, Any]:
    """OpenAPI of a raw request body, which FastAPI cannot see in the handler's signature."""
    schema = {"schema": {"type": "string", "format": "binary"}}
    return {"requestBody": {"required": True, "content": dict.fromkeys(media_types, schema)}}
