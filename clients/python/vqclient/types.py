"""What the clients take and give: frozen values without protobuf.

Units: sizes in bytes, image dimensions in pixels, durations in seconds, `_ns` in nanoseconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType

from vqclient.errors import VqError


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


class EntropyMode(StrEnum):
    """How lattice codes become bytes; AUTO takes the smaller of those that the model allows."""

    AUTO = "auto"
    RAW = "raw"
    RANS = "rans"


class FrameType(StrEnum):
    """What a coded frame needs to be decoded: nothing, or the frame before it."""

    KEY = "key"
    DELTA = "delta"


class FinishReason(StrEnum):
    """Why a sequence ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


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
    codebook_exponent: int = 0
    has_entropy_tables: bool = False


@dataclass(frozen=True)
class Artifact:
    """One file of a model; `data` is empty in listings."""

    name: str
    media_type: str
    size_bytes: int
    sha256: str
    data: bytes = field(default=b"", repr=False)


@dataclass(frozen=True)
class Codebook:
    """A model with its codebook and the files that a device can download.

    `data`: num_codes rows of code_dim little-endian float32 values; empty for a codebook above
    512 KiB, which the artifact "codebook.bin" has as integers q, the values being
    q * 2^-model.codebook_exponent.
    """

    model: TokenizerModel
    data: bytes = field(repr=False)
    artifacts: tuple[Artifact, ...] = ()


@dataclass(frozen=True)
class Coding:
    """How pictures become codes.

    `tile_side` in latents, 0 for one tile. `rate_weight` is the squared latent error that one bit
    is worth: 0 takes the nearest codes, more saves bytes.
    """

    entropy: EntropyMode = EntropyMode.AUTO
    tile_side: int = 0
    rate_weight: float = 0.0


@dataclass(frozen=True)
class Encoded:
    """Codes of one image; `bpp` counts every byte of `codes` over the original's pixels.

    The first `base_bytes` of the codes are enough for a coarser picture (`allow_partial`).
    """

    codes: bytes = field(repr=False)
    model: str
    width: int
    height: int
    bpp: float
    source_bytes: int
    timings: Mapping[str, float] = field(default_factory=_no_timings, repr=False)
    frame_type: FrameType | None = None
    base_bytes: int = 0


@dataclass(frozen=True)
class Decoded:
    """A picture file made from codes, of the original's size; incomplete when they were cut."""

    image: bytes = field(repr=False)
    format: ImageFormat
    model: str
    width: int
    height: int
    timings: Mapping[str, float] = field(default_factory=_no_timings, repr=False)
    complete: bool = True


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
    complete: bool = True


@dataclass(frozen=True)
class Frame:
    """One frame to stream: exactly one of `image` and `codes`.

    `seq` must grow along the stream; `capture_ns` is on the caller's own clock and comes back.
    `request_keyframe` asks for this picture as a key frame.
    """

    seq: int
    image: bytes = field(default=b"", repr=False)
    codes: bytes = field(default=b"", repr=False)
    capture_ns: int = 0
    request_keyframe: bool = False

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
    """The answer to one frame; `error` is set, and the rest empty, when this frame failed.

    `frame_type` is that of the codes made or received. `keyframe_needed`: the stream's following
    delta frames cannot be read; the next key frame heals it. `complete` is False for a failed
    frame and for one that was cut.
    """

    seq: int
    capture_ns: int
    codes: bytes = field(default=b"", repr=False)
    image: bytes = field(default=b"", repr=False)
    labels: tuple[Label, ...] = ()
    bpp: float = 0.0
    timings: Mapping[str, float] = field(default_factory=_no_timings, repr=False)
    error: VqError | None = None
    dropped_before: int = 0
    frame_type: FrameType | None = None
    keyframe_needed: bool = False
    complete: bool = True
    base_bytes: int = 0


@dataclass(frozen=True)
class StreamOptions:
    """How a stream runs.

    At most `max_in_flight` frames wait for their answers before the source is asked for more;
    None never waits (for load generators). `max_age_ms` lets the server drop stale frames; then
    a missing answer holds up the stream for that long at most. 0 never drops.
    `keyframe_interval` frames lie between key frames: 1 for key frames only, None leaves it to the
    server. `model_hash` (8 or more digits) is that of the codebook the caller holds: the server
    refuses the stream when it has another. `allow_partial` reads frames that were cut.
    """

    format: ImageFormat = ImageFormat.PNG
    top_k: int = 5
    max_age_ms: int = 0
    max_in_flight: int | None = 8
    coding: Coding = Coding()
    keyframe_interval: int | None = None
    model_hash: str = ""
    allow_partial: bool = False

    def __post_init__(self) -> None:
        if self.max_in_flight is not None and self.max_in_flight < 1:
            raise ValueError(f"max_in_flight is {self.max_in_flight}; give at least 1, or None")
        if self.keyframe_interval is not None and self.keyframe_interval < 1:
            raise ValueError(
                f"keyframe_interval is {self.keyframe_interval}; give at least 1, or None"
            )
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
