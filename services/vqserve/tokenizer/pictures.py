"""Reconstructed pictures to image files. Knows no codec and no protobuf."""

from __future__ import annotations

import io
from typing import Any, Literal

from PIL import Image

from scq.images import Pixels
from vqserve.common.errors import InvalidArgument

ImageFormat = Literal["png", "jpeg", "webp"]

# PNG level 1: a third larger than level 6 at best, several times faster, as lossless.
_SAVE_OPTIONS: dict[ImageFormat, dict[str, Any]] = {
    "png": {"compress_level": 1},
    "jpeg": {"quality": 90},
    "webp": {"lossless": True, "method": 0},
}
_MAX_SIDE: dict[ImageFormat, int] = {"png": 2**31 - 1, "jpeg": 65500, "webp": 16383}
MEDIA_TYPES: dict[ImageFormat, str] = {
    "png": "image/png",
    "jpeg": "image/jpeg",
    "webp": "image/webp",
}


def write_image(pixels: Pixels, image_format: ImageFormat) -> bytes:
    """uint8 (H, W, 3) to an image file; InvalidArgument when the format cannot hold its size."""
    height, width = pixels.shape[:2]
    limit = _MAX_SIDE[image_format]
    if max(width, height) > limit:
        raise InvalidArgument(
            f"a {width}x{height} picture does not fit {image_format} (at most {limit} on a side); "
            "ask for png",
            field="format",
        )
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, image_format.upper(), **_SAVE_OPTIONS[image_format])
    return buffer.getvalue()
