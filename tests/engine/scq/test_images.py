"""Picture files and the canvas: formats, orientation, hostile headers, exact sizes back."""

from __future__ import annotations

import io
import random
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from scq.errors import ImageTooLarge, InvalidImage
from scq.images import (
    check_image,
    fit_frame,
    fit_pixels,
    place,
    read_image,
    restore_frame,
    write_png,
)
from scq.model import ModelConfig

Pixels = NDArray[np.uint8]

FRAME = ModelConfig("frame", "frame", stride=16, max_width=64, max_height=48)
CROP = ModelConfig("crop", "crop", stride=8, max_width=32, max_height=32, patch=2)


def encoded(image: Image.Image, file_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def png_with_header(width: int, height: int) -> bytes:
    """A tiny PNG file that claims any size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(100))
    signature = b"\x89PNG\r\n\x1a\n"
    return signature + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("file_format", "options"), [("PNG", {}), ("WEBP", {"lossless": True})])
def test_lossless_files_read_back_exactly(
    photograph: Pixels, file_format: str, options: dict[str, object]
) -> None:
    data = encoded(Image.fromarray(photograph), file_format, **options)
    np.testing.assert_array_equal(read_image(data), photograph)


def test_jpeg_reads_close_to_the_original(photograph: Pixels) -> None:
    data = encoded(Image.fromarray(photograph), "JPEG", quality=95, subsampling=0)
    assert np.abs(read_image(data).astype(int) - photograph).mean() < 4


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK"])
def test_every_colour_mode_becomes_rgb(photograph: Pixels, mode: str) -> None:
    picture = Image.fromarray(photograph).convert(mode)
    image = read_image(encoded(picture, "JPEG" if mode == "CMYK" else "PNG"))
    assert image.shape == photograph.shape
    assert image.dtype == np.uint8


def test_sixteen_bit_samples_are_scaled_not_clipped() -> None:
    samples = np.array([[0, 255, 256, 65535]], np.uint16)
    image = read_image(encoded(Image.fromarray(samples), "PNG"))
    assert image[0, :, 0].tolist() == [0, 0, 1, 255]


def test_transparent_parts_become_white() -> None:
    picture = Image.new("RGBA", (2, 1), (200, 0, 0, 255))
    picture.putpixel((1, 0), (200, 0, 0, 0))
    assert read_image(encoded(picture, "PNG")).tolist() == [[[200, 0, 0], [255, 255, 255]]]


def test_exif_orientation_is_applied(photograph: Pixels) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.fromarray(photograph), "PNG", exif=exif)
    np.testing.assert_array_equal(read_image(data), np.rot90(photograph, -1))


@pytest.mark.parametrize(("width", "height"), [(10_000, 10_000), (2**31 - 1, 2**31 - 1)])
def test_huge_headers_are_refused_before_decoding(width: int, height: int) -> None:
    with pytest.raises(ImageTooLarge, match=f"{width}x{height}.*1000000") as caught:
        read_image(png_with_header(width, height), max_pixels=1_000_000)
    assert (caught.value.width, caught.value.height) == (width, height)


def test_the_pixel_limit_is_inclusive(photograph: Pixels) -> None:
    data = write_png(photograph)
    assert read_image(data, max_pixels=photograph.shape[0] * photograph.shape[1]).size
    with pytest.raises(ImageTooLarge):
        read_image(data, max_pixels=photograph.shape[0] * photograph.shape[1] - 1)


@pytest.mark.parametrize(("width", "height"), [(0, 0), (0, 5), (5, 0)])
def test_headers_without_pixels_are_refused(width: int, height: int) -> None:
    with pytest.raises(InvalidImage, match="zero pixels"):
        read_image(png_with_header(width, height))


@pytest.mark.parametrize("data", [b"", b"\xff", b"GIF89a" + bytes(50), b"<svg/>", bytes(1000)])
def test_other_bytes_are_refused_with_the_formats_that_work(data: bytes) -> None:
    with pytest.raises(InvalidImage, match="JPEG, PNG or WebP"):
        read_image(data)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_truncated_files_are_refused(photograph: Pixels, file_format: str, share: float) -> None:
    data = encoded(Image.fromarray(photograph), file_format)
    with pytest.raises(InvalidImage):
        read_image(data[: int(share * len(data))])


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damaged_files_never_raise_anything_else(photograph: Pixels) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    picture = Image.fromarray(photograph)
    files = [encoded(picture, kind, exif=exif) for kind in ("JPEG", "PNG", "WEBP")]
    random_source = random.Random(0)
    refused = 0
    for round_number in range(900):
        data = bytearray(files[round_number % 3])
        for _ in range(random_source.randint(1, 8)):
            data[random_source.randrange(min(len(data), 200))] = random_source.randrange(256)
        try:
            read_image(bytes(data))
        except InvalidImage:
            refused += 1
    assert refused > 100


def test_png_writes_only_uint8_rgb(photograph: Pixels) -> None:
    np.testing.assert_array_equal(read_image(write_png(photograph)), photograph)
    for bad in (photograph[..., 0], photograph[:0], photograph[..., :2], photograph.astype(float)):
        with pytest.raises(InvalidImage, match="uint8"):
            check_image(bad)


@given(st.integers(1, 64), st.integers(1, 48), st.integers(0, 100))
@settings(max_examples=60, deadline=None)
def test_pictures_within_the_limits_come_back_exactly(width: int, height: int, seed: int) -> None:
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    canvas, placement = fit_pixels(image, FRAME)
    assert not placement.letterboxed
    assert canvas.shape[0] % 16 == 0
    assert canvas.shape[1] % 16 == 0
    assert canvas.shape[0] < height + 16
    np.testing.assert_array_equal(restore_frame(canvas, placement), image)


@given(st.integers(1, 65535), st.integers(1, 65535))
@settings(max_examples=300, deadline=None)
def test_every_size_has_a_placement_within_the_model_limits(width: int, height: int) -> None:
    placement = place(width, height, FRAME)
    assert 1 <= placement.inner_width <= 64
    assert 1 <= placement.inner_height <= 48
    assert placement.grid[0] * placement.grid[1] <= 12
    assert placement.letterboxed == (width > 64 or height > 48)
    aspect_error = abs(placement.inner_width * height - placement.inner_height * width)
    assert (
        not placement.letterboxed
        or aspect_error <= max(width, height)
        or 1
        in (
            placement.inner_width,
            placement.inner_height,
        )
    )


@pytest.mark.parametrize("shape", [(200, 300), (1, 500), (500, 1), (49, 64)])
def test_larger_pictures_come_back_at_their_size_and_alike(shape: tuple[int, int]) -> None:
    rows, columns = np.mgrid[0 : shape[0], 0 : shape[1]]
    ramp = (255 * (rows / shape[0] + columns / shape[1]) / 2).astype(np.uint8)
    image = np.repeat(ramp[..., None], 3, 2)
    canvas, placement = fit_pixels(image, FRAME)
    assert placement.letterboxed
    restored = restore_frame(canvas, placement)
    assert restored.shape == image.shape
    assert np.abs(restored.astype(int) - image).mean() < 3


def test_canvases_are_writable_as_torch_wants_them() -> None:
    image = np.zeros((16, 32, 3), np.uint8)
    assert fit_pixels(image, FRAME)[0] is image
    image.flags.writeable = False
    assert fit_pixels(image, FRAME)[0].flags.writeable


def test_padding_repeats_the_edge() -> None:
    image = np.full((3, 5, 3), 200, np.uint8)
    canvas, _ = fit_frame(image, FRAME)
    assert canvas.shape == (1, 3, 16, 16)
    assert bool((canvas == torch.tensor(200 / 255)).all())


def test_crop_models_resize_any_picture_to_their_square() -> None:
    image = np.full((100, 37, 3), 90, np.uint8)
    canvas, placement = fit_pixels(image, CROP)
    assert canvas.shape == (32, 32, 3)
    assert placement.letterboxed
    assert placement.grid == (4, 4)
    np.testing.assert_array_equal(restore_frame(canvas, placement), image)
    assert not place(32, 32, CROP).letterboxed


@pytest.mark.parametrize(("width", "height"), [(0, 1), (1, 0), (65536, 1)])
def test_sizes_that_no_frame_can_hold_are_refused(width: int, height: int) -> None:
    with pytest.raises(InvalidImage, match=r"1\.\.65535"):
        place(width, height, FRAME)
