"""Between the contract and the engine: the only module that sees both kinds of type."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from scq import errors as engine
from scq.bitstream.frame import EntropyChoice
from scq.codec import FrameType, Label
from vqserve.common.errors import Internal, InvalidArgument, ServiceError
from vqserve.tokenizer import errors
from vqserve.tokenizer.artifacts import Artifact
from vqserve.tokenizer.codecs import Coding, ModelCard
from vqserve.tokenizer.pictures import ImageFormat
from vqstack.tokenizer.v1 import tokenizer_pb2

# Most specific first: to the engine ImageTooLarge is an InvalidImage, ReferenceMismatch a
# CorruptCodes.
_TRANSLATIONS: tuple[tuple[type[engine.ScqError], type[ServiceError], str | None], ...] = (
    (engine.ImageTooLarge, errors.ImageTooLarge, "image"),
    (engine.InvalidImage, errors.InvalidImage, "image"),
    (engine.ReferenceMismatch, errors.ReferenceMismatch, "codes"),
    (engine.CorruptCodes, errors.CorruptCodes, "codes"),
    (engine.InvalidLatents, errors.InvalidLatents, "image"),
    (engine.UnknownModel, errors.UnknownModel, "model"),
    (engine.UnsupportedOperation, errors.NoRecognitionHead, "model"),
    (engine.InvalidCodebook, errors.InvalidModel, None),
    (engine.ScqError, errors.InvalidModel, None),
)

_FORMATS: dict[int, ImageFormat] = {
    tokenizer_pb2.IMAGE_FORMAT_UNSPECIFIED: "png",
    tokenizer_pb2.IMAGE_FORMAT_PNG: "png",
    tokenizer_pb2.IMAGE_FORMAT_JPEG: "jpeg",
    tokenizer_pb2.IMAGE_FORMAT_WEBP: "webp",
}
_FORMAT_NUMBERS: dict[ImageFormat, tokenizer_pb2.ImageFormat.ValueType] = {
    "png": tokenizer_pb2.IMAGE_FORMAT_PNG,
    "jpeg": tokenizer_pb2.IMAGE_FORMAT_JPEG,
    "webp": tokenizer_pb2.IMAGE_FORMAT_WEBP,
}

_ENTROPY_NUMBERS: dict[EntropyChoice, tokenizer_pb2.EntropyMode.ValueType] = {
    "auto": tokenizer_pb2.ENTROPY_MODE_UNSPECIFIED,
    "raw": tokenizer_pb2.ENTROPY_MODE_RAW,
    "rans": tokenizer_pb2.ENTROPY_MODE_RANS,
}
_ENTROPIES: dict[int, EntropyChoice] = {number: name for name, number in _ENTROPY_NUMBERS.items()}
_FRAME_TYPES: dict[FrameType, tokenizer_pb2.FrameType.ValueType] = {
    "key": tokenizer_pb2.FRAME_TYPE_KEY,
    "delta": tokenizer_pb2.FRAME_TYPE_DELTA,
}
MAX_TILE_SIDE = 255


def translate(error: engine.ScqError) -> ServiceError:
    """The error that clients see for an error of the engine; its message is kept."""
    for engine_type, service_type, field in _TRANSLATIONS:
        if isinstance(error, engine_type):
            return service_type(str(error), field=field)
    return Internal(str(error))


@contextmanager
def translated_errors() -> Iterator[None]:
    """Turn the engine's errors into the service's."""
    try:
        yield
    except engine.ScqError as error:
        raise translate(error) from error


def image_format(number: int) -> ImageFormat:
    """The file format that a request asks for; PNG when it does not say."""
    name = _FORMATS.get(number)
    if name is None:
        raise InvalidArgument(
            f"image format {number} is unknown; use {', '.join(_FORMAT_NUMBERS)}", field="format"
        )
    return name


def image_format_number(name: ImageFormat) -> tokenizer_pb2.ImageFormat.ValueType:
    """The contract's enum value of a file format."""
    return _FORMAT_NUMBERS[name]


def coding(options: tokenizer_pb2.CodingOptions) -> Coding:
    """Checked coding options; InvalidArgument names the one that is out of range."""
    entropy = _ENTROPIES.get(options.entropy)
    if entropy is None:
        raise InvalidArgument(
            f"entropy mode {options.entropy} is unknown; use {', '.join(_ENTROPIES.values())}",
            field="coding.entropy",
        )
    if options.tile_side > MAX_TILE_SIDE:
        raise InvalidArgument(
            f"tile_side is {options.tile_side}; give 1 to {MAX_TILE_SIDE} latents, or 0 for one "
            "tile",
            field="coding.tile_side",
        )
    if not (math.isfinite(options.rate_weight) and options.rate_weight >= 0):
        raise InvalidArgument(
            f"rate_weight is {options.rate_weight}; give a finite number of at least 0",
            field="coding.rate_weight",
        )
    return Coding(entropy, options.tile_side or None, options.rate_weight)


def entropy_number(name: EntropyChoice) -> tokenizer_pb2.EntropyMode.ValueType:
    """The contract's enum value of an entropy mode."""
    return _ENTROPY_NUMBERS[name]


def frame_type_number(name: FrameType) -> tokenizer_pb2.FrameType.ValueType:
    """The contract's enum value of a frame type."""
    return _FRAME_TYPES[name]


def artifact(file: Artifact, *, with_data: bool = False) -> tokenizer_pb2.Artifact:
    """A file of a model as a message."""
    return tokenizer_pb2.Artifact(
        name=file.name,
        media_type=file.media_type,
        size_bytes=len(file.data),
        sha256=file.sha256,
        data=file.data if with_data else b"",
    )


def labels(recognized: Sequence[Label]) -> list[tokenizer_pb2.Label]:
    """Labels of the engine as messages."""
    return [
        tokenizer_pb2.Label(name=label.name, score=label.score, class_index=label.class_index)
        for label in recognized
    ]


def timings(seconds_by_stage: Mapping[str, float]) -> list[tokenizer_pb2.StageTiming]:
    """Stage times as messages."""
    return [
        tokenizer_pb2.StageTiming(stage=stage, seconds=seconds)
        for stage, seconds in seconds_by_stage.items()
    ]


def model_info(card: ModelCard) -> tokenizer_pb2.ModelInfo:
    """A model's card as a message."""
    kind = tokenizer_pb2.MODEL_KIND_CROP if card.is_crop else tokenizer_pb2.MODEL_KIND_FRAME
    return tokenizer_pb2.ModelInfo(
        name=card.name,
        model_hash=card.model_hash,
        kind=kind,
        stride=card.stride,
        code_dim=card.code_dim,
        num_codes=card.num_codes,
        max_support=card.max_support,
        denominator=card.denominator,
        bits_per_latent=card.bits_per_latent,
        classes=card.classes,
        max_width=card.max_width,
        max_height=card.max_height,
        codebook_exponent=card.codebook_exponent,
        has_entropy_tables=card.has_entropy_tables,
    )


def frame_error(error: ServiceError) -> tokenizer_pb2.FrameError:
    """An error of one frame of a stream."""
    return tokenizer_pb2.FrameError(
        code=error.code_number, reason=error.reason, message=error.message
    )
