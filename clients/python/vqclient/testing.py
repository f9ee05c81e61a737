"""In-process fakes of both services, for tests of programs that use this client.

They keep to the contract (order, echoes, error details) and know neither images nor models:
"codes" are a header and a digest, "pictures" are the bytes that were encoded, and text comes
back word by word. `failures` holds statuses that the next calls are refused with.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2
from grpc import StatusCode
from grpc_status import rpc_status

from vqstack.generation.v1 import generation_pb2, generation_pb2_grpc
from vqstack.tokenizer.v1 import tokenizer_pb2, tokenizer_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]

FAKE_WIDTH, FAKE_HEIGHT = 64, 48
# Key and delta frames of a 64x48 picture; their checks do not hold.
_KEY_HEADER = b"\x53\x20" + b"\xab" * 4 + bytes(4) + bytes([FAKE_WIDTH, FAKE_HEIGHT])
_DELTA_HEADER = b"\x53\x23" + b"\xab" * 4 + bytes(8)
_ARTIFACTS = {"codebook.bin": bytes(256 * 16 * 2), "encoder.onnx": b"graph" * 200_000}


def refusal(
    code: StatusCode,
    message: str,
    *,
    reason: str,
    field_name: str = "",
    retry_after: float | None = None,
    request_id: str = "fake-request",
) -> status_pb2.Status:
    """A google.rpc.Status with the details that the services send."""
    status = status_pb2.Status(code=code.value[0], message=message)
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason=reason, domain="vqstack"))
    status.details.add().Pack(error_details_pb2.RequestInfo(request_id=request_id))
    if field_name:
        violation = error_details_pb2.BadRequest.FieldViolation(field=field_name)
        status.details.add().Pack(error_details_pb2.BadRequest(field_violations=[violation]))
    if retry_after is not None:
        delay = Duration()
        delay.FromMilliseconds(round(retry_after * 1000))
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    return status


@dataclass
class FakeCalls:
    """What a fake remembers and what it is told to do; `delay` in seconds per answer."""

    delay: float = 0.0
    failures: deque[status_pb2.Status] = field(default_factory=deque)
    metadata: list[dict[str, str | bytes]] = field(default_factory=list)
    num_started: int = 0
    num_cancelled: int = 0

    async def begin(self, context: Context) -> None:
        """Note the call, wait, and refuse it when a failure is due."""
        self.num_started += 1
        self.metadata.append(dict(context.invocation_metadata() or ()))
        if self.failures:
            await context.abort_with_status(rpc_status.to_status(self.failures.popleft()))
        await asyncio.sleep(self.delay)


class FakeTokenizerService(tokenizer_pb2_grpc.TokenizerServiceServicer):
    """The model "nav" only. `bad_seqs` of a stream fail, `dropped_seqs` are never answered.

    Streams begin with a key frame; delta frames follow unless a key frame is asked for or due. A
    decode stream wants a key frame after a bad one. `configs` and `keyframe_seqs` remember what
    was asked.
    """

    def __init__(self, *, delay: float = 0.0) -> None:
        self.calls = FakeCalls(delay=delay)
        self.bad_seqs: set[int] = set()
        self.dropped_seqs: set[int] = set()
        self.max_unanswered = 0
        self.num_answered = 0
        self._num_unanswered = 0
        self.top_k = 0
        self.encodings: list[tokenizer_pb2.CodingOptions] = []
        self.configs: list[tokenizer_pb2.StreamConfig] = []
        self.keyframe_seqs: list[int] = []
        self._images: dict[bytes, bytes] = {}

    async def Encode(
        self, request: tokenizer_pb2.EncodeRequest, context: Context
    ) -> tokenizer_pb2.EncodeResponse:
        await self.calls.begin(context)
        await self._require_model(request.model, context)
        self.encodings.append(request.coding)
        codes = self._encode(request.image)
        return tokenizer_pb2.EncodeResponse(
            codes=codes,
            model="nav",
            width=FAKE_WIDTH,
            height=FAKE_HEIGHT,
            bpp=_bpp(codes),
            source_bytes=len(request.image),
            timings=[tokenizer_pb2.StageTiming(stage="encoder", seconds=0.001)],
            frame_type=tokenizer_pb2.FRAME_TYPE_KEY,
            base_bytes=len(codes) // 2,
        )

    async def Decode(
        self, request: tokenizer_pb2.DecodeRequest, context: Context
    ) -> tokenizer_pb2.DecodeResponse:
        await self.calls.begin(context)
        image = self._image_of(request.codes, request.allow_partial)
        if image is None:
            await _refuse_codes(context)
            raise AssertionError("abort_with_status returned")
        return tokenizer_pb2.DecodeResponse(
            image=image,
            complete=request.codes in self._images,
            format=request.format,
            model="nav",
            width=FAKE_WIDTH,
            height=FAKE_HEIGHT,
        )

    async def Recognize(
        self, request: tokenizer_pb2.RecognizeRequest, context: Context
    ) -> tokenizer_pb2.RecognizeResponse:
        await self.calls.begin(context)
        self.top_k = request.top_k
        if request.image:
            await self._require_model(request.model, context)
        codes = request.codes or self._encode(request.image)
        return tokenizer_pb2.RecognizeResponse(
            labels=_fake_labels(), model="nav", coded_bytes=len(codes), complete=True
        )

    async def StreamFrames(
        self, request_iterator: AsyncIterator[tokenizer_pb2.StreamFramesRequest], context: Context
    ) -> AsyncIterator[tokenizer_pb2.StreamFramesResponse]:
        config = (await anext(request_iterator)).config
        self.configs.append(config)
        await self.calls.begin(context)
        chain = _FakeChain(config.keyframe_interval or 4)
        ready = tokenizer_pb2.StreamReady(model=_fake_model(), max_payload_bytes=1 << 20)
        yield tokenizer_pb2.StreamFramesResponse(ready=ready)
        received: asyncio.Queue[tokenizer_pb2.StreamFrame | None] = asyncio.Queue()
        receiver = asyncio.create_task(self._receive(request_iterator, received))
        try:
            num_dropped = 0
            while (frame := await received.get()) is not None:
                await asyncio.sleep(self.calls.delay)
                self._num_unanswered -= 1
                if frame.seq in self.dropped_seqs:
                    num_dropped += 1
                    continue
                result = self._answer(frame, config.operation, chain)
                result.dropped_before, num_dropped = num_dropped, 0
                self.num_answered += 1
                yield tokenizer_pb2.StreamFramesResponse(result=result)
        finally:
            receiver.cancel()

    async def ListModels(
        self, request: tokenizer_pb2.ListModelsRequest, context: Context
    ) -> tokenizer_pb2.ListModelsResponse:
        await self.calls.begin(context)
        return tokenizer_pb2.ListModelsResponse(models=[_fake_model()])

    async def GetModel(
        self, request: tokenizer_pb2.GetModelRequest, context: Context
    ) -> tokenizer_pb2.GetModelResponse:
        await self.calls.begin(context)
        await self._require_model(request.model, context)
        listed = [_fake_artifact(name, with_data=name in request.artifacts) for name in _ARTIFACTS]
        return tokenizer_pb2.GetModelResponse(
            model=_fake_model(), codebook=bytes(256 * 16 * 4), artifacts=listed
        )

    async def GetModelArtifact(
        self, request: tokenizer_pb2.GetModelArtifactRequest, context: Context
    ) -> AsyncIterator[tokenizer_pb2.GetModelArtifactResponse]:
        """In chunks of 100,000 bytes; a failure that is due breaks off after the first."""
        failure = self.calls.failures.popleft() if self.calls.failures else None
        await self.calls.begin(context)
        if request.name not in _ARTIFACTS:
            status = refusal(StatusCode.NOT_FOUND, "no such artifact", reason="UNKNOWN_ARTIFACT")
            await context.abort_with_status(rpc_status.to_status(status))
        data = _ARTIFACTS[request.name]
        for start in range(request.offset, len(data), 100_000):
            yield tokenizer_pb2.GetModelArtifactResponse(
                artifact=_fake_artifact(request.name) if start == request.offset else None,
                chunk=data[start : start + 100_000],
            )
            if failure is not None:
                await context.abort_with_status(rpc_status.to_status(failure))

    def _encode(self, image: bytes, header: bytes = _KEY_HEADER) -> bytes:
        codes = header + hashlib.sha256(image).digest()[: 24 if header is _KEY_HEADER else 12]
        self._images[codes] = image
        return codes

    def _image_of(self, codes: bytes, allow_partial: bool) -> bytes | None:
        """What was encoded; a prefix finds it when partial codes are allowed."""
        if codes in self._images or not allow_partial:
            return self._images.get(codes)
        return next(
            (self._images[whole] for whole in self._images if whole.startswith(codes)), None
        )

    def _answer(
        self, frame: tokenizer_pb2.StreamFrame, operation: int, chain: _FakeChain
    ) -> tokenizer_pb2.FrameResult:
        result = tokenizer_pb2.FrameResult(seq=frame.seq, capture_ns=frame.capture_ns)
        if frame.request_keyframe:
            self.keyframe_seqs.append(frame.seq)
        if frame.seq in self.bad_seqs:
            result.error.code = StatusCode.INVALID_ARGUMENT.value[0]
            result.error.reason, result.error.message = "CORRUPT_CODES", "told to fail"
            chain.is_broken = result.keyframe_needed = bool(frame.codes)
            return result
        if frame.codes and not chain.follows(frame.codes):
            result.error.code = StatusCode.INVALID_ARGUMENT.value[0]
            result.error.reason, result.error.message = "REFERENCE_MISMATCH", "no reference"
            result.keyframe_needed = True
            return result
        result.complete = True
        result.frame_type = chain.type_of(frame)
        if operation == tokenizer_pb2.STREAM_OPERATION_DECODE:
            result.image = self._images[frame.codes]
        elif operation == tokenizer_pb2.STREAM_OPERATION_RECOGNIZE:
            result.labels.extend(_fake_labels())
        else:
            is_key = result.frame_type == tokenizer_pb2.FRAME_TYPE_KEY
            header = _KEY_HEADER if is_key else _DELTA_HEADER
            result.codes = self._encode(frame.image, header)
            result.bpp = _bpp(result.codes)
        return result

    async def _receive(
        self,
        requests: AsyncIterator[tokenizer_pb2.StreamFramesRequest],
        received: asyncio.Queue[tokenizer_pb2.StreamFrame | None],
    ) -> None:
        async for request in requests:
            self._num_unanswered += 1
            self.max_unanswered = max(self.max_unanswered, self._num_unanswered)
            received.put_nowait(request.frame)
        received.put_nowait(None)

    async def _require_model(self, name: str, context: Context) -> None:
        if name != "nav":
            status = refusal(
                StatusCode.NOT_FOUND,
                f"unknown model {name!r}; available: nav",
                reason="UNKNOWN_MODEL",
                field_name="model",
            )
            await context.abort_with_status(rpc_status.to_status(status))


class _FakeChain:
    """Which frames of one stream are key frames, and whether delta frames can be read."""

    def __init__(self, interval: int) -> None:
        self.is_broken = True
        self._interval = interval
        self._since_key = interval

    def follows(self, codes: bytes) -> bool:
        """Whether these codes can be read after what came before."""
        if codes.startswith(_KEY_HEADER):
            self.is_broken = False
        return not self.is_broken

    def type_of(self, frame: tokenizer_pb2.StreamFrame) -> tokenizer_pb2.FrameType.ValueType:
        """The type of the codes received, or of the next ones that are made."""
        if frame.codes:
            is_key = frame.codes.startswith(_KEY_HEADER)
        else:
            is_key = frame.request_keyframe or self._since_key >= self._interval
            self._since_key = 1 if is_key else self._since_key + 1
        return tokenizer_pb2.FRAME_TYPE_KEY if is_key else tokenizer_pb2.FRAME_TYPE_DELTA


class FakeGenerationService(generation_pb2_grpc.GenerationServiceServicer):
    """Answers with `words`, one token a word, at most max_tokens of them."""

    def __init__(
        self, words: Sequence[str] = ("one ", "two ", "three"), delay: float = 0.0
    ) -> None:
        self.calls = FakeCalls(delay=delay)
        self.words = tuple(words)
        self.requests: list[generation_pb2.GenerateRequest] = []

    async def Generate(
        self, request: generation_pb2.GenerateRequest, context: Context
    ) -> AsyncIterator[generation_pb2.GenerateResponse]:
        await self.calls.begin(context)
        self.requests.append(request)
        limit = request.sampling.max_tokens or len(self.words)
        try:
            for token_id, word in enumerate(self.words[:limit]):
                yield generation_pb2.GenerateResponse(text=word, token_ids=[token_id])
                await asyncio.sleep(self.calls.delay)
        except (asyncio.CancelledError, GeneratorExit):
            self.calls.num_cancelled += 1
            raise
        yield _last_response(min(limit, len(self.words)), limit < len(self.words))

    async def Tokenize(
        self, request: generation_pb2.TokenizeRequest, context: Context
    ) -> generation_pb2.TokenizeResponse:
        await self.calls.begin(context)
        return generation_pb2.TokenizeResponse(token_ids=request.text.encode())

    async def Detokenize(
        self, request: generation_pb2.DetokenizeRequest, context: Context
    ) -> generation_pb2.DetokenizeResponse:
        await self.calls.begin(context)
        return generation_pb2.DetokenizeResponse(text=bytes(request.token_ids).decode())

    async def ListModels(
        self, request: generation_pb2.ListModelsRequest, context: Context
    ) -> generation_pb2.ListModelsResponse:
        await self.calls.begin(context)
        return generation_pb2.ListModelsResponse(models=[_fake_language_model()])

    async def GetModel(
        self, request: generation_pb2.GetModelRequest, context: Context
    ) -> generation_pb2.GetModelResponse:
        await self.calls.begin(context)
        return generation_pb2.GetModelResponse(model=_fake_language_model())


@asynccontextmanager
async def serve(
    tokenizer: FakeTokenizerService | None = None,
    generation: FakeGenerationService | None = None,
) -> AsyncIterator[str]:
    """Serve the fakes on a free loopback port; gives the address."""
    server = grpc.aio.server()
    if tokenizer is not None:
        tokenizer_pb2_grpc.add_TokenizerServiceServicer_to_server(tokenizer, server)
    if generation is not None:
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(generation, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


async def _refuse_codes(context: Context) -> None:
    status = refusal(
        StatusCode.INVALID_ARGUMENT, "checksum mismatch", reason="CORRUPT_CODES", field_name="codes"
    )
    await context.abort_with_status(rpc_status.to_status(status))


def _bpp(codes: bytes) -> float:
    return 8 * len(codes) / (FAKE_WIDTH * FAKE_HEIGHT)


def _fake_labels() -> list[tokenizer_pb2.Label]:
    return [
        tokenizer_pb2.Label(name="bibimbap", score=0.75, class_index=2),
        tokenizer_pb2.Label(name="pizza", score=0.25, class_index=7),
    ]


def _fake_artifact(name: str, *, with_data: bool = False) -> tokenizer_pb2.Artifact:
    data = _ARTIFACTS[name]
    return tokenizer_pb2.Artifact(
        name=name,
        media_type="application/octet-stream",
        size_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        data=data if with_data else b"",
    )


def _fake_model() -> tokenizer_pb2.ModelInfo:
    return tokenizer_pb2.ModelInfo(
        name="nav",
        model_hash="ab" * 32,
        kind=tokenizer_pb2.MODEL_KIND_FRAME,
        stride=16,
        code_dim=16,
        num_codes=256,
        max_support=2,
        denominator=4,
        bits_per_latent=16.5,
    )


def _fake_language_model() -> generation_pb2.ModelInfo:
    return generation_pb2.ModelInfo(
        name="fake", architecture="llama", method="gptq", bits=4, bpw=4.25, executor="native"
    )


def _last_response(num_tokens: int, is_cut: bool) -> generation_pb2.GenerateResponse:
    reason = generation_pb2.FINISH_REASON_LENGTH if is_cut else generation_pb2.FINISH_REASON_STOP
    usage = generation_pb2.Usage(
        prompt_tokens=3,
        completion_tokens=num_tokens,
        time_to_first_token_seconds=0.01,
        total_seconds=0.02,
    )
    return generation_pb2.GenerateResponse(finish_reason=reason, usage=usage)
