"""Key and delta frames of a clip against key frames alone, at measured bytes and equal quality."""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from scq.bitstream.changes import MODE_NAMES
from scq.codec import FrameCodec
from scq.compare.plots import finish_axes, new_figure, save_figure
from scq.data import ImageSet
from scq.errors import ScqError
from scq.images import Pixels
from scq.metrics import psnr_db

Progress = Callable[[int, int, str], None]

# In squared latent units per bit, as in `suites`.
VIDEO_RATE_WEIGHTS = (0.0, 0.005, 0.02, 0.05, 0.2)


@dataclass(frozen=True)
class VideoOptions:
    """interval: frames from key frame to key frame. step: every step-th frame of the clip is
    taken. limit: at most so many frames, 0 for all."""

    interval: int = 30
    step: int = 1
    limit: int = 48
    rate_weights: tuple[float, ...] = VIDEO_RATE_WEIGHTS

    def __post_init__(self) -> None:
        if self.interval < 2 or self.step < 1 or self.limit < 0 or not self.rate_weights:
            raise ScqError(f"video options out of range: {self}")


@dataclass(frozen=True)
class StreamResult:
    """One stream: rate_weight it was coded with, mean bytes a frame, mean PSNR of the frames.

    key_frames: how many were. modes: latents of the delta frames by mode. encode_ms: median.
    """

    kind: str
    rate_weight: float
    frames: int
    key_frames: int
    mean_bytes: float
    psnr_db: float
    encode_ms: float
    modes: dict[str, int]

    def share(self, mode: str) -> float:
        """Share of delta-frame latents in that mode; 0 without delta frames."""
        total = sum(self.modes.values())
        return self.modes.get(mode, 0) / total if total else 0.0


@dataclass(frozen=True)
class VideoComparison:
    """Both kinds of stream of one clip at several rate weights, in pairs of one weight."""

    clip: str
    size: str
    model: str
    options: VideoOptions
    pairs: tuple[tuple[StreamResult, StreamResult], ...]

    def ratio_at_equal_quality(self, pair: int) -> float | None:
        """Bytes of a key + delta stream over those of key frames alone at its PSNR.

        The key frames' bytes are interpolated in dB between their measured streams, linear in log
        bytes; where the PSNRs agree within 0.05 dB they are taken as they are. None where the
        PSNR lies outside what was measured.
        """
        keys, deltas = self.pairs[pair]
        if abs(keys.psnr_db - deltas.psnr_db) <= 0.05:
            return deltas.mean_bytes / keys.mean_bytes
        curve = sorted((key.psnr_db, math.log(key.mean_bytes)) for key, _ in self.pairs)
        quality = [point[0] for point in curve]
        if not quality[0] <= deltas.psnr_db <= quality[-1]:
            return None
        size = float(np.interp(deltas.psnr_db, quality, [point[1] for point in curve]))
        return deltas.mean_bytes / math.exp(size)


def compare_video(
    codec: FrameCodec,
    clip: ImageSet,
    name: str,
    options: VideoOptions,
    progress: Progress,
) -> VideoComparison:
    """Code a clip as key frames alone and as key + delta frames, decoding every frame.

    Raises:
        ScqError: fewer than two frames, or a model without entropy tables.
    """
    frames = clip.images[:: options.step][: options.limit or None]
    if codec.tables is None:
        raise ScqError(f"model {codec.name!r} has no entropy tables, and delta frames need them")
    if len(frames) < 2:
        raise ScqError(f"a clip of {len(frames)} frame(s) has no changes to code")
    torch.set_num_threads(1)
    pairs = []
    total = len(options.rate_weights)
    for done, weight in enumerate(options.rate_weights):
        progress(done, total, f"rate weight {weight:g}")
        kinds = (("key frames", 1), ("key + delta", options.interval))
        keys, deltas = (_run(codec, frames, kind, spacing, weight) for kind, spacing in kinds)
        pairs.append((keys, deltas))
    progress(total, total, "done")
    size = f"{frames[0].shape[1]}x{frames[0].shape[0]}"
    title = f"{codec.name} ({codec.model_hash[:8]})"
    return VideoComparison(name, size, title, options, tuple(pairs))


def _run(
    codec: FrameCodec, frames: Sequence[Pixels], kind: str, interval: int, weight: float
) -> StreamResult:
    encoder = codec.frame_encoder(keyframe_interval=interval, rate_weight=weight or None)
    decoder = codec.frame_decoder()
    sizes, quality, milliseconds, keys = [], [], [], 0
    modes: Counter[str] = Counter()
    for image in frames:
        encoded = encoder.encode(image)
        sizes.append(len(encoded.codes))
        quality.append(psnr_db(image, decoder.decode(encoded.codes)))
        milliseconds.append(1000 * sum(encoded.stats.seconds.values()))
        keys += encoded.stats.frame_type == "key"
        modes.update(encoded.stats.modes)
    return StreamResult(
        kind=kind,
        rate_weight=weight,
        frames=len(frames),
        key_frames=keys,
        mean_bytes=float(np.mean(sizes)),
        psnr_db=float(np.mean(quality)),
        encode_ms=float(np.median(milliseconds)),
        modes=dict(modes),
    )


def write_video(comparison: VideoComparison, folder: Path, *, plot: bool = True) -> list[Path]:
    """`video-<clip>.csv` and, with `plot`, `.png` in the folder; their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    table = folder / f"video-{Path(comparison.clip).stem}.csv"
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(_COLUMNS)
        for position, pair in enumerate(comparison.pairs):
            ratio = comparison.ratio_at_equal_quality(position)
            writer.writerows(_row(stream, ratio) for stream in pair)
    if not plot:
        return [table]
    figure = new_figure(5, 4)
    axes = figure.subplots()
    for side, marker in ((0, "o-"), (1, "s--")):
        streams = sorted((pair[side] for pair in comparison.pairs), key=lambda s: s.mean_bytes)
        axes.plot([s.mean_bytes for s in streams], [s.psnr_db for s in streams], marker,
                  label=streams[0].kind)  # fmt: skip
    finish_axes(axes, "mean bytes a frame", "PSNR, dB")
    axes.legend(fontsize=8)
    axes.set_title(f"{comparison.clip}, {comparison.model}", fontsize=10)
    save_figure(figure, table.with_suffix(".png"))
    return [table, table.with_suffix(".png")]


_COLUMNS = (
    "kind", "rate_weight", "frames", "key_frames", "mean_bytes", "psnr_db", "encode_ms",
    *MODE_NAMES, "ratio_at_equal_psnr",
)  # fmt: skip


def _row(stream: StreamResult, ratio: float | None) -> list[str]:
    known = ratio is not None and stream.kind != "key frames"
    numbers = (stream.mean_bytes, stream.psnr_db, stream.encode_ms)
    return [
        stream.kind,
        f"{stream.rate_weight:g}",
        str(stream.frames),
        str(stream.key_frames),
        *(f"{number:.6g}" for number in numbers),
        *(f"{stream.share(mode):.4f}" for mode in MODE_NAMES),
        f"{ratio:.4f}" if known else "",
    ]
