"""The tokenizer as one object: picture to coded bytes, coded bytes to picture or labels.

FrameCodec joins one model with images, lattice and bitstream; CodecRegistry finds the codec that
a frame's header asks for. Both are safe to share between threads: nothing changes after
construction. Must not know about services, requests or the environment.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scq import zoo
from scq.bitstream import (
    EntropyTables,
    FrameHeader,
    KeyHeader,
    PackedFrame,
    UnpackedFrame,
    pack_key_frame,
    parse_header,
    unpack,
)
from scq.bitstream.frame import EntropyChoice
from scq.errors import CorruptCodes, ImageTooLarge, ReferenceMismatch, ScqError, UnknownModel
from scq.images import DEFAULT_MAX_PIXELS, Pixels, Placement, fit_frame, place, restore_frame
from scq.lattice import LatticeAssignment
from scq.model import ScqAutoencoder, load_model

Stage = Literal["preprocess", "encoder", "quantize", "entropy"]


@dataclass(frozen=True)
class FrameStats:
    """What coding one frame took.

    coded_bytes: the whole frame, header included. bpp: coded bits per original pixel. seconds:
    wall time by stage. indices, numerators (N, s) int64: code names heaviest first (unused slots
    repeat the first) and weights in 1/denominator. support_sizes (N,) int64: codes per latent.
    """

    coded_bytes: int
    bpp: float
    seconds: dict[Stage, float]
    indices: NDArray[np.int64]
    numerators: NDArray[np.int64]
    support_sizes: NDArray[np.int64]


@dataclass(frozen=True)
class EncodedFrame:
    """The bytes that stand for a picture, and what they took."""

    codes: bytes
    stats: FrameStats


@dataclass(frozen=True)
class Label:
    """One class of a recognizer: score is its softmax probability, 0..1."""

    name: str
    score: float
    class_index: int


class FrameCodec:
    """One model, ready to code. The model is put into eval mode and must not change afterwards.

    max_pixels bounds the pictures that codes may ask for: a 16-byte header can name 65535 x 65535.
    """

    def __init__(self, model: ScqAutoencoder, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> None:
        self.model = model.eval()
        self.config = model.config
        self.model_hash = model.model_hash
        self.max_pixels = max_pixels
        self.tables: EntropyTables | None = None
        if model.entropy_tensors:
            self.tables = EntropyTables.from_tensors(model.entropy_tensors, self.config.lattice)

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def frame_hash(self) -> bytes:
        """The 4 bytes that frames of this model carry."""
        return bytes.fromhex(self.model_hash)[:4]

    @torch.inference_mode()
    def encode(self, image: Pixels) -> EncodedFrame:
        """Code a picture, uint8 (H, W, 3) RGB, of any size up to 65535 a side.

        Raises InvalidImage for other arrays, InvalidLatents if the encoder yields NaN.
        """
        times = [time.perf_counter()]
        canvas, placement = fit_frame(image, self.config)
        times.append(time.perf_counter())
        latents = self.model.encode(canvas)
        times.append(time.perf_counter())
        assignment = self.model.quantize(latents)
        times.append(time.perf_counter())
        packed = self.pack(assignment, placement)
        times.append(time.perf_counter())
        return EncodedFrame(packed.codes, _stats(packed.codes, assignment, placement, times))

    def pack(
        self,
        assignment: LatticeAssignment,
        placement: Placement,
        *,
        entropy: EntropyChoice = "auto",
        tile: int | None = None,
    ) -> PackedFrame:
        """The key frame of lattice codes, which may have been made elsewhere, e.g. on a phone."""
        header = KeyHeader(
            placement.width, placement.height, self.frame_hash, placement.letterboxed
        )
        return pack_key_frame(
            header,
            assignment,
            self.config.lattice,
            placement.grid,
            tables=self.tables,
            tile=tile,
            entropy=entropy,
        )

    def unpack(
        self, codes: bytes, *, allow_partial: bool = False
    ) -> tuple[UnpackedFrame, Placement]:
        """The codes of a key frame. Raises CorruptCodes, UnknownModel or ImageTooLarge."""
        placement = self.placement_of(parse_header(codes, allow_partial=allow_partial))
        frame = unpack(
            codes,
            self.config.lattice,
            placement.grid,
            tables=self.tables,
            allow_partial=allow_partial,
        )
        return frame, placement

    @torch.inference_mode()
    def decode(self, codes: bytes) -> Pixels:
        """The picture at its original size, uint8 (H, W, 3).

        Same codes, same machine, same thread count: same bytes. Raises CorruptCodes,
        UnknownModel or ImageTooLarge.
        """
        frame, placement = self.unpack(codes)
        assignment = frame.assignment
        latents = self.model.dequantize(assignment, placement.grid)
        return restore_frame(self.model.decode(latents), placement)

    @torch.inference_mode()
    def recognize(self, codes: bytes) -> list[Label]:
        """Every class with its probability, likeliest first, without decoding a picture.

        Raises as `decode`, and UnsupportedOperation when the model has no classifier head.
        """
        frame, placement = self.unpack(codes)
        assignment = frame.assignment
        latents = self.model.dequantize(assignment, placement.grid)
        scores: Tensor = self.model.classify(latents)[0].softmax(0)
        order = scores.argsort(descending=True, stable=True).tolist()
        return [Label(self.config.classes[i], float(scores[i]), i) for i in order]

    def placement_of(self, header: FrameHeader) -> Placement:
        """Where a key frame's picture lies. Raises CorruptCodes, UnknownModel, ImageTooLarge."""
        if header.model_hash != self.frame_hash:
            raise UnknownModel(header.model_hash.hex(), [_title(self)])
        if header.is_delta:
            raise ReferenceMismatch(header.reference or 0, None)
        if header.width * header.height > self.max_pixels:
            raise ImageTooLarge(header.width, header.height, self.max_pixels)
        placement = place(header.width, header.height, self.config)
        if header.letterboxed != placement.letterboxed:
            raise CorruptCodes(
                f"letterboxed flag is {header.letterboxed}, but model {self.name!r} gives "
                f"{placement.letterboxed} for {header.width}x{header.height}"
            )
        return placement

    def inspect(self, codes: bytes) -> FrameHeader:
        """The frame's verified header. Raises CorruptCodes."""
        return parse_header(codes)


def _stats(
    codes: bytes, assignment: LatticeAssignment, placement: Placement, times: list[float]
) -> FrameStats:
    preprocess, encoder, quantize, entropy = np.diff(times).tolist()
    numerators = assignment.numerators.cpu().numpy()
    return FrameStats(
        coded_bytes=len(codes),
        bpp=8 * len(codes) / (placement.width * placement.height),
        seconds={
            "preprocess": preprocess,
            "encoder": encoder,
            "quantize": quantize,
            "entropy": entropy,
        },
        indices=assignment.indices.cpu().numpy(),
        numerators=numerators,
        support_sizes=(numerators > 0).sum(1),
    )


class CodecRegistry:
    """The codecs that are loaded, by model name and by the 4-byte hash in a frame."""

    def __init__(
        self, models: Iterable[ScqAutoencoder], *, max_pixels: int = DEFAULT_MAX_PIXELS
    ) -> None:
        """Raises ScqError when two models share a name or a 4-byte hash."""
        self._by_name: dict[str, FrameCodec] = {}
        self._by_hash: dict[bytes, FrameCodec] = {}
        for model in models:
            self._add(FrameCodec(model, max_pixels=max_pixels))

    def _add(self, codec: FrameCodec) -> None:
        if codec.name in self._by_name or codec.frame_hash in self._by_hash:
            raise ScqError(f"model {_title(codec)} is loaded twice; give each its own name")
        self._by_name[codec.name] = codec
        self._by_hash[codec.frame_hash] = codec

    @classmethod
    def from_zoo(
        cls, names: Sequence[str] | None = None, *, max_pixels: int = DEFAULT_MAX_PIXELS
    ) -> CodecRegistry:
        """The shipped models called `names`, or all of them. Raises UnknownModel."""
        chosen = [info.name for info in zoo.list_models()] if names is None else names
        return cls((zoo.load(name) for name in chosen), max_pixels=max_pixels)

    @classmethod
    def from_paths(
        cls, paths: Iterable[Path | str], *, max_pixels: int = DEFAULT_MAX_PIXELS
    ) -> CodecRegistry:
        """Models from files written by `save_model`. Raises ScqError for unusable files."""
        return cls((load_model(path) for path in paths), max_pixels=max_pixels)

    @property
    def names(self) -> list[str]:
        """Model names, sorted."""
        return sorted(self._by_name)

    def get(self, name: str) -> FrameCodec:
        """The codec of the model called `name`. Raises UnknownModel."""
        if name not in self._by_name:
            raise UnknownModel(name, self.names)
        return self._by_name[name]

    def by_hash(self, frame_hash: bytes) -> FrameCodec:
        """The codec of the model whose id starts with these 4 bytes. Raises UnknownModel."""
        if frame_hash not in self._by_hash:
            titles = [_title(codec) for codec in self._by_name.values()]
            raise UnknownModel(frame_hash.hex(), titles)
        return self._by_hash[frame_hash]

    def for_codes(self, codes: bytes) -> FrameCodec:
        """The codec that the frame's header asks for. Raises CorruptCodes or UnknownModel."""
        return self.by_hash(parse_header(codes).model_hash)

    def decode(self, codes: bytes) -> Pixels:
        """`FrameCodec.decode` with the model that the header names."""
        return self.for_codes(codes).decode(codes)

    def recognize(self, codes: bytes) -> list[Label]:
        """`FrameCodec.recognize` with the model that the header names."""
        return self.for_codes(codes).recognize(codes)


def _title(codec: FrameCodec) -> str:
    return f"{codec.name} ({codec.frame_hash.hex()})"
