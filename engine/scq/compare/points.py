"""Operating points: one codec at one setting, pictures to the bytes of a whole file and back.

JPEG, WebP and AVIF are Pillow's, JPEG XL is the Pillow plugin's; all on one thread. Knows
nothing of metrics.
"""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from PIL import Image, features

from scq.bitstream.frame import EntropyChoice
from scq.codec import FrameCodec
from scq.errors import ScqError
from scq.images import Pixels

# Width and height of the original, which a scaled-down file does not know.
_SIZE = struct.Struct("<HH")


class OperatingPoint(Protocol):
    """One codec at one setting.

    `recognize` is the class that the codec's own head reads from the bytes, None without a head.
    """

    @property
    def codec(self) -> str: ...
    @property
    def setting(self) -> str: ...
    def encode(self, image: Pixels) -> bytes: ...
    def decode(self, codes: bytes) -> Pixels: ...
    def recognize(self, codes: bytes) -> int | None: ...


@dataclass(frozen=True)
class FilePoint:
    """A picture file format at one quality.

    `scale` below 1 shrinks the picture first (Lanczos) and enlarges what comes back (bicubic):
    what anyone would do who needs fewer bytes than the format's lowest quality. The original's
    size then travels with the file, in 4 bytes that are counted.
    """

    format: str
    quality: int
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ScqError(f"unknown format {self.format!r}; available: {', '.join(FORMATS)}")
        if not (0 <= self.quality <= 100 and 0 < self.scale <= 1):
            raise ScqError(f"quality must be 0..100 and scale in (0, 1], got {self}")

    @property
    def codec(self) -> str:
        return self.format if self.scale == 1 else f"{self.format}, scaled"

    @property
    def setting(self) -> str:
        return (
            f"q{self.quality}" if self.scale == 1 else f"1/{round(1 / self.scale)} q{self.quality}"
        )

    def encode(self, image: Pixels) -> bytes:
        """The file's bytes."""
        height, width = image.shape[:2]
        picture = Image.fromarray(image)
        if self.scale == 1:
            return _save(picture, self.format, self.quality)
        small = (max(1, round(width * self.scale)), max(1, round(height * self.scale)))
        shrunk = picture.resize(small, Image.Resampling.LANCZOS)
        return _SIZE.pack(width, height) + _save(shrunk, self.format, self.quality)

    def decode(self, codes: bytes) -> Pixels:
        """The picture at its original size."""
        if self.scale == 1:
            return np.asarray(_open(codes, self.format))
        width, height = _SIZE.unpack_from(codes)
        small = _open(codes[_SIZE.size :], self.format)
        return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))

    def recognize(self, codes: bytes) -> int | None:
        """None: a file format knows no classes."""
        return None


@dataclass(frozen=True)
class ScqPoint:
    """One of our models at one setting.

    entropy: "raw", "rans" or "auto" (the shorter). rate_weight: of rate-aware coding, None for
    the nearest code. base: only the base layer is sent and decoded.
    """

    frames: FrameCodec
    entropy: EntropyChoice = "auto"
    rate_weight: float | None = None
    base: bool = False

    @property
    def codec(self) -> str:
        name = f"scq {self.frames.name}"
        return f"{name}, base layer" if self.base else name

    @property
    def setting(self) -> str:
        if self.base:
            return "s = 1"
        if self.rate_weight is not None:
            return f"rate {self.rate_weight:g}"
        return self.entropy

    def encode(self, image: Pixels) -> bytes:
        """The frame's bytes, cut after the base layer where that is all that is sent."""
        encoded = self.frames.encode(image, entropy=self.entropy, rate_weight=self.rate_weight)
        return encoded.codes[: encoded.stats.base_bytes] if self.base else encoded.codes

    def decode(self, codes: bytes) -> Pixels:
        """The picture at its original size."""
        return self.frames.decode(codes, allow_partial=self.base)

    def recognize(self, codes: bytes) -> int | None:
        """The head's class, None where the model has none."""
        if not self.frames.config.classes:
            return None
        return self.frames.recognize(codes, allow_partial=self.base)[0].class_index


def _save_jpeg(picture: Image.Image, quality: int) -> bytes:
    """4:2:0, tables optimised for the picture; sequential or progressive, whichever is shorter.

    Pillow's quality 0 means its default, so 1 is the lowest.
    """
    options = {"quality": max(1, quality), "subsampling": "4:2:0", "optimize": True}
    files = (_bytes(picture, "JPEG", **options, progressive=order) for order in (False, True))
    return min(files, key=len)


def _save_webp(picture: Image.Image, quality: int) -> bytes:
    return _bytes(picture, "WEBP", quality=quality, method=6)


def _save_avif(picture: Image.Image, quality: int) -> bytes:
    return _bytes(picture, "AVIF", quality=quality, subsampling="4:2:0", speed=6, max_threads=1)


def _save_jxl(picture: Image.Image, quality: int) -> bytes:
    return _bytes(picture, "JXL", quality=quality, effort=7, num_threads=0)


FORMATS = {"jpeg": _save_jpeg, "webp": _save_webp, "avif": _save_avif, "jxl": _save_jxl}


def available_formats() -> tuple[list[str], list[str]]:
    """Formats that this installation can code, and a note for each that it cannot."""
    missing = {name: f"this Pillow has no {name}" for name in ("webp", "avif")
               if not features.check(name)}  # fmt: skip
    if not _has_jxl():
        missing["jxl"] = "JPEG XL needs the compare extra: pip install 'vqstack[compare]'"
    return [name for name in FORMATS if name not in missing], list(missing.values())


def _has_jxl() -> bool:
    try:
        import pillow_jxl  # noqa: F401  registers the format with Pillow
    except ImportError:
        return False
    return True


def _save(picture: Image.Image, format_name: str, quality: int) -> bytes:
    return FORMATS[format_name](picture, quality)


def _bytes(picture: Image.Image, format_name: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format_name, **options)
    return buffer.getvalue()


def _open(codes: bytes, format_name: str) -> Image.Image:
    return Image.open(io.BytesIO(codes), formats=[format_name]).convert("RGB")
