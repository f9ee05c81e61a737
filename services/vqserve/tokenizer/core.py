"""What each RPC does, free of transport: coroutines from request message to response message.

The gRPC servicer, the REST routes and the WebSocket all call these, so the protocols cannot
drift apart. Failures are ServiceErrors. Knows no engine type: frames go through `pipeline`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from vqserve.common.admission import AdmissionGate
from vqserve.common.errors import InvalidArgument, PayloadTooLarge, ServiceError
from vqserve.common.logging import annotate
from vqserve.tokenizer import convert
from vqserve.tokenizer.codecs import ModelStore, ServedModel
from vqserve.tokenizer.errors import EmptyPayload
from vqserve.tokenizer.metrics import UNKNOWN_MODEL, ScqMetrics
from vqserve.tokenizer.pictures import ImageFormat
from vqserve.tokenizer.pipeline import (
    DecodedPicture,
    EncodedPicture,
    FramePipeline,
    Recognition,
    StageClock,
    require_head,
)
from vqstack.tokenizer.v1 import tokenizer_pb2

Transport = Literal["grpc", "rest", "ws"]
Operation = Literal["encode", "decode", "recognize"]

DEFAULT_TOP_K = 5
MAX_TOP_K = 100


@dataclass
class FrameRecord:
    """One frame on its way through: which model, since when, how long in each stage."""

    operation: Operation
    transport: Transport
    model: str = UNKNOWN_MODEL
    clock: StageClock = field(default_factory=StageClock)
    started: float = field(default_factory=time.perf_counter)


class TokenizerCore:
    """The bodies of TokenizerService's unary RPCs, and the steps that streams share."""

    def __init__(
        self,
        models: ModelStore,
        pipeline: FramePipeline,
        gate: AdmissionGate,
        metrics: ScqMetrics,
        max_payload_bytes: int,
    ) -> None:
        self.models = models
        self.metrics = metrics
        self.max_payload_bytes = max_payload_bytes
        self._pipeline = pipeline
        self._gate = gate

    async def encode(
        self, request: tokenizer_pb2.EncodeRequest, transport: Transport
    ) -> tokenizer_pb2.EncodeResponse:
        """Image file to codes."""
        with self.frame("encode", transport) as record:
            model = self.named_model(request.model)
            encoded = await self.encode_image(record, model, request.image)
        annotate(
            model=model.name,
            bytes_in=encoded.source_bytes,
            bytes_out=len(encoded.codes),
            bpp=round(encoded.bpp, 5),
        )
        return tokenizer_pb2.EncodeResponse(
            codes=encoded.codes,
            model=model.name,
            width=encoded.width,
            height=encoded.height,
            bpp=encoded.bpp,
            source_bytes=encoded.source_bytes,
            timings=convert.timings(record.clock.seconds),
        )

    async def decode(
        self, request: tokenizer_pb2.DecodeRequest, transport: Transport
    ) -> tokenizer_pb2.DecodeResponse:
        """Codes to an image file."""
        with self.frame("decode", transport) as record:
            image_format = convert.image_format(request.format)
            decoded = await self.decode_codes(record, request.codes, image_format)
        annotate(
            model=decoded.model.name, bytes_in=len(request.codes), bytes_out=len(decoded.image)
        )
        return tokenizer_pb2.DecodeResponse(
            image=decoded.image,
            format=convert.image_format_number(decoded.image_format),
            model=decoded.model.name,
            width=decoded.width,
            height=decoded.height,
            timings=convert.timings(record.clock.seconds),
        )

    async def recognize(
        self, request: tokenizer_pb2.RecognizeRequest, transport: Transport
    ) -> tokenizer_pb2.RecognizeResponse:
        """Image file or codes to labels."""
        with self.frame("recognize", transport) as record:
            top_k = checked_top_k(request.top_k)
            if request.WhichOneof("input") == "image":
                model = self.named_model(request.model)
                recognized = await self.recognize_image(record, model, request.image)
            else:
                pinned = self.models.by_name(request.model) if request.model else None
                recognized = await self.recognize_codes(record, request.codes, pinned)
        annotate(model=recognized.model.name, coded_bytes=len(recognized.codes))
        return tokenizer_pb2.RecognizeResponse(
            labels=convert.labels(recognized.labels[:top_k]),
            model=recognized.model.name,
            coded_bytes=len(recognized.codes),
            timings=convert.timings(record.clock.seconds),
        )

    def list_models(self) -> tokenizer_pb2.ListModelsResponse:
        """Every loaded model."""
        infos = [convert.model_info(model.card) for model in self.models.all()]
        return tokenizer_pb2.ListModelsResponse(models=infos)

    def get_model(self, request: tokenizer_pb2.GetModelRequest) -> tokenizer_pb2.GetModelResponse:
        """One model with its codebook."""
        model = self.models.by_name_or_hash(request.model)
        return tokenizer_pb2.GetModelResponse(
            model=convert.model_info(model.card), codebook=model.codebook
        )

    async def encode_image(
        self, record: FrameRecord, model: ServedModel, image: bytes
    ) -> EncodedPicture:
        """Encode one frame and count its sizes."""
        record.model = model.name
        self._require_payload(image, "image")
        encoded = await self._pipeline.encode(model, image, record.clock)
        pixels = encoded.width * encoded.height
        self.metrics.encoded(model.name, len(encoded.codes), encoded.source_bytes, pixels)
        self.metrics.codebook_used(model.name, encoded.indices)
        return encoded

    async def decode_codes(
        self,
        record: FrameRecord,
        codes: bytes,
        image_format: ImageFormat,
        pinned: ServedModel | None = None,
    ) -> DecodedPicture:
        """Decode one frame and count its size."""
        model = await self._model_of(record, codes, pinned)
        decoded = await self._pipeline.decode(model, codes, image_format, record.clock)
        return decoded

    async def recognize_image(
        self, record: FrameRecord, model: ServedModel, image: bytes
    ) -> Recognition:
        """Encode one frame, then label its codes."""
        record.model = model.name
        require_head(model)
        encoded = await self.encode_image(record, model, image)
        return await self._pipeline.recognize(model, encoded.codes, record.clock)

    async def recognize_codes(
        self, record: FrameRecord, codes: bytes, pinned: ServedModel | None = None
    ) -> Recognition:
        """Label one frame's codes."""
        model = await self._model_of(record, codes, pinned)
        return await self._pipeline.recognize(model, codes, record.clock)

    def named_model(self, name: str) -> ServedModel:
        """The model that a request must name."""
        if not name:
            loaded = ", ".join(self.models.names)
            raise InvalidArgument(f"model is empty; name one of: {loaded}", field="model")
        return self.models.by_name(name)

    @contextmanager
    def frame(self, operation: Operation, transport: Transport) -> Iterator[FrameRecord]:
        """Admit one frame; count its outcome, latency and stages."""
        record = FrameRecord(operation, transport)
        outcome = "ok"
        try:
            with self._gate.admit():
                yield record
            self._observe(record)
        except asyncio.CancelledError:
            outcome = "cancelled"
            raise
        except ServiceError as error:
            outcome = error.grpc_code.name.lower()
            raise
        except Exception:
            outcome = "internal"
            raise
        finally:
            self.metrics.frames.labels(record.model, operation, transport, outcome).inc()

    def _observe(self, record: FrameRecord) -> None:
        seconds = time.perf_counter() - record.started
        self.metrics.latency.labels(record.model, record.operation).observe(seconds)
        self.metrics.staged(record.model, record.clock.seconds)

    async def _model_of(
        self, record: FrameRecord, codes: bytes, pinned: ServedModel | None
    ) -> ServedModel:
        if pinned is not None:
            record.model = pinned.name
        self._require_payload(codes, "codes")
        model = await self._pipeline.model_of(codes, record.clock, pinned)
        record.model = model.name
        self.metrics.received(model.name, len(codes))
        return model

    def _require_payload(self, payload: bytes, field_name: str) -> None:
        if not payload:
            raise EmptyPayload(
                f"{field_name} is empty; send the bytes to work on", field=field_name
            )
        if len(payload) > self.max_payload_bytes:
            raise PayloadTooLarge(
                f"{field_name} has {len(payload)} bytes, the limit is {self.max_payload_bytes}; "
                "send less or raise max_request_bytes",
                field=field_name,
            )


def checked_top_k(top_k: int) -> int:
    """Number of labels wanted: 5 for 0; raises InvalidArgument above 100."""
    if top_k > MAX_TOP_K:
        raise InvalidArgument(f"top_k is {top_k}; ask for 1 to {MAX_TOP_K} labels", field="top_k")
    return top_k or DEFAULT_TOP_K
