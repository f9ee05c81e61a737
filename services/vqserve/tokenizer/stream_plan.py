"""What the first message of a stream settles for all of its frames.

Knows the contract's StreamConfig; knows no frame.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from vqserve.common.errors import InvalidArgument
from vqserve.tokenizer import convert
from vqserve.tokenizer.codecs import MIN_HASH_DIGITS, Coding, ModelStore, ServedModel
from vqserve.tokenizer.core import Operation, TokenizerCore, checked_top_k
from vqserve.tokenizer.errors import InvalidStream, ModelHashMismatch
from vqserve.tokenizer.metrics import UNKNOWN_MODEL
from vqserve.tokenizer.pictures import ImageFormat
from vqserve.tokenizer.pipeline import require_tables
from vqstack.tokenizer.v1 import tokenizer_pb2

MAX_KEYFRAME_INTERVAL = 100_000
HASH_PATTERN = re.compile(f"[0-9a-f]{{{MIN_HASH_DIGITS},64}}")

_OPERATIONS: dict[int, Operation] = {
    tokenizer_pb2.STREAM_OPERATION_ENCODE: "encode",
    tokenizer_pb2.STREAM_OPERATION_DECODE: "decode",
    tokenizer_pb2.STREAM_OPERATION_RECOGNIZE: "recognize",
}


@dataclass(frozen=True)
class StreamPlan:
    """A checked configuration. `max_age_seconds` 0 never drops; `model` may be None."""

    operation: Operation
    model: ServedModel | None
    image_format: ImageFormat
    top_k: int
    max_age_seconds: float
    coding: Coding
    keyframe_interval: int
    allow_partial: bool

    @property
    def model_label(self) -> str:
        """Metric label of the stream's model."""
        return self.model.name if self.model else UNKNOWN_MODEL


def checked_plan(
    config: tokenizer_pb2.StreamConfig, core: TokenizerCore, default_interval: int
) -> StreamPlan:
    """The plan that a configuration asks for; raises the ServiceError that ends the stream."""
    operation = _OPERATIONS.get(config.operation)
    if operation is None:
        raise InvalidStream(
            f"stream operation {config.operation} is unknown; use encode, decode or recognize",
            field="operation",
        )
    model = _pinned_model(config, core.models)
    if operation == "encode" and model is None:
        model = core.named_model("")
    coding = convert.coding(config.coding)
    if model is not None:
        require_tables(model, coding)
    return StreamPlan(
        operation,
        model,
        convert.image_format(config.format),
        checked_top_k(config.top_k),
        config.max_age_ms / 1000,
        coding,
        _interval(config.keyframe_interval or default_interval, model, coding),
        config.allow_partial,
    )


def _pinned_model(config: tokenizer_pb2.StreamConfig, models: ModelStore) -> ServedModel | None:
    """The model that the stream keeps to, or None when its first codes decide."""
    wanted = config.model_hash.lower()
    if wanted and not HASH_PATTERN.fullmatch(wanted):
        raise InvalidArgument(
            f"model_hash is {config.model_hash[:100]!r}; give {MIN_HASH_DIGITS} to 64 hexadecimal "
            "digits, or nothing",
            field="model_hash",
        )
    if not config.model:
        return models.by_name_or_hash(wanted) if wanted else None
    model = models.by_name(config.model)
    held = model.card.model_hash
    if not held.startswith(wanted):
        raise ModelHashMismatch(
            f"{model.name!r} is {held[:16]} here, you hold {wanted[:16]}; get it with GetModel",
            field="model_hash",
            metadata={"model_hash": held},
        )
    return model


def _interval(wanted: int, model: ServedModel | None, coding: Coding) -> int:
    """Frames from key to key; 1 where nothing but key frames can be coded."""
    if wanted > MAX_KEYFRAME_INTERVAL:
        raise InvalidArgument(
            f"keyframe_interval is {wanted}; give at most {MAX_KEYFRAME_INTERVAL} frames",
            field="keyframe_interval",
        )
    can_delta = model is not None and model.card.has_entropy_tables and coding.entropy != "raw"
    return wanted if can_delta else 1
