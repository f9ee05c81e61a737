"""Tiny models, pictures and codecs for tests of tokenizerd. Used by no service."""

from __future__ import annotations

import io
import struct
import threading
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from scq.bitstream.header import sealed
from scq.codec import CodedPicture, FrameCodec, Label
from scq.images import Pixels, Placement
from scq.model import ModelConfig, ScqAutoencoder, save_model
from support.lattices import random_tables
from vqserve.tokenizer.codecs import ServedModel
from vqserve.tokenizer.loading import serve
from vqserve.tokenizer.pictures import write_image

LABELLED = ModelConfig(
    "labelled",
    "frame",
    stride=16,
    max_width=256,
    max_height=256,
    num_codes=32,
    classes=("car", "tree", "sign"),
    encoder_widths=(8, 8, 8),
    decoder_widths=(8, 8, 8),
    decoder_blocks=(1, 1, 1),
    head_width=8,
)
PLAIN = replace(LABELLED, name="plain", classes=())
NAN = replace(PLAIN, name="nan")


def tiny_model(config: ModelConfig) -> ScqAutoencoder:
    """An untrained model, always the same. "labelled" has entropy tables, which fit nothing it
    codes; the one called "nan" encodes everything to NaN."""
    torch.manual_seed(0)
    model = ScqAutoencoder(config).eval().requires_grad_(False)
    if config.name == NAN.name:
        for parameter in model.encoder.parameters():
            parameter.fill_(float("nan"))
    if config.name == LABELLED.name:
        model.entropy_tensors = random_tables(config.lattice).to_tensors()
    return model


def write_models(folder: Path) -> str:
    """The two sound models as files; returns the value for --models."""
    paths = []
    for config in (LABELLED, PLAIN):
        path = folder / f"{config.name}.safetensors"
        save_model(tiny_model(config), path)
        paths.append(str(path))
    return ",".join(paths)


def picture(width: int = 48, height: int = 32, seed: int = 0) -> Pixels:
    """A smooth picture with a little noise, uint8 (height, width, 3)."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width]
    planes = [rows * 255 / height, columns * 255 / width, (rows + columns) % 256]
    noisy = np.stack(planes, axis=2) + rng.normal(0, 4, (height, width, 3))
    return noisy.clip(0, 255).astype(np.uint8)


def image_file(image_format: str = "PNG", width: int = 48, height: int = 32) -> bytes:
    """`picture` as an image file."""
    buffer = io.BytesIO()
    Image.fromarray(picture(width, height)).save(buffer, image_format)
    return buffer.getvalue()


def image_bytes(pixels: Pixels) -> bytes:
    """The PNG file that the service makes of a picture."""
    return write_image(pixels, "png")


def png_claiming(width: int, height: int) -> bytes:
    """A PNG whose header claims a size that its few bytes of data do not have."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(bytes(64))),
        (b"IEND", b""),
    ]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


def resealed(codes: bytes, base_end: int | None = None) -> bytes:
    """The frame with checks that fit what is in it now; its base layer ends at `base_end`, or is
    all of it."""
    return sealed(codes, min(base_end or len(codes), len(codes)))


class BlockingCodec(FrameCodec):
    """A codec whose encoder waits until it is told to go on, and that counts its calls."""

    def __init__(self, model: ScqAutoencoder, max_pixels: int) -> None:
        super().__init__(model, max_pixels=max_pixels)
        self.entered = threading.Event()
        self.release = threading.Event()
        self.encode_calls = 0
        self.label_calls = 0

    def analyse(self, image: Pixels) -> tuple[Tensor, Placement, list[float]]:
        """Wait for `release`, then encode."""
        self.encode_calls += 1
        self.entered.set()
        self.release.wait(30)
        return super().analyse(image)

    def label(self, picture: CodedPicture) -> list[Label]:
        """Label at once."""
        self.label_calls += 1
        return super().label(picture)


def blocking_model(max_image_pixels: int) -> tuple[ServedModel, BlockingCodec]:
    """The labelled model behind a BlockingCodec."""
    model = tiny_model(LABELLED)
    codec = BlockingCodec(model, max_image_pixels)
    return replace(serve(model, max_image_pixels), codec=codec), codec
