"""Key and delta streams of a clip: measured bytes, ratios read at equal quality."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from scq.bitstream import fit_tables
from scq.bitstream.fitting import CodedGrid
from scq.codec import FrameCodec
from scq.compare import VideoComparison, compare_video, write_video
from scq.compare.report import video_section
from scq.compare.video import StreamResult, VideoOptions
from scq.data import ImageSet
from scq.errors import ScqError
from scq.model import ScqAutoencoder

Pixels = NDArray[np.uint8]


@pytest.fixture
def clip(photograph: Pixels) -> ImageSet:
    """Five frames: a still picture with one moving patch."""
    frames = []
    for step in range(5):
        frame = photograph.copy()
        frame[8:16, 8 * step : 8 * step + 8] = 255 - 40 * step
        frames.append(frame)
    return ImageSet(tuple(frames), tuple(map(str, range(5))))


def stream(mean_bytes: float, psnr: float) -> StreamResult:
    return StreamResult("key frames", 0.0, 10, 10, mean_bytes, psnr, 1.0, {})


def comparison(*pairs: tuple[StreamResult, StreamResult]) -> VideoComparison:
    return VideoComparison("clip.mp4", "56x40", "tiny", VideoOptions(), pairs)


def test_streams_are_the_codecs_own(
    tiny_model: ScqAutoencoder, clip: ImageSet, tmp_path: Path
) -> None:
    codec = FrameCodec(tiny_model)
    with pytest.raises(ScqError, match="no entropy tables"):
        compare_video(codec, clip, "clip.mp4", VideoOptions(), lambda *_: None)
    film = []
    for image in clip.images:
        picture = codec.read(codec.encode(image).codes)
        film.append(CodedGrid(picture.assignment, picture.placement.grid))
    code = tiny_model.config.lattice
    tables = fit_tables(film, code, videos=[film], base_clusters=2, other_clusters=2)
    tiny_model.entropy_tensors = tables.to_tensors()
    codec = FrameCodec(tiny_model)
    options = VideoOptions(interval=3, step=2, rate_weights=(0.0,))
    result = compare_video(codec, clip, "clip.mp4", options, lambda *_: None)
    ((keys, deltas),) = result.pairs
    frames = clip.images[::2]
    sizes = [len(codec.encode(frame).codes) for frame in frames]
    assert (keys.frames, keys.key_frames, deltas.key_frames) == (3, 3, 1)
    assert keys.mean_bytes == pytest.approx(sum(sizes) / 3)
    assert keys.psnr_db == pytest.approx(deltas.psnr_db)
    assert sum(deltas.modes.values()) == 2 * 5 * 7
    assert deltas.share("skip") > 0.5
    ratio = result.ratio_at_equal_quality(0)
    assert ratio == pytest.approx(deltas.mean_bytes / keys.mean_bytes)
    written = write_video(result, tmp_path)
    assert [path.name for path in written] == ["video-clip.csv", "video-clip.png"]
    rows = list(csv.DictReader(io.StringIO(written[0].read_text())))
    assert [row["kind"] for row in rows] == ["key frames", "key + delta"]
    assert "One frame in 2 of the clip" in video_section(result, "scq compare")


def test_ratios_are_interpolated_to_equal_quality() -> None:
    low, high = stream(100, 20.0), stream(400, 22.0)
    result = comparison((low, stream(90, 21.0)), (high, stream(200, 22.04)))
    # 21 dB is half way between the key streams: 200 bytes.
    assert result.ratio_at_equal_quality(0) == pytest.approx(90 / math.sqrt(100 * 400))
    assert result.ratio_at_equal_quality(1) == pytest.approx(0.5)
    outside = comparison((low, stream(90, 23.0)), (high, stream(200, 19.0)))
    assert outside.ratio_at_equal_quality(0) is None
    assert "outside the measured range" in video_section(outside, "scq compare")


def test_options_and_clips_out_of_range_are_refused(
    tiny_model: ScqAutoencoder, clip: ImageSet
) -> None:
    with pytest.raises(ScqError, match="out of range"):
        VideoOptions(interval=1)
    assert stream(1, 1).share("skip") == 0
