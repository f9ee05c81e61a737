"""Binary PPM pictures (netpbm P6), the format of the traffic sign benchmark. Knows bytes only."""

from __future__ import annotations

import re

import numpy as np

from scq.errors import ImageTooLarge, InvalidImage
from scq.images import DEFAULT_MAX_PIXELS, Pixels

# Magic, width, height, maximum, each after white space or comments; one byte ends the header.
_GAP = rb"(?:\s|#[^\n]*\n)+"
_HEADER = re.compile(rb"P6" + _GAP + rb"(\d{1,9})" + _GAP + rb"(\d{1,9})" + _GAP + rb"(\d{1,5})\s")


def read_ppm(data: bytes, max_pixels: int = DEFAULT_MAX_PIXELS) -> Pixels:
    """The picture of a P6 file of 8-bit samples, (H, W, 3) uint8.

    Raises:
        InvalidImage: another format, 16-bit samples, or fewer bytes than the header promises.
        ImageTooLarge: more than `max_pixels`, before anything is decoded.
    """
    header = _HEADER.match(data[:1024])
    if header is None:
        raise InvalidImage("no P6 header; only binary PPM can be read")
    width, height, maximum = (int(number) for number in header.groups())
    if maximum != 255 or width < 1 or height < 1:
        raise InvalidImage(f"PPM of {width}x{height} with maximum {maximum}, it must be 255")
    if width * height > max_pixels:
        raise ImageTooLarge(width, height, max_pixels)
    samples = data[header.end() : header.end() + 3 * width * height]
    if len(samples) < 3 * width * height:
        raise InvalidImage(f"{len(samples)} sample bytes for {width}x{height} pixels: truncated")
    return np.frombuffer(samples, np.uint8).reshape(height, width, 3).copy()
