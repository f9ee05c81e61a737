"""What the clients take and give: frozen values without protobuf.

Units: sizes in bytes, image dimensions in pixels, durations in seconds, `_ns` in nanoseconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType

from vqclient.errors import VqError

CODES_MAGIC = b"SQ"


class ImageFormat(StrEnum):
    """File format of a decoded picture."""

    PNG = "png"
    JPEG = "jpeg"
    WEBP = "webp"


class Operation(StrEnum):
    """What a stream does with each frame."""

    ENCODE = "encode"
    DECODE = "decode"
    RECOGNIZE = "recognize"


class FinishReason(StrEnum):
    """Why a sequence ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


def is_codes(payload: bytes) -> bool:
    """Whether `payload` begins like an SCQ1 frame rather than an image file."""
    return payload.startswith(CODES_MAGIC)


def _no_timings() -> Mapping[str, float]:
    return MappingProxyType({})


@dataclass(frozen=True)
class TokenizerModel:
    """A model of the tokenizer service; `kind` is "frame" (any size) or "crop" (one fixed size)."""

    name: str
    model_hash: str
    kind: str
    stride: int
    code_dim: int
    num_codes: int
    max_support: int
    denominator: int
    bits_per_latent: float
    classes: tuple[str, ...]
    max_width: int
    max_height: int


@dataclass(frozen=True)
class Codebook:
    """A model with its codebook: num_codes rows of code_dim little-endian float32 values."""

    model: TokenizerModel
    data: bytes = field(repr=False)


@dataclass(frozen=True)
class Encoded:
    """Codes of one image; `bpp` counts every byte of `codes` over the original's pixels."""

    codes: bytes = field(repr=False)
    model: str
    width: int
    height: int
    bpp: float
    source_bytes: int
    timings: Mapping[str, float] = field(default_factory=_no_timings, repr=False)


@dataclass(frozen=True)
class Decoded:
    """A picture file made from codes, of the original's size."""

    image: bytes = field(repr=False)
    format: ImageFormat
    model: str
    width: int
    height: int
    timings: Mapping[str, float] = field(default_factory=_no_timings, repr=False)


@dataclass(frozen=True)
class Label:
    """One recognised class with its probability in [0, 1]."""

    name: str
    score: float
    class_index: int


@dataclass(frozen=True)
class Recognized:
    """Labels, most probable first, and the size of the codes they were read from."""

    labels: tuple[Label, ...]
    model: str
    coded_bytes: int
    timings: Mapping[str, float] = field(default_factory=_no_timings, repr=False)


@dataclass(frozen=True)
class Frame:
    """One frame to stream: exactly one of `image` and `codes`.

    `seq` must grow along the stream; `capture_ns` is on the caller's own clock and comes back.
    """

    seq: int
    image: bytes = field(default=b"", repr=False)
    codes: bytes = field(default=b"", repr=False)
    capture_ns: int = 0

    def __post_init__(self) -> None:
        if bool(self.image) == bool(self.codes):
            raise ValueError(f"frame {self.seq} needs exactly one of image and codes")
        if self.seq < 0 or self.capture_ns < 0:
            raise ValueError(f"frame {self.seq}: seq and capture_ns must not be negative")

    @property
    def payload_bytes(self) -> int:
        return len(self.image) + len(self.codes)


@dataclass(frozen=True)
class FrameResult:
    """The answer to one frame; `error` is set, and the rest empty, when this frame failed."""

    seq: int
    capture_ns: int
    codes: bytes = field(default=b"", repr=False)
    image: bytes = field(default=b"", repr=False)
    labels: tuple[Label, ...] = ()
    bpp: float = 0.0
    timings: Mapping[str, float] = field(default_factory=_no_timings, repr=False)
    error: VqError | None = None
    dropped_before: int = 0


@dataclass(frozen=True)
class StreamOptions:
    """How a stream runs.

    At most `max_in_flight` frames wait for their answers before the source is asked for more;
    None never waits (for load generators). `max_age_ms` lets the server drop stale frames; then
    a missing answer holds up the stream for that long at most. 0 never drops.
    """

    format: ImageFormat = ImageFormat.PNG
    top_k: int = 5
    max_age_ms: int = 0
    max_in_flight: int | None = 8

    def __post_init__(self) -> None:
        if self.max_in_flight is not None and self.max_in_flight < 1:
            raise ValueError(f"max_in_flight is {self.max_in_flight}; give at least 1, or None")
        if self.max_age_ms < 0 or self.top_k < 1:
            raise ValueError(
                f"max_age_ms {self.max_age_ms} must not be negative, top_k {self.top_k} at least 1"
            )


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; `role` is "system", "user" or "assistant"."""

    role: str
    content: str


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; None leaves the choice to the server (its defaults: the contract)."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True)
class Usage:
    """Lengths in tokens and the server's own timing of one request, in seconds."""

    prompt_tokens: int
    completion_tokens: int
    time_to_first_token: float
    total: float


@dataclass(frozen=True)
class TextPiece:
    """A piece of a continuation; the last one carries `finish_reason` and `usage`."""

    text: str
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None


@dataclass(frozen=True)
class Completion:
    """A whole continuation."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage


@dataclass(frozen=True)
class LanguageModel:
    """A model of the generation service; `bpw` counts all overhead of its quantized layers."""

    name: str
    architecture: str
    method: str
    bits: int
    bpw: float
    group_size: int
    model_hash: str
    context_length: int
    num_parameters: int
    vocab_size: int
    executor: str
