"""Reading videos and pacing them, on a small video made for the test."""

from __future__ import annotations

import asyncio
import io
import time
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vqclient.types import Frame, ImageFormat
from vqclient.video import LiveFrames, VideoError, VideoOptions, VideoReader, parse_size

av = pytest.importorskip("av", reason="needs PyAV: pip install 'vqclient[video]'")

NUM_FRAMES, RATE, WIDTH, HEIGHT = 20, 20, 64, 48


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clip that grows brighter from frame to frame."""
    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.time_base = Fraction(1, RATE)
        for index in range(NUM_FRAMES):
            grey = np.full((HEIGHT, WIDTH, 3), 20 + 10 * index, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(stream.encode())
    return path


def read_all(reader: VideoReader) -> list[bytes]:
    return list(iter(reader.read, None))


def brightness(image: bytes) -> float:
    return float(np.asarray(Image.open(io.BytesIO(image)).convert("RGB")).mean())


def test_every_frame_is_read_in_order(video: Path) -> None:
    with VideoReader(video, VideoOptions()) as reader:
        levels = [brightness(image) for image in read_all(reader)]
    assert len(levels) == NUM_FRAMES
    assert levels == pytest.approx([20 + 10 * index for index in range(NUM_FRAMES)], abs=4)


def test_fewer_frames_per_second_are_spread_over_the_video(video: Path) -> None:
    with VideoReader(video, VideoOptions(fps=5)) as reader:
        assert reader.rate == 5
        levels = [brightness(image) for image in read_all(reader)]
    assert len(levels) == 5
    assert np.diff(levels) == pytest.approx([40] * 4, abs=12)


def test_rate_is_at_most_the_videos(video: Path) -> None:
    with VideoReader(video, VideoOptions(fps=500)) as reader:
        assert reader.rate == RATE
        assert len(read_all(reader)) == NUM_FRAMES


@pytest.mark.parametrize(
    ("image_format", "expected"), [(ImageFormat.JPEG, "JPEG"), (ImageFormat.PNG, "PNG")]
)
def test_frames_are_scaled_image_files(
    video: Path, image_format: ImageFormat, expected: str
) -> None:
    with VideoReader(video, VideoOptions(size=(33, 17), format=image_format)) as reader:
        image = reader.read()
    assert image is not None
    with Image.open(io.BytesIO(image)) as opened:
        assert (opened.format, opened.size) == (expected, (33, 17))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"fps": 0.0}, "fps is 0.0"),
        ({"size": (0, 10)}, "size is 0x10"),
        ({"format": ImageFormat.WEBP}, "cannot be sent as webp"),
    ],
)
def test_senseless_options_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(VideoError, match=message):
        VideoOptions(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["", "640", "640x", "axb", "1x2x3", "-1x5"])
def test_sizes_are_width_x_height(text: str) -> None:
    assert parse_size("640x384") == (640, 384)
    with pytest.raises(VideoError, match="write WIDTHxHEIGHT"):
        parse_size(text)


def test_missing_and_damaged_videos_are_named(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match=r"nope\.mp4: No such file"):
        VideoReader(tmp_path / "nope.mp4", VideoOptions())
    damaged = tmp_path / "damaged.mp4"
    damaged.write_bytes(b"not a video")
    with pytest.raises(VideoError, match=r"damaged\.mp4"):
        VideoReader(damaged, VideoOptions())


async def collect(frames: LiveFrames, work_seconds: float = 0.0) -> list[Frame]:
    collected = []
    async for frame in frames:
        collected.append(frame)
        await asyncio.sleep(work_seconds)
    return collected


async def test_unpaced_frames_all_come(video: Path) -> None:
    with VideoReader(video, VideoOptions()) as reader:
        live = LiveFrames(reader, paced=False, max_frames=7)
        frames = await collect(live)
    assert [frame.seq for frame in frames] == list(range(7))
    assert live.num_dropped == 0
    assert live.sent_bytes == sum(frame.payload_bytes for frame in frames)


async def test_paced_frames_are_due_one_period_apart(video: Path) -> None:
    with VideoReader(video, VideoOptions()) as reader:
        before = time.monotonic_ns()
        frames = await collect(LiveFrames(reader, paced=True, max_frames=5))
    by_seq = {frame.seq: frame.capture_ns for frame in frames}
    origin = by_seq[0]
    assert origin >= before
    assert all(due == origin + seq * 10**9 // RATE for seq, due in by_seq.items())


async def test_a_slow_consumer_gets_the_newest_frames_and_a_count_of_the_dropped(
    video: Path,
) -> None:
    with VideoReader(video, VideoOptions()) as reader:
        live = LiveFrames(reader, paced=True)
        frames = await collect(live, work_seconds=3.2 / RATE)
    assert live.num_dropped > 0
    assert len(frames) + live.num_dropped <= NUM_FRAMES
    assert all(b.seq > a.seq for a, b in pairwise(frames))
