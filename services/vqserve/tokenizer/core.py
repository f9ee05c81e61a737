"""What each RPC does, free of transport: coroutines from request message to response message.

The gRPC servicer, the REST routes and the WebSocket all call these, so the protocols cannot
drift apart. Failures are ServiceErrors. Calls no engine: frames go through `pipeline`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from scq.bitstream import FrameHeader
from scq.codec import CodedPicture
from vqserve.common.admission import AdmissionGate
from vqserve.common.errors import InvalidArgument, PayloadTooLarge, ServiceError
from vqserve.common.logging import annotate
from vqserve.tokenizer import convert
from vqserve.tokenizer.artifacts import Artifact
from vqserve.tokenizer.codecs import DEFAULT_CODING, Coding, ModelStore, ServedModel
from vqserve.tokenizer.errors import ArtifactsTooLarge, EmptyPayload
from vqserve.tokenizer.health import HealthProbe
from vqserve.tokenizer.metrics import UNKNOWN_MODEL, ScqMetrics
from vqserve.tokenizer.pipeline import (
    EncodedPicture,
    FramePipeline,
    StageClock,
    require_head,
)
from vqstack.tokenizer.v1 import tokenizer_pb2

Transport = Literal["grpc", "rest", "ws"]
Operation = Literal["encode", "decode", "recognize"]

DEFAULT_TOP_K = 5
MAX_TOP_K = 100
# Together below the 4 MiB that gRPC clients accept by default.
MAX_INLINE_CODEBOOK_BYTES = 512 * 1024
MAX_INLINE_ARTIFACT_BYTES = 3 * 1024 * 1024
CHUNK_BYTES = 256 * 1024


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
        health: HealthProbe | None = None,
    ) -> None:
        self.models = models
        self.pipeline = pipeline
        self.metrics = metrics
        self.max_payload_bytes = max_payload_bytes
        self._gate = gate
        self._health = health

    async def encode(
        self, request: tokenizer_pb2.EncodeRequest, transport: Transport
    ) -> tokenizer_pb2.EncodeResponse:
        """Image file to codes."""
        with self.frame(FrameRecord("encode", transport)) as record:
            model = self.named_model(request.model)
            coding = convert.coding(request.coding)
            encoded = await self.encode_image(record, model, request.image, coding)
        annotate(
            model=model.name,
            bytes_in=encoded.source_bytes,
            bytes_out=len(encoded.codes),
            bpp=round(encoded.frame.stats.bpp, 5),
        )
        return tokenizer_pb2.EncodeResponse(
            codes=encoded.codes,
            model=model.name,
            width=encoded.width,
            height=encoded.height,
            bpp=encoded.frame.stats.bpp,
            source_bytes=encoded.source_bytes,
            timings=convert.timings(record.clock.seconds),
            frame_type=convert.frame_type_number(encoded.frame.stats.frame_type),
            base_bytes=encoded.frame.stats.base_bytes,
        )

    async def decode(
        self, request: tokenizer_pb2.DecodeRequest, transport: Transport
    ) -> tokenizer_pb2.DecodeResponse:
        """Codes to an image file."""
        with self.frame(FrameRecord("decode", transport)) as record:
            image_format = convert.image_format(request.format)
            model, picture = await self._read(record, request.codes, request.allow_partial)
            image = await self.pipeline.render(model, picture, image_format, record.clock)
        annotate(model=model.name, bytes_in=len(request.codes), bytes_out=len(image))
        return tokenizer_pb2.DecodeResponse(
            image=image,
            format=convert.image_format_number(image_format),
            model=model.name,
            width=picture.placement.width,
            height=picture.placement.height,
            timings=convert.timings(record.clock.seconds),
            complete=picture.complete,
        )

    async def recognize(
        self, request: tokenizer_pb2.RecognizeRequest, transport: Transport
    ) -> tokenizer_pb2.RecognizeResponse:
        """Image file or codes to labels."""
        with self.frame(FrameRecord("recognize", transport)) as record:
            top_k = checked_top_k(request.top_k)
            model, codes = await self._codes_to_recognize(record, request)
            require_head(model)
            picture = await self.pipeline.read(
                model.codec, codes, request.allow_partial, record.clock
            )
            self.count_partial(record, picture.complete)
            found = await self.pipeline.label(model, picture, record.clock)
        annotate(model=model.name, coded_bytes=len(codes))
        return tokenizer_pb2.RecognizeResponse(
            labels=convert.labels(found[:top_k]),
            model=model.name,
            coded_bytes=len(codes),
            timings=convert.timings(record.clock.seconds),
            complete=picture.complete,
        )

    def list_models(self) -> tokenizer_pb2.ListModelsResponse:
        """Every loaded model."""
        infos = [convert.model_info(model.card) for model in self.models.all()]
        return tokenizer_pb2.ListModelsResponse(models=infos)

    def get_model(self, request: tokenizer_pb2.GetModelRequest) -> tokenizer_pb2.GetModelResponse:
        """One model with its codebook, a list of its files, and those that were asked for."""
        model = self.models.by_name_or_hash(request.model)
        wanted = {name: model.artifacts.get(name, "artifacts") for name in request.artifacts}
        size = sum(len(file.data) for file in wanted.values())
        if size > MAX_INLINE_ARTIFACT_BYTES:
            raise ArtifactsTooLarge(
                f"the artifacts asked for have {size} bytes, one answer carries "
                f"{MAX_INLINE_ARTIFACT_BYTES}; fetch them with GetModelArtifact",
                field="artifacts",
            )
        return tokenizer_pb2.GetModelResponse(
            model=convert.model_info(model.card),
            codebook=model.codebook if len(model.codebook) <= MAX_INLINE_CODEBOOK_BYTES else b"",
            artifacts=[
                convert.artifact(file, with_data=file.name in wanted)
                for file in model.artifacts.all()
            ],
        )

    def artifact(self, model: str, name: str) -> Artifact:
        """One file of a model."""
        return self.models.by_name_or_hash(model).artifacts.get(name)

    def artifact_chunks(
        self, request: tokenizer_pb2.GetModelArtifactRequest
    ) -> Iterator[tokenizer_pb2.GetModelArtifactResponse]:
        """One file of a model from an offset on, in chunks; the first message describes it."""
        file = self.artifact(request.model, request.name)
        if request.offset > len(file.data):
            raise InvalidArgument(
                f"offset is {request.offset}, the file has {len(file.data)} bytes", field="offset"
            )
        described: tokenizer_pb2.Artifact | None = convert.artifact(file)
        starts = range(request.offset, max(len(file.data), request.offset + 1), CHUNK_BYTES)
        for start in starts:
            chunk = file.data[start : start + CHUNK_BYTES]
            yield tokenizer_pb2.GetModelArtifactResponse(artifact=described, chunk=chunk)
            described = None

    async def encode_image(
        self, record: FrameRecord, model: ServedModel, image: bytes, coding: Coding
    ) -> EncodedPicture:
        """Encode one image file by itself and count its sizes."""
        record.model = model.name
        self.require_payload(image, "image")
        pixels = await self.pipeline.open(image, record.clock)
        frame = await self.pipeline.encode(model, pixels, coding, record.clock)
        return self.count_encoded(EncodedPicture(model, pixels, frame, len(image)))

    async def accept_codes(
        self,
        record: FrameRecord,
        codes: bytes,
        allow_partial: bool,
        pinned: ServedModel | None = None,
    ) -> tuple[ServedModel, FrameHeader]:
        """Check the header of codes that came in, count them, and find their model."""
        if pinned is not None:
            record.model = pinned.name
        self.require_payload(codes, "codes")
        header = await self.pipeline.header_of(codes, allow_partial, record.clock)
        model = self.pipeline.model_of(header, pinned)
        record.model = model.name
        self.metrics.received(model.name, len(codes), header.frame_type)
        return model, header

    def count_encoded(self, encoded: EncodedPicture) -> EncodedPicture:
        """Count the sizes of one frame that was encoded; now and then probe it."""
        pixels = encoded.width * encoded.height
        name = encoded.model.name
        self.metrics.encoded(name, encoded.frame, encoded.source_bytes, pixels)
        if self._health is not None:
            self._health.consider(encoded, is_busy=self._gate.waiting > 0)
        return encoded

    def count_partial(self, record: FrameRecord, complete: bool) -> None:
        """Count a frame that was read in part."""
        if not complete:
            self.metrics.partial(record.model, record.operation)

    def named_model(self, name: str) -> ServedModel:
        """The model that a request must name."""
        if not name:
            loaded = ", ".join(self.models.names)
            raise InvalidArgument(f"model is empty; name one of: {loaded}", field="model")
        return self.models.by_name(name)

    def require_payload(self, payload: bytes, field_name: str) -> None:
        """Raise EmptyPayload or PayloadTooLarge."""
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

    @contextmanager
    def frame(self, record: FrameRecord) -> Iterator[FrameRecord]:
        """Admit one frame; count its outcome, latency and stages."""
        outcome = "ok"
        try:
            with self._gate.admit():
                yield record
            seconds = time.perf_counter() - record.started
            self.metrics.timed(record.model, record.operation, seconds, record.clock.seconds)
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
            self.metrics.finished(record.model, record.operation, record.transport, outcome)

    async def _read(
        self, record: FrameRecord, codes: bytes, allow_partial: bool
    ) -> tuple[ServedModel, CodedPicture]:
        model, _ = await self.accept_codes(record, codes, allow_partial)
        picture = await self.pipeline.read(model.codec, codes, allow_partial, record.clock)
        self.count_partial(record, picture.complete)
        return model, picture

    async def _codes_to_recognize(
        self, record: FrameRecord, request: tokenizer_pb2.RecognizeRequest
    ) -> tuple[ServedModel, bytes]:
        """The codes that came in, or those of the image that did."""
        if request.WhichOneof("input") == "image":
            model = self.named_model(request.model)
            record.model = model.name
            require_head(model)
            encoded = await self.encode_image(record, model, request.image, DEFAULT_CODING)
            return model, encoded.codes
        pinned = self.models.by_name(request.model) if request.model else None
        model, _ = await self.accept_codes(record, request.codes, request.allow_partial, pinned)
        return model, request.codes


def checked_top_k(top_k: int) -> int:
    """Number of labels wanted: 5 for 0; raises InvalidArgument above 100."""
    if top_k > MAX_TOP_K:
        raise InvalidArgument(f"top_k is {top_k}; ask for 1 to {MAX_TOP_K} labels", field="top_k")
    return top_k or DEFAULT_TOP_K
