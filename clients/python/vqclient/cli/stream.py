"""`vqclient stream`: a video as a live camera, with the figures of the wire while it runs."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer
from rich.live import Live
from rich.table import Table
from rich.text import Text

from vqclient.cli.coding import EntropyOption, KeyframeOption, RateOption, TileOption
from vqclient.cli.config import TokenizerAddress, connections
from vqclient.cli.run import CliError, command, console
from vqclient.types import (
    Coding,
    EntropyMode,
    FrameResult,
    FrameType,
    ImageFormat,
    Operation,
    StreamOptions,
)
from vqclient.video import LiveFrames, VideoOptions, VideoReader, parse_size

_REFRESH_SECONDS = 0.25
# One frame at work and one on its way: more would only wait, and a camera's frames grow stale.
_MAX_IN_FLIGHT = 2


@dataclass
class StreamFigures:
    """What a stream did so far; latencies in seconds, from a frame's capture to its result.

    Rates count from the first answered frame's capture to the last result.
    """

    first_capture_ns: int = 0
    last_result_ns: int = 0
    latencies: list[float] = field(default_factory=list)
    coded_bytes: int = 0
    bytes_by_type: Counter[FrameType] = field(default_factory=Counter)
    frames_by_type: Counter[FrameType] = field(default_factory=Counter)
    bpp_sum: float = 0.0
    num_dropped_by_server: int = 0
    num_failed: int = 0
    last_error: str = ""
    last_label: str = ""

    def add(self, result: FrameResult) -> None:
        """Count one result."""
        self.num_dropped_by_server += result.dropped_before
        if result.error is not None:
            self.num_failed += 1
            self.last_error = str(result.error)
            return
        self.first_capture_ns = self.first_capture_ns or result.capture_ns
        self.last_result_ns = time.monotonic_ns()
        self.latencies.append((self.last_result_ns - result.capture_ns) / 1e9)
        self.coded_bytes += len(result.codes)
        if result.frame_type is not None:
            self.frames_by_type[result.frame_type] += 1
            self.bytes_by_type[result.frame_type] += len(result.codes)
        self.bpp_sum += result.bpp
        if result.labels:
            self.last_label = f"{result.labels[0].name} {result.labels[0].score:.2f}"

    @property
    def seconds(self) -> float:
        return max(self.last_result_ns - self.first_capture_ns, 1) / 1e9

    @property
    def frames(self) -> int:
        return len(self.latencies)

    def mean_bytes(self, frame_type: FrameType) -> float:
        """Mean size of the frames of one type, in bytes."""
        return self.bytes_by_type[frame_type] / max(self.frames_by_type[frame_type], 1)

    @property
    def mean_bpp(self) -> float:
        return self.bpp_sum / max(self.frames, 1)

    def kilobits_per_second(self, num_bytes: int) -> float:
        """Rate of `num_bytes` over the time so far."""
        return 8 * num_bytes / 1000 / self.seconds

    def latency_ms(self, fraction: float) -> float:
        """The smallest latency that `fraction` of the frames stay within, in milliseconds."""
        if not self.latencies:
            return 0.0
        rank = max(int(-(-fraction * self.frames // 1)), 1)
        return 1000 * sorted(self.latencies)[rank - 1]


@command
async def stream(
    context: typer.Context,
    video: Annotated[Path, typer.Argument(help="Video file that PyAV reads.")],
    model: Annotated[str, typer.Option(help="Tokenizer model.")] = "nav",
    operation: Annotated[Operation, typer.Option(help="encode or recognize.")] = Operation.ENCODE,
    fps: Annotated[float | None, typer.Option(help="Frames per second. [default: all]")] = None,
    max_frames: Annotated[int | None, typer.Option(min=1, help="Stop after so many.")] = None,
    size: Annotated[str | None, typer.Option(metavar="WxH", help="Scale frames first.")] = None,
    frame_format: Annotated[ImageFormat, typer.Option(help="jpeg or png.")] = ImageFormat.JPEG,
    max_age_ms: Annotated[int, typer.Option(min=0, help="Server drops older frames.")] = 0,
    paced: Annotated[bool, typer.Option(help="Camera pace, late frames dropped.")] = True,
    keyframe_interval: KeyframeOption = None,
    entropy: EntropyOption = EntropyMode.AUTO,
    tile_side: TileOption = 0,
    rate_weight: RateOption = 0.0,
    tokenizer_address: TokenizerAddress = None,
) -> None:
    """Stream a video as a camera would, and show bit rate, latency and drops."""
    if operation is Operation.DECODE:
        raise CliError("a video holds pictures, not codes; stream can encode or recognize it")
    chosen_size = None if size is None else parse_size(size)
    options = VideoOptions(fps=fps, size=chosen_size, format=frame_format)
    settings = StreamOptions(
        max_age_ms=max_age_ms,
        top_k=1,
        max_in_flight=_MAX_IN_FLIGHT,
        coding=Coding(entropy, tile_side, rate_weight),
        keyframe_interval=keyframe_interval,
    )
    figures = StreamFigures()
    with VideoReader(video, options) as reader:
        frames = LiveFrames(reader, paced=paced, max_frames=max_frames)
        async with connections(context).tokenizer(tokenizer_address) as client:
            results = client.stream_frames(
                frames, model=model, operation=operation, options=settings
            )
            try:
                await _show(results, figures, frames)
            finally:  # Also when stopped by Ctrl-C, or by a server that goes away.
                _print_summary(figures, frames)
    if figures.num_failed and not figures.frames:
        raise CliError(f"every frame failed; the last: {figures.last_error}")


async def _show(
    results: AsyncIterator[FrameResult], figures: StreamFigures, frames: LiveFrames
) -> None:
    """Read every result; on a terminal, keep one line of figures up to date."""
    shown_at = 0.0
    with Live(console=console, auto_refresh=False, transient=True) as live:
        async for result in results:
            figures.add(result)
            if console.is_terminal and time.perf_counter() - shown_at > _REFRESH_SECONDS:
                live.update(Text(_line(figures, frames)), refresh=True)
                shown_at = time.perf_counter()


def _line(figures: StreamFigures, frames: LiveFrames) -> str:
    label = f" · {figures.last_label}" if figures.last_label else ""
    return (
        f"{figures.frames} frames · {figures.kilobits_per_second(figures.coded_bytes):.1f} kbit/s "
        f"· {figures.mean_bpp:.4f} bpp · p50 {figures.latency_ms(0.5):.0f} ms "
        f"· p99 {figures.latency_ms(0.99):.0f} ms "
        f"· {figures.frames_by_type[FrameType.KEY]} key "
        f"· dropped {frames.num_dropped + figures.num_dropped_by_server}{label}"
    )


def _sizes(figures: StreamFigures, frame_type: FrameType) -> str:
    num_frames = figures.frames_by_type[frame_type]
    return f"{num_frames} of {figures.mean_bytes(frame_type):.0f} bytes each" if num_frames else "0"


def _print_summary(figures: StreamFigures, frames: LiveFrames) -> None:
    if not figures.frames:
        return
    table = Table("figure", "value")
    rows = {
        "frames answered": f"{figures.frames} in {figures.seconds:.1f} s "
        f"({figures.frames / figures.seconds:.1f} per second)",
        "dropped": f"{frames.num_dropped} before sending, "
        f"{frames.num_sent - figures.frames - figures.num_failed} by age",
        "failed": f"{figures.num_failed} {figures.last_error}".strip(),
        "codes": f"{figures.kilobits_per_second(figures.coded_bytes):.1f} kbit/s, "
        f"{figures.mean_bpp:.4f} bpp",
        "key frames": _sizes(figures, FrameType.KEY),
        "delta frames": _sizes(figures, FrameType.DELTA),
        "pictures sent": f"{figures.kilobits_per_second(frames.sent_bytes):.1f} kbit/s",
        "latency": f"p50 {figures.latency_ms(0.5):.1f} ms, p99 {figures.latency_ms(0.99):.1f} ms",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    if figures.last_label:
        table.add_row("last label", figures.last_label)
    console.print(table)
