"""The tokenizer as one object: picture to coded bytes, coded bytes to picture or labels.

FrameCodec joins one model with images, lattice and bitstream; CodecRegistry finds the codec that
a frame's header asks for. Both are safe to share between threads: nothing changes after
construction. FrameEncoder and FrameDecoder carry one stream of key and delta frames and belong to
one thread at a time. Must not know about services, requests or the environment.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
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
    parse_header,
)
from scq.bitstream.coder import Backend, KeyOptions, make_coder
from scq.bitstream.frame import EntropyChoice
from scq.bitstream.header import Entropy
from scq.errors import (
    CorruptCodes,
    ImageTooLarge,
    ReferenceMismatch,
    ScqError,
    UnknownModel,
    UnsupportedOperation,
)
from scq.images import DEFAULT_MAX_PIXELS, Pixels, Placement, fit_pixels, place, restore_frame
from scq.lattice import LatticeAssignment, LatticeSearch
from scq.model import ScqAutoencoder, load_model
from scq.networks import make_networks
from scq.rate import choose

Stage = Literal["preprocess", "encoder", "quantize", "entropy"]
FrameType = Literal["key", "delta"]
DEFAULT_KEYFRAME_INTERVAL = 30
# Lattice states that are weighed for each latent when bits count too.
RATE_CANDIDATES = 16


@dataclass(frozen=True)
class FrameStats:
    """What coding one frame took.

    coded_bytes: the whole frame, header included. bpp: coded bits per original pixel. seconds:
    wall time by stage. indices, numerators (N, s) int64: code names heaviest first (unused slots
    repeat the first) and weights in 1/denominator. support_sizes (N,) int64: codes per latent.
    frame_type, entropy: what the frame is and how it is coded. modes: latents by mode of a delta
    frame, empty for a key frame. base_bytes: shortest prefix of the frame that shows a picture.
    """

    coded_bytes: int
    bpp: float
    seconds: dict[Stage, float]
    indices: NDArray[np.int64]
    numerators: NDArray[np.int64]
    support_sizes: NDArray[np.int64]
    frame_type: FrameType = "key"
    entropy: Entropy = "raw"
    modes: Mapping[str, int] = field(default_factory=dict)
    base_bytes: int = 0


@dataclass(frozen=True)
class EncodedFrame:
    """The bytes that stand for a picture, and what they took."""

    codes: bytes
    stats: FrameStats


@dataclass(frozen=True)
class CodedPicture:
    """A frame that was read: lattice codes, and where their picture lies.

    complete is False where the bytes were cut and only the base layer is there.
    """

    assignment: LatticeAssignment
    placement: Placement
    complete: bool = True


@dataclass(frozen=True)
class Label:
    """One class of a recognizer: score is its softmax probability, 0..1."""

    name: str
    score: float
    class_index: int


@dataclass(frozen=True)
class StreamOptions:
    """How a stream is coded: a key frame at least every `keyframe_interval` frames.

    entropy, tile, rate_weight as in `FrameCodec.encode`; entropy concerns key frames.
    """

    keyframe_interval: int = DEFAULT_KEYFRAME_INTERVAL
    entropy: EntropyChoice = "auto"
    tile: int | None = None
    rate_weight: float | None = None

    def __post_init__(self) -> None:
        if self.keyframe_interval < 1:
            raise ScqError(f"keyframe_interval must be >= 1, got {self.keyframe_interval}")
        if self.rate_weight is not None and not 0 <= self.rate_weight < math.inf:
            raise ScqError(f"rate_weight must be finite and >= 0, got {self.rate_weight}")


class FrameCodec:
    """One model, ready to code. The model is put into eval mode and must not change afterwards.

    max_pixels bounds the pictures that codes may ask for: a 12-byte header can name 65535 x 65535.
    backend: which SCQ1 coder, see `scq.bitstream.coder.make_coder`; bytes are the same.
    """

    def __init__(
        self,
        model: ScqAutoencoder,
        *,
        max_pixels: int = DEFAULT_MAX_PIXELS,
        backend: Backend = "auto",
    ) -> None:
        self.model = model.eval()
        self.config = model.config
        self.model_hash = model.model_hash
        self.max_pixels = max_pixels
        self.tables: EntropyTables | None = None
        if model.entropy_tensors:
            self.tables = EntropyTables.from_tensors(model.entropy_tensors, self.config.lattice)
        self._coder = make_coder(self.config.lattice, self.tables, backend)
        self._networks = make_networks(model)
        self._search = LatticeSearch(model.quantizer.codebook, self.config.lattice, prepared=True)

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def frame_hash(self) -> bytes:
        """The 4 bytes that frames of this model carry."""
        return bytes.fromhex(self.model_hash)[:4]

    def encode(
        self,
        image: Pixels,
        *,
        entropy: EntropyChoice = "auto",
        tile: int | None = None,
        rate_weight: float | None = None,
    ) -> EncodedFrame:
        """Code a picture, uint8 (H, W, 3) RGB, of any size up to 65535 a side, as a key frame.

        entropy "auto" takes the shorter of RAW and, if the model has tables, rANS. tile: side of
        independent tiles in latents. rate_weight: squared latent error that one bit is worth;
        None or 0 takes the nearest codes. Raises InvalidImage for other arrays, InvalidLatents if
        the encoder yields NaN, UnsupportedOperation for what needs tables that are not there.
        """
        options = StreamOptions(1, entropy, tile, rate_weight)
        latents, placement, times = self.analyse(image)
        assignment = self.quantize(latents, placement, options)
        times.append(time.perf_counter())
        packed = self.pack(assignment, placement, entropy=entropy, tile=tile)
        times.append(time.perf_counter())
        return EncodedFrame(packed.codes, _stats("key", packed, assignment, placement, times))

    def analyse(self, image: Pixels) -> tuple[Tensor, Placement, list[float]]:
        """Latents (1, h, w, F), placement, and the times before, between and after the two."""
        times = [time.perf_counter()]
        canvas, placement = fit_pixels(image, self.config)
        times.append(time.perf_counter())
        latents = self._networks.latents(canvas)
        times.append(time.perf_counter())
        return latents, placement, times

    @torch.inference_mode()
    def quantize(
        self,
        latents: Tensor,
        placement: Placement,
        options: StreamOptions,
        reference: LatticeAssignment | None = None,
    ) -> LatticeAssignment:
        """The lattice codes of latents (1, h, w, F): the nearest, or the best at the rate asked.

        reference: what a delta frame of these codes would change.
        """
        flat = latents.reshape(-1, self.config.code_dim)
        if not options.rate_weight:
            return self._search.search(flat)
        if self.tables is None:
            raise UnsupportedOperation(
                f"rate_weight needs entropy tables and model {self.name!r} has none; leave it out"
            )
        candidates = self._search.candidates(flat, RATE_CANDIDATES, reference)
        return choose(
            candidates,
            placement.grid,
            self.tables,
            options.rate_weight,
            reference,
            tile=options.tile,
        )

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
        return self._coder.pack_key(header, assignment, placement.grid, KeyOptions(entropy, tile))

    def pack_change(
        self,
        assignment: LatticeAssignment,
        placement: Placement,
        reference: LatticeAssignment,
        *,
        tile: int | None = None,
    ) -> PackedFrame:
        """The delta frame that turns `reference` into `assignment`. Needs entropy tables."""
        return self._coder.pack_delta(self.frame_hash, assignment, placement.grid, reference, tile)

    def read(self, codes: bytes, *, allow_partial: bool = False) -> CodedPicture:
        """The lattice codes of a key frame; with allow_partial also of a cut one.

        Raises CorruptCodes, UnknownModel, ImageTooLarge, or ReferenceMismatch for a delta frame.
        """
        placement = self.placement_of(parse_header(codes, allow_partial=allow_partial))
        frame = self._coder.unpack(codes, placement.grid, allow_partial=allow_partial)
        return CodedPicture(frame.assignment, placement, frame.complete)

    def read_change(
        self, codes: bytes, before: CodedPicture, *, allow_partial: bool = False
    ) -> CodedPicture:
        """The lattice codes of a delta frame that changes `before`. Raises as `read`."""
        header = parse_header(codes, allow_partial=allow_partial)
        if header.model_hash != self.frame_hash:
            raise UnknownModel(header.model_hash.hex(), [_title(self)])
        frame = self._coder.unpack(
            codes,
            before.placement.grid,
            reference=before.assignment,
            allow_partial=allow_partial,
        )
        return CodedPicture(frame.assignment, before.placement, frame.complete)

    def decode(self, codes: bytes, *, allow_partial: bool = False) -> Pixels:
        """The picture at its original size, uint8 (H, W, 3).

        Same codes, same machine, same thread count: same bytes. Raises as `read`.
        """
        return self.render(self.read(codes, allow_partial=allow_partial))

    def recognize(self, codes: bytes, *, allow_partial: bool = False) -> list[Label]:
        """Every class with its probability, likeliest first, without decoding a picture.

        Raises as `read`, and UnsupportedOperation when the model has no classifier head.
        """
        return self.label(self.read(codes, allow_partial=allow_partial))

    @torch.inference_mode()
    def render(self, picture: CodedPicture) -> Pixels:
        """A picture that was read, at its original size, uint8 (H, W, 3)."""
        latents = self.model.dequantize(picture.assignment, picture.placement.grid)
        return restore_frame(self._networks.pixels(latents), picture.placement)

    @torch.inference_mode()
    def label(self, picture: CodedPicture) -> list[Label]:
        """The labels of a picture that was read; raises UnsupportedOperation without a head."""
        latents = self.model.dequantize(picture.assignment, picture.placement.grid)
        scores: Tensor = self.model.classify(latents)[0].softmax(0)
        order = scores.argsort(descending=True, stable=True).tolist()
        return [Label(self.config.classes[i], float(scores[i]), i) for i in order]

    def frame_encoder(
        self,
        *,
        keyframe_interval: int = DEFAULT_KEYFRAME_INTERVAL,
        entropy: EntropyChoice = "auto",
        tile: int | None = None,
        rate_weight: float | None = None,
    ) -> FrameEncoder:
        """The encoder of a new stream; options as in `encode`. Raises ScqError for interval < 1."""
        options = StreamOptions(keyframe_interval, entropy, tile, rate_weight)
        return FrameEncoder(self, options)

    def frame_decoder(self) -> FrameDecoder:
        """The decoder of a new stream."""
        return FrameDecoder(self)

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


class FrameEncoder:
    """Codes the pictures of one stream, each frame a change of the one before where it can be.

    The first frame is a key frame, and so is every one of a new size, every one of a model
    without entropy tables, and one where most latents changed and a key frame is shorter.
    """

    def __init__(self, codec: FrameCodec, options: StreamOptions) -> None:
        self._codec = codec
        self._options = options
        self.reset()

    def reset(self) -> None:
        """Forget the last frame: the next one is a key frame."""
        self._last: CodedPicture | None = None
        self._since_key = 0

    def encode(self, image: Pixels, *, force_key: bool = False) -> EncodedFrame:
        """The next picture's frame; force_key for a receiver that lost one. Raises as
        `FrameCodec.encode`, and then the stream is where it was."""
        latents, placement, times = self._codec.analyse(image)
        reference = None if force_key else self._reference(placement)
        assignment = self._codec.quantize(latents, placement, self._options, reference)
        times.append(time.perf_counter())
        packed = self._pack(assignment, placement, reference)
        times.append(time.perf_counter())
        frame_type: FrameType = "delta" if packed.modes else "key"
        self._since_key = self._since_key + 1 if packed.modes else 1
        self._last = CodedPicture(assignment, placement)
        stats = _stats(frame_type, packed, assignment, placement, times)
        return EncodedFrame(packed.codes, stats)

    def _reference(self, placement: Placement) -> LatticeAssignment | None:
        if self._last is None or self._last.placement != placement or self._codec.tables is None:
            return None
        if self._since_key >= self._options.keyframe_interval:
            return None
        return self._last.assignment

    def _pack(
        self,
        assignment: LatticeAssignment,
        placement: Placement,
        reference: LatticeAssignment | None,
    ) -> PackedFrame:
        options, codec = self._options, self._codec
        if reference is None:
            return codec.pack(assignment, placement, entropy=options.entropy, tile=options.tile)
        packed = codec.pack_change(assignment, placement, reference, tile=options.tile)
        if 2 * packed.modes["skip"] > len(assignment):
            return packed
        key = codec.pack(assignment, placement, entropy=options.entropy, tile=options.tile)
        return min(packed, key, key=lambda frame: len(frame.codes))


class FrameDecoder:
    """Reads the frames of one stream in order; delta frames change the last one that was read.

    Frames of any other model are UnknownModel. A frame that raises leaves the stream where it
    was; after a cut frame, whose codes are not all known, only a key frame can follow.
    """

    def __init__(self, codec: FrameCodec) -> None:
        self._codec = codec
        self.reset()

    def reset(self) -> None:
        """Forget the last frame: the next one must be a key frame."""
        self._last: CodedPicture | None = None
        self._last_codes = b""

    def read(self, codes: bytes, *, allow_partial: bool = False) -> CodedPicture:
        """The next frame's lattice codes; the bytes just read give the same again.

        Raises as `FrameCodec.read`; ReferenceMismatch where a key frame must be asked for.
        """
        if self._last is not None and codes == self._last_codes:
            return self._last
        picture = self._read_next(codes, allow_partial)
        self._last = picture
        self._last_codes = codes
        return picture

    def decode(self, codes: bytes, *, allow_partial: bool = False) -> Pixels:
        """The next frame's picture, uint8 (H, W, 3). Raises as `read`."""
        return self._codec.render(self.read(codes, allow_partial=allow_partial))

    def recognize(self, codes: bytes, *, allow_partial: bool = False) -> list[Label]:
        """The next frame's labels. Raises as `read`, and as `FrameCodec.recognize`."""
        return self._codec.label(self.read(codes, allow_partial=allow_partial))

    def _read_next(self, codes: bytes, allow_partial: bool) -> CodedPicture:
        header = parse_header(codes, allow_partial=allow_partial)
        last = self._last
        if not header.is_delta or last is None or not last.complete:
            return self._codec.read(codes, allow_partial=allow_partial)
        return self._codec.read_change(codes, last, allow_partial=allow_partial)


def _stats(
    frame_type: FrameType,
    packed: PackedFrame,
    assignment: LatticeAssignment,
    placement: Placement,
    times: list[float],
) -> FrameStats:
    preprocess, encoder, quantize, entropy = np.diff(times).tolist()
    numerators = assignment.numerators.cpu().numpy()
    return FrameStats(
        coded_bytes=len(packed.codes),
        bpp=8 * len(packed.codes) / (placement.width * placement.height),
        seconds={
            "preprocess": preprocess,
            "encoder": encoder,
            "quantize": quantize,
            "entropy": entropy,
        },
        indices=assignment.indices.cpu().numpy(),
        numerators=numerators,
        support_sizes=(numerators > 0).sum(1),
        frame_type=frame_type,
        entropy=packed.entropy,
        modes=packed.modes,
        base_bytes=packed.base_bytes,
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

    def for_codes(self, codes: bytes, *, allow_partial: bool = False) -> FrameCodec:
        """The codec that the frame's header asks for. Raises CorruptCodes or UnknownModel."""
        return self.by_hash(parse_header(codes, allow_partial=allow_partial).model_hash)

    def decode(self, codes: bytes, *, allow_partial: bool = False) -> Pixels:
        """`FrameCodec.decode` with the model that the header names."""
        codec = self.for_codes(codes, allow_partial=allow_partial)
        return codec.decode(codes, allow_partial=allow_partial)

    def recognize(self, codes: bytes, *, allow_partial: bool = False) -> list[Label]:
        """`FrameCodec.recognize` with the model that the header names."""
        codec = self.for_codes(codes, allow_partial=allow_partial)
        return codec.recognize(codes, allow_partial=allow_partial)


def _title(codec: FrameCodec) -> str:
    return f"{codec.name} ({codec.frame_hash.hex()})"
