"""Between the contract and the engine: the only module that sees both kinds of type."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from scq import errors as engine
from scq.codec import Label
from vqserve.common.errors import Internal, InvalidArgument, ServiceError
from vqserve.tokenizer import errors
from vqserve.tokenizer.codecs import ModelCard
from vqserve.tokenizer.pictures import ImageFormat
from vqstack.tokenizer.v1 import tokenizer_pb2

# Most specific first: ImageTooLarge is an InvalidImage to the engine.
_TRANSLATIONS: tuple[tuple[type[engine.ScqError], type[ServiceError], str | None], ...] = (
    (engine.ImageTooLarge, errors.ImageTooLarge, "image"),
    (engine.InvalidImage, errors.InvalidImage, "image"),
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
    )


def frame_error(error: ServiceError) -> tokenizer_pb2.FrameError:
    """An error of one frame of a stream."""
    return tokenizer_pb2.FrameError(
        code=error.code_number, reason=error.reason, message=error.message
    )
