"""The picture of the demonstration: original, reconstruction from codes, JPEG near that size."""

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

PANEL_WIDTH = 420
CAPTION_HEIGHT = 26
MARGIN = 8


@dataclass(frozen=True)
class Panel:
    """One picture with a line of text under it."""

    image: Image.Image
    caption: str


def nearest_jpeg(image: Image.Image, target_bytes: int) -> bytes:
    """Return the full-size JPEG whose byte count comes closest to the target.

    JPEG has a floor: at quality 1 a frame still takes several times what its codes take, and
    the caption shows that size.
    """
    files = (_jpeg(image, quality) for quality in range(1, 96))
    return min(files, key=lambda file: abs(len(file) - target_bytes))


def psnr_db(original: Image.Image, other: Image.Image) -> float:
    """Return the peak signal-to-noise ratio of two RGB images of one size, in dB."""
    reference = np.asarray(original.convert("RGB"), dtype=np.float64)
    error = np.mean((reference - np.asarray(other.convert("RGB"), dtype=np.float64)) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255.0**2 / error))


def compose(rows: list[list[Panel]]) -> Image.Image:
    """Lay the panels out, one row a photograph."""
    strips = [_row(panels) for panels in rows]
    width = max(strip.width for strip in strips)
    sheet = Image.new("RGB", (width, sum(strip.height for strip in strips)), "white")
    top = 0
    for strip in strips:
        sheet.paste(strip, (0, top))
        top += strip.height
    return sheet


def _row(panels: list[Panel]) -> Image.Image:
    pictures = [_scaled(panel.image) for panel in panels]
    height = max(picture.height for picture in pictures) + CAPTION_HEIGHT + 2 * MARGIN
    row = Image.new("RGB", (len(panels) * (PANEL_WIDTH + MARGIN) + MARGIN, height), "white")
    draw = ImageDraw.Draw(row)
    for index, (panel, picture) in enumerate(zip(panels, pictures, strict=True)):
        left = MARGIN + index * (PANEL_WIDTH + MARGIN)
        row.paste(picture, (left, MARGIN))
        draw.text((left, MARGIN + picture.height + 5), panel.caption, fill="black", font_size=14)
    return row


def _scaled(image: Image.Image) -> Image.Image:
    height = round(image.height * PANEL_WIDTH / image.width)
    return image.convert("RGB").resize((PANEL_WIDTH, height), Image.Resampling.LANCZOS)


def _jpeg(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=quality, optimize=True)
    return buffer.getvalue()
