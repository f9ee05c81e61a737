"""Prometheus metrics of tokenizerd: bitrate, latency by stage, codebook use, streams.

Labels are model names of the loaded set and small enumerations; never a client or a stream.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

# Only key frames exist in bitstream version 1; the label is there for delta frames.
KEY_FRAME = "key"
UNKNOWN_MODEL = "unknown"
FRAME_SIZE_BUCKETS = tuple(64 * 2**step for step in range(11))
BPP_BUCKETS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2, 0.3, 0.5, 0.8, 1.2)
LATENCY_BUCKETS = (
    0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.025, 0.033, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0,
)  # fmt: skip
STAGE_BUCKETS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
BITRATE_BUCKETS = (1e4, 3e4, 6e4, 1e5, 2e5, 4e5, 8e5, 1.5e6, 3e6, 6e6, 12e6)
STREAM_SECONDS_BUCKETS = (1, 10, 60, 300, 1800, 7200)

Indices = NDArray[np.integer]


class CodebookWindow:
    """Use of one codebook over its last `frames` frames. Thread-safe."""

    def __init__(self, num_codes: int, frames: int) -> None:
        self._counts: deque[NDArray[np.int64]] = deque(maxlen=frames)
        self._total = np.zeros(num_codes, np.int64)
        self._lock = threading.Lock()

    def add(self, indices: Indices) -> tuple[float, float]:
        """Count one frame's indices; return (share of codes in use, perplexity)."""
        counts = np.bincount(indices.ravel(), minlength=len(self._total)).astype(np.int64)
        with self._lock:
            if len(self._counts) == self._counts.maxlen:
                self._total -= self._counts[0]
            self._counts.append(counts)
            self._total += counts
            return _usage(self._total)


def _usage(counts: NDArray[np.int64]) -> tuple[float, float]:
    used = counts[counts > 0]
    shares = used / max(1, used.sum())
    perplexity = float(np.exp(-(shares * np.log(shares)).sum()))
    return len(used) / len(counts), perplexity


class ScqMetrics:
    """Metrics of frames, whatever the transport."""

    def __init__(self, registry: CollectorRegistry, window_frames: int) -> None:
        self._window_frames = window_frames
        self._windows: dict[str, CodebookWindow] = {}
        self._add_frame_metrics(registry)
        self._add_size_metrics(registry)
        self._add_stream_metrics(registry)
        self._add_model_metrics(registry)

    def _add_frame_metrics(self, registry: CollectorRegistry) -> None:
        self.frames = Counter(
            "scq_frames",
            "Frames finished, by outcome (ok, or the gRPC code in lower case).",
            ["model", "op", "transport", "outcome"],
            registry=registry,
        )
        self.dropped = Counter(
            "scq_frames_dropped",
            "Stream frames that were not processed.",
            ["model", "reason"],
            registry=registry,
        )
        self.latency = Histogram(
            "scq_frame_latency_seconds",
            "Time from a frame's arrival to its result.",
            ["model", "op"],
            buckets=LATENCY_BUCKETS,
            registry=registry,
        )
        self.stages = Histogram(
            "scq_stage_duration_seconds",
            "Time that one stage of a frame took.",
            ["model", "stage"],
            buckets=STAGE_BUCKETS,
            registry=registry,
        )

    def _add_size_metrics(self, registry: CollectorRegistry) -> None:
        self.coded_bytes = Counter(
            "scq_coded_bytes",
            "Bytes of codes received (in) and sent (out).",
            ["model", "direction", "frame_type"],
            registry=registry,
        )
        self.source_bytes = Counter(
            "scq_source_bytes",
            "Bytes of the image files that were encoded.",
            ["model"],
            registry=registry,
        )
        self.source_pixels = Counter(
            "scq_source_pixels",
            "Pixels of the pictures that were encoded.",
            ["model"],
            registry=registry,
        )
        self.frame_size = Histogram(
            "scq_coded_frame_size_bytes",
            "Size of one coded frame, header included.",
            ["model", "frame_type"],
            buckets=FRAME_SIZE_BUCKETS,
            registry=registry,
        )
        self.bpp = Histogram(
            "scq_frame_bpp",
            "Measured bpp of one coded frame: eight times its size over its original pixels.",
            ["model"],
            buckets=BPP_BUCKETS,
            registry=registry,
        )

    def _add_stream_metrics(self, registry: CollectorRegistry) -> None:
        self.streams_active = Gauge(
            "scq_streams_active", "Frame streams that are open.", registry=registry
        )
        self.stream_duration = Histogram(
            "scq_stream_duration_seconds",
            "Time from a stream's start to its end.",
            buckets=STREAM_SECONDS_BUCKETS,
            registry=registry,
        )
        self.stream_bitrate = Histogram(
            "scq_stream_bitrate_bps",
            "Coded rate of one stream over about a second.",
            ["model"],
            buckets=BITRATE_BUCKETS,
            registry=registry,
        )
        self.queue_depth = Gauge(
            "scq_queue_depth", "Frames admitted that wait for an engine thread.", registry=registry
        )

    def _add_model_metrics(self, registry: CollectorRegistry) -> None:
        self.model_info = Gauge(
            "scq_model_info",
            "1 while the model is loaded; the labels tell which one it is.",
            ["model", "model_hash"],
            registry=registry,
        )
        self.codebook_usage = Gauge(
            "scq_codebook_usage_ratio",
            f"Share of the codebook used in the last {self._window_frames} frames.",
            ["model"],
            registry=registry,
        )
        self.codebook_perplexity = Gauge(
            "scq_codebook_perplexity",
            f"Perplexity of the code indices of the last {self._window_frames} frames.",
            ["model"],
            registry=registry,
        )

    def watch_queue(self, depth: Callable[[], float]) -> None:
        """Read the queue depth from its owner whenever metrics are scraped."""
        self.queue_depth.set_function(depth)

    def model_loaded(self, name: str, model_hash: str, num_codes: int) -> None:
        """Begin the series of a model."""
        self._windows[name] = CodebookWindow(num_codes, self._window_frames)
        self.model_info.labels(name, model_hash).set(1)

    def model_unloaded(self, name: str, model_hash: str) -> None:
        """End the gauges of a model; its counters stay."""
        self._windows.pop(name, None)
        self.model_info.remove(name, model_hash)

    def encoded(self, model: str, codes: int, source_bytes: int, pixels: int) -> None:
        """Sizes of one frame that was encoded (`codes` and `source_bytes` in bytes)."""
        self.source_bytes.labels(model).inc(source_bytes)
        self.source_pixels.labels(model).inc(pixels)
        self.coded_bytes.labels(model, "out", KEY_FRAME).inc(codes)
        self.frame_size.labels(model, KEY_FRAME).observe(codes)
        self.bpp.labels(model).observe(8 * codes / pixels)

    def received(self, model: str, codes: int) -> None:
        """Size in bytes of one coded frame that came in."""
        self.coded_bytes.labels(model, "in", KEY_FRAME).inc(codes)

    def codebook_used(self, model: str, indices: Indices) -> None:
        """Code indices of one encoded frame."""
        window = self._windows.get(model)
        if window is None:
            return
        ratio, perplexity = window.add(indices)
        self.codebook_usage.labels(model).set(ratio)
        self.codebook_perplexity.labels(model).set(perplexity)

    def staged(self, model: str, seconds_by_stage: Mapping[str, float]) -> None:
        """Stage times of one frame."""
        for stage, seconds in seconds_by_stage.items():
            self.stages.labels(model, stage).observe(seconds)
