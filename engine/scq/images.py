"""Pictures at the door: image files to arrays, arrays to the sizes a model takes, and back.

Arrays are numpy uint8 (H, W, 3), RGB. The way a picture is fitted (`Placement`) follows from
its size and the model's config alone, so a decoder needs nothing but the header. Must not know
about codes, bytes on the wire or networks.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile
from torch import Tensor

from scq.errors import ImageTooLarge, InvalidImage
from scq.model import ModelConfig

DEFAULT_MAX_PIXELS = 32_000_000
MAX_SIDE = 0xFFFF

_READERS: tuple[tuple[bytes, Callable[[io.BytesIO], Image.Image]], ...] = (
    (rb"\xff\xd8\xff", JpegImageFile),
    (rb"\x89PNG\r\n\x1a\n", PngImageFile),
    (rb"(?s)RIFF....WEBP", WebPImageFile),
)
# What Pillow's readers raise for damaged bytes.
_DAMAGE = (OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, struct.error)

Pixels = NDArray[np.uint8]


def read_image(data: bytes, max_pixels: int = DEFAULT_MAX_PIXELS) -> Pixels:
    """Decode a JPEG, PNG or WebP file to (H, W, 3) RGB, EXIF orientation applied.

    The size is checked in the file's header, before any pixel is decoded. Transparent parts
    become white, 16-bit samples lose their lower half. Raises ImageTooLarge above `max_pixels`,
    InvalidImage for everything unreadable.
    """
    with _open(data) as image:
        width, height = image.size
        if width * height > max_pixels:
            raise ImageTooLarge(width, height, max_pixels)
        if width < 1 or height < 1:
            raise InvalidImage(f"picture is {width}x{height}, it has no pixels")
        try:
            return np.array(_to_rgb(ImageOps.exif_transpose(image)))
        except _DAMAGE as error:
            raise InvalidImage(f"{image.format} data is truncated or damaged: {error}") from error


def _open(data: bytes) -> Image.Image:
    # Not Image.open: it refuses very large headers without telling their size, and its limit
    # is a process-wide variable. Ours is `max_pixels`.
    reader = next((reader for magic, reader in _READERS if re.match(magic, data)), None)
    if reader is None:
        raise InvalidImage(f"{len(data)} bytes are not a JPEG, PNG or WebP picture")
    try:
        return reader(io.BytesIO(data))
    except _DAMAGE as error:
        raise InvalidImage(f"picture header is damaged or says zero pixels: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # Pillow would clip 16-bit samples at 255 instead of scaling them.
        high_bytes = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
        return Image.fromarray(high_bytes).convert("RGB")
    if image.has_transparency_data:
        over = image.convert("RGBA")
        white = Image.new("RGBA", over.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, over).convert("RGB")
    return image.convert("RGB")


def write_png(image: Pixels) -> bytes:
    """The bytes of a PNG file. Raises InvalidImage for anything but uint8 (H, W, 3)."""
    check_image(image)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()


def check_image(image: Pixels) -> None:
    """Raise InvalidImage unless `image` is uint8 (H, W, 3) with at least one pixel."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise InvalidImage(
            f"image is {image.dtype} {image.shape}, it must be uint8 (H, W, 3) with H, W >= 1"
        )


@dataclass(frozen=True)
class Placement:
    """Where a picture of width x height pixels lies on a model's canvas.

    It is resized to inner_width x inner_height (unless equal), placed at the top left, and its
    last row and column are repeated up to canvas_width x canvas_height, multiples of the stride.
    """

    width: int
    height: int
    inner_width: int
    inner_height: int
    canvas_width: int
    canvas_height: int
    stride: int

    @property
    def letterboxed(self) -> bool:
        """True if pixels were lost to resizing, not just added by padding."""
        return (self.inner_width, self.inner_height) != (self.width, self.height)

    @property
    def grid(self) -> tuple[int, int]:
        """Latent rows and columns."""
        return self.canvas_height // self.stride, self.canvas_width // self.stride


def place(width: int, height: int, config: ModelConfig) -> Placement:
    """The placement of a width x height picture; the same on both ends of the wire."""
    if not (1 <= width <= MAX_SIDE and 1 <= height <= MAX_SIDE):
        raise InvalidImage(f"image is {width}x{height}, both sides must lie in 1..{MAX_SIDE}")
    if config.kind == "crop":
        inner = (config.max_width, config.max_height)
    else:
        inner = _fit_within(width, height, config)
    canvas_width, canvas_height = (-(-side // config.stride) * config.stride for side in inner)
    return Placement(width, height, *inner, canvas_width, canvas_height, config.stride)


def _fit_within(width: int, height: int, config: ModelConfig) -> tuple[int, int]:
    """Largest size of the same aspect inside the model's limits; integers only, rounded half up."""
    limits = config.max_width, config.max_height
    if width <= limits[0] and height <= limits[1]:
        return width, height
    if width * limits[1] >= height * limits[0]:
        numerator, denominator = limits[0], width
    else:
        numerator, denominator = limits[1], height
    scaled = ((2 * side * numerator + denominator) // (2 * denominator) for side in (width, height))
    inner_width, inner_height = (max(1, side) for side in scaled)
    return inner_width, inner_height


def fit_pixels(image: Pixels, config: ModelConfig) -> tuple[Pixels, Placement]:
    """Place a picture on the canvas: uint8 (H, W, 3), and how it was placed.

    The canvas may be the picture itself; it is writable, as torch wants arrays.
    """
    check_image(image)
    placement = place(image.shape[1], image.shape[0], config)
    inner = _resize(image, placement.inner_width, placement.inner_height)
    below = placement.canvas_height - placement.inner_height
    right = placement.canvas_width - placement.inner_width
    if not below and not right:
        return (inner if inner.flags.writeable else inner.copy()), placement
    return np.pad(inner, ((0, below), (0, right), (0, 0)), mode="edge"), placement


def fit_frame(image: Pixels, config: ModelConfig) -> tuple[Tensor, Placement]:
    """`fit_pixels` as float32 (1, 3, H, W) in [0, 1]."""
    canvas, placement = fit_pixels(image, config)
    return to_planes(canvas), placement


def to_planes(canvas: Pixels) -> Tensor:
    """Pixels (H, W, 3) as float32 (1, 3, H, W) in [0, 1]."""
    planes = torch.from_numpy(canvas).permute(2, 0, 1).contiguous()
    return planes[None].float().div_(255.0)


def restore_frame(canvas: Pixels, placement: Placement) -> Pixels:
    """Canvas (H, W, 3) -> the picture at its original size."""
    inner = canvas[: placement.inner_height, : placement.inner_width]
    return _resize(inner, placement.width, placement.height)


def _resize(image: Pixels, width: int, height: int) -> Pixels:
    if image.shape[:2] == (height, width):
        return np.ascontiguousarray(image)
    picture = Image.fromarray(np.ascontiguousarray(image))
    shrinks = width * height < image.shape[0] * image.shape[1]
    method = Image.Resampling.LANCZOS if shrinks else Image.Resampling.BICUBIC
    return np.asarray(picture.resize((width, height), method)).copy()
