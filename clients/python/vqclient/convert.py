"""Between protobuf messages and the values of vqclient.types. Nothing else sees both.

A value that does not fit its protobuf field (a negative max_tokens) is the caller's mistake and
raises InvalidArgumentError here, before anything is sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from types import MappingProxyType
from typing import TypeVar

from grpc import StatusCode

from vqclient.errors import InternalError, InvalidArgumentError, frame_error
from vqclient.types import (
    Artifact,
    Codebook,
    Coding,
    Decoded,
    Encoded,
    EntropyMode,
    FinishReason,
    Frame,
    FrameResult,
    FrameType,
    ImageFormat,
    Label,
    LanguageModel,
    Message,
    Operation,
    Recognized,
    Sampling,
    StreamOptions,
    TextPiece,
    TokenizerModel,
    Usage,
)
from vqstack.generation.v1 import generation_pb2
from vqstack.tokenizer.v1 import tokenizer_pb2

T = TypeVar("T")

_FORMATS = {
    ImageFormat.PNG: tokenizer_pb2.IMAGE_FORMAT_PNG,
    ImageFormat.JPEG: tokenizer_pb2.IMAGE_FORMAT_JPEG,
    ImageFormat.WEBP: tokenizer_pb2.IMAGE_FORMAT_WEBP,
}
_FORMATS_BACK = {number: name for name, number in _FORMATS.items()} | {
    tokenizer_pb2.IMAGE_FORMAT_UNSPECIFIED: ImageFormat.PNG  # The contract's default.
}
_OPERATIONS = {
    Operation.ENCODE: tokenizer_pb2.STREAM_OPERATION_ENCODE,
    Operation.DECODE: tokenizer_pb2.STREAM_OPERATION_DECODE,
    Operation.RECOGNIZE: tokenizer_pb2.STREAM_OPERATION_RECOGNIZE,
}
_ENTROPIES = {
    EntropyMode.AUTO: tokenizer_pb2.ENTROPY_MODE_UNSPECIFIED,
    EntropyMode.RAW: tokenizer_pb2.ENTROPY_MODE_RAW,
    EntropyMode.RANS: tokenizer_pb2.ENTROPY_MODE_RANS,
}
_FRAME_TYPES = {
    tokenizer_pb2.FRAME_TYPE_KEY: FrameType.KEY,
    tokenizer_pb2.FRAME_TYPE_DELTA: FrameType.DELTA,
}
_KINDS = {tokenizer_pb2.MODEL_KIND_FRAME: "frame", tokenizer_pb2.MODEL_KIND_CROP: "crop"}
_FINISH_REASONS = {
    generation_pb2.FINISH_REASON_STOP: FinishReason.STOP,
    generation_pb2.FINISH_REASON_LENGTH: FinishReason.LENGTH,
    generation_pb2.FINISH_REASON_ABORT: FinishReason.ABORT,
}


def build(make: Callable[[], T]) -> T:
    """Build a request message; values its fields cannot hold become InvalidArgumentError."""
    try:
        return make()
    except (ValueError, TypeError) as error:
        raise InvalidArgumentError(
            f"the request cannot be written: {error}",
            code=StatusCode.INVALID_ARGUMENT,
            reason="INVALID_REQUEST",
        ) from error


def format_number(image_format: ImageFormat) -> tokenizer_pb2.ImageFormat.ValueType:
    return _FORMATS[image_format]


def coding_options(coding: Coding) -> tokenizer_pb2.CodingOptions:
    return tokenizer_pb2.CodingOptions(
        entropy=_ENTROPIES[coding.entropy],
        tile_side=coding.tile_side,
        rate_weight=coding.rate_weight,
    )


def encoded(reply: tokenizer_pb2.EncodeResponse) -> Encoded:
    return Encoded(
        codes=reply.codes,
        model=reply.model,
        width=reply.width,
        height=reply.height,
        bpp=reply.bpp,
        source_bytes=reply.source_bytes,
        timings=_timings(reply.timings),
        frame_type=_FRAME_TYPES.get(reply.frame_type),
        base_bytes=reply.base_bytes,
    )


def decoded(reply: tokenizer_pb2.DecodeResponse) -> Decoded:
    return Decoded(
        image=reply.image,
        format=_image_format(reply.format),
        model=reply.model,
        width=reply.width,
        height=reply.height,
        timings=_timings(reply.timings),
        complete=reply.complete,
    )


def recognize_request(
    image: bytes, codes: bytes, model: str, top_k: int, allow_partial: bool
) -> tokenizer_pb2.RecognizeRequest:
    request = tokenizer_pb2.RecognizeRequest(model=model, top_k=top_k, allow_partial=allow_partial)
    if codes:
        request.codes = codes
    else:
        request.image = image
    return request


def recognized(reply: tokenizer_pb2.RecognizeResponse) -> Recognized:
    return Recognized(
        labels=_labels(reply.labels),
        model=reply.model,
        coded_bytes=reply.coded_bytes,
        timings=_timings(reply.timings),
        complete=reply.complete,
    )


def tokenizer_model(info: tokenizer_pb2.ModelInfo) -> TokenizerModel:
    return TokenizerModel(
        name=info.name,
        model_hash=info.model_hash,
        kind=_KINDS.get(info.kind, "unknown"),
        stride=info.stride,
        code_dim=info.code_dim,
        num_codes=info.num_codes,
        max_support=info.max_support,
        denominator=info.denominator,
        bits_per_latent=info.bits_per_latent,
        classes=tuple(info.classes),
        max_width=info.max_width,
        max_height=info.max_height,
        codebook_exponent=info.codebook_exponent,
        has_entropy_tables=info.has_entropy_tables,
    )


def codebook(reply: tokenizer_pb2.GetModelResponse) -> Codebook:
    return Codebook(
        model=tokenizer_model(reply.model),
        data=reply.codebook,
        artifacts=tuple(artifact(file) for file in reply.artifacts),
    )


def artifact(file: tokenizer_pb2.Artifact) -> Artifact:
    return Artifact(
        name=file.name,
        media_type=file.media_type,
        size_bytes=file.size_bytes,
        sha256=file.sha256,
        data=file.data,
    )


def stream_config(
    model: str, operation: Operation, options: StreamOptions
) -> tokenizer_pb2.StreamFramesRequest:
    config = tokenizer_pb2.StreamConfig(
        model=model,
        operation=_OPERATIONS[operation],
        format=_FORMATS[options.format],
        top_k=options.top_k,
        max_age_ms=options.max_age_ms,
        model_hash=options.model_hash,
        coding=coding_options(options.coding),
        keyframe_interval=options.keyframe_interval or 0,
        allow_partial=options.allow_partial,
    )
    return tokenizer_pb2.StreamFramesRequest(config=config)


def stream_frame(frame: Frame) -> tokenizer_pb2.StreamFramesRequest:
    message = tokenizer_pb2.StreamFrame(
        seq=frame.seq, capture_ns=frame.capture_ns, request_keyframe=frame.request_keyframe
    )
    if frame.codes:
        message.codes = frame.codes
    else:
        message.image = frame.image
    return tokenizer_pb2.StreamFramesRequest(frame=message)


def frame_result(result: tokenizer_pb2.FrameResult) -> FrameResult:
    error = None
    if result.HasField("error"):
        error = frame_error(result.error.code, result.error.reason, result.error.message)
    return FrameResult(
        seq=result.seq,
        capture_ns=result.capture_ns,
        codes=result.codes,
        image=result.image,
        labels=_labels(result.labels),
        bpp=result.bpp,
        timings=_timings(result.timings),
        error=error,
        dropped_before=result.dropped_before,
        frame_type=_FRAME_TYPES.get(result.frame_type),
        keyframe_needed=result.keyframe_needed,
        complete=result.complete,
        base_bytes=result.base_bytes,
    )


def prompt_request(
    prompt: str | Sequence[int], model: str, sampling: Sampling
) -> generation_pb2.GenerateRequest:
    """A request to continue text (str) or tokens (integers)."""
    params = _sampling(sampling)
    if isinstance(prompt, str):
        return generation_pb2.GenerateRequest(model=model, prompt=prompt, sampling=params)
    tokens = generation_pb2.TokenIds(ids=prompt)
    return generation_pb2.GenerateRequest(model=model, tokens=tokens, sampling=params)


def chat_request(
    messages: str | Sequence[Message], model: str, sampling: Sampling
) -> generation_pb2.GenerateRequest:
    """A request to answer a conversation; a string is a single user turn."""
    turns = [Message("user", messages)] if isinstance(messages, str) else messages
    chat = generation_pb2.ChatMessages(
        messages=[
            generation_pb2.ChatMessage(role=turn.role, content=turn.content) for turn in turns
        ]
    )
    return generation_pb2.GenerateRequest(model=model, chat=chat, sampling=_sampling(sampling))


def text_piece(reply: generation_pb2.GenerateResponse) -> TextPiece:
    return TextPiece(
        text=reply.text,
        token_ids=tuple(reply.token_ids),
        finish_reason=_FINISH_REASONS.get(reply.finish_reason),
        usage=_usage(reply.usage) if reply.HasField("usage") else None,
    )


def language_model(info: generation_pb2.ModelInfo) -> LanguageModel:
    return LanguageModel(
        name=info.name,
        architecture=info.architecture,
        method=info.method,
        bits=info.bits,
        bpw=info.bpw,
        group_size=info.group_size,
        model_hash=info.model_hash,
        context_length=info.context_length,
        num_parameters=info.num_parameters,
        vocab_size=info.vocab_size,
        executor=info.executor,
    )


def _image_format(number: tokenizer_pb2.ImageFormat.ValueType) -> ImageFormat:
    if number not in _FORMATS_BACK:
        raise InternalError(
            f"the service answered with image format {number}, which this client does not know; "
            "update vqclient",
            code=StatusCode.INTERNAL,
            reason="UNEXPECTED_REPLY",
        )
    return _FORMATS_BACK[number]


def _sampling(sampling: Sampling) -> generation_pb2.SamplingParams:
    return generation_pb2.SamplingParams(**asdict(sampling))


def _usage(usage: generation_pb2.Usage) -> Usage:
    return Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        time_to_first_token=usage.time_to_first_token_seconds,
        total=usage.total_seconds,
    )


def _labels(labels: Iterable[tokenizer_pb2.Label]) -> tuple[Label, ...]:
    return tuple(Label(label.name, label.score, label.class_index) for label in labels)


def _timings(timings: Iterable[tokenizer_pb2.StageTiming]) -> Mapping[str, float]:
    return MappingProxyType({timing.stage: timing.seconds for timing in timings})
