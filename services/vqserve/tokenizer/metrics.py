"""Prometheus metrics of tokenizerd: bitrate, latency by stage, codebook and solver health, streams.

Labels are model names of the loaded set with their versions (the first 8 digits of the hash) and
small enumerations; never a client or a stream.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from scq.codec import EncodedFrame
from vqserve.tokenizer.probe import HealthSample

UNKNOWN_MODEL = "unknown"
VERSION_DIGITS = 8
MODEL = ("model", "version")
FRAME_SIZE_BUCKETS = tuple(64 * 2**step for step in range(11))
BPP_BUCKETS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2, 0.3, 0.5, 0.8, 1.2)
LATENCY_BUCKETS = (
    0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.025, 0.033, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0,
)  # fmt: skip
STAGE_BUCKETS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
BITRATE_BUCKETS = (1e4, 3e4, 6e4, 1e5, 2e5, 4e5, 8e5, 1.5e6, 3e6, 6e6, 12e6)
STREAM_SECONDS_BUCKETS = (1, 10, 60, 300, 1800, 7200)
AGE_BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.033, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
PSNR_BUCKETS = (15, 18, 20, 22, 24, 26, 28, 30, 32, 35, 40, 50)
COUNT_BUCKETS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128)
KKT_BUCKETS = (1e-15, 1e-14, 1e-13, 1e-12, 1e-11, 1e-10, 1e-9, 1e-8, 1e-7, 1e-6, 1e-5, 1e-3)

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
    """Metrics of frames, whatever the transport. Model names are those of loaded models."""

    def __init__(self, registry: CollectorRegistry, window_frames: int) -> None:
        self._registry = registry
        self._window_frames = window_frames
        self._windows: dict[str, CodebookWindow] = {}
        self._versions: dict[str, str] = {}
        self._add_frame_metrics()
        self._add_size_metrics()
        self._add_stream_metrics()
        self._add_model_metrics()
        self._add_health_metrics()

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, [*MODEL, *labels], registry=self._registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(name, text, [*MODEL, *labels], registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
        return Histogram(name, text, [*MODEL, *labels], buckets=buckets, registry=self._registry)

    def _add_frame_metrics(self) -> None:
        self._frames = self._counter(
            "scq_frames",
            "Frames finished, by outcome (ok, or the gRPC code in lower case).",
            "op",
            "transport",
            "outcome",
        )
        self._dropped = self._counter(
            "scq_frames_dropped", "Stream frames that were not processed.", "reason"
        )
        self._partial = self._counter(
            "scq_partial_decodes",
            "Truncated frames that were read as far as their base layer.",
            "op",
        )
        self._latency = self._histogram(
            "scq_frame_latency_seconds",
            "Time from a frame's arrival to its result.",
            LATENCY_BUCKETS,
            "op",
        )
        self._stages = self._histogram(
            "scq_stage_duration_seconds",
            "Time that one stage of a frame took.",
            STAGE_BUCKETS,
            "stage",
        )

    def _add_size_metrics(self) -> None:
        self._coded_bytes = self._counter(
            "scq_coded_bytes",
            "Bytes of codes received (in) and sent (out).",
            "direction",
            "frame_type",
        )
        self._source_bytes = self._counter(
            "scq_source_bytes", "Bytes of the image files that were encoded."
        )
        self._source_pixels = self._counter(
            "scq_source_pixels", "Pixels of the pictures that were encoded."
        )
        self._frame_size = self._histogram(
            "scq_coded_frame_size_bytes",
            "Size of one coded frame, header included.",
            FRAME_SIZE_BUCKETS,
            "frame_type",
        )
        self._bpp = self._histogram(
            "scq_frame_bpp",
            "Measured bpp of one coded frame: eight times its size over its original pixels.",
            BPP_BUCKETS,
            "frame_type",
        )

    def _add_stream_metrics(self) -> None:
        self.streams_active = Gauge(
            "scq_streams_active", "Frame streams that are open.", registry=self._registry
        )
        self.stream_duration = Histogram(
            "scq_stream_duration_seconds",
            "Time from a stream's start to its end.",
            buckets=STREAM_SECONDS_BUCKETS,
            registry=self._registry,
        )
        self._stream_bitrate = self._histogram(
            "scq_stream_bitrate_bps",
            "Coded rate of one stream over about a second.",
            BITRATE_BUCKETS,
        )
        self._frame_age = self._histogram(
            "scq_frame_age_seconds",
            "Time from a stream frame's capture to the start of its work, beyond that of the "
            "stream's quickest frame: clocks are not synchronised, so delay common to all of a "
            "stream's frames does not show.",
            AGE_BUCKETS,
        )
        self._keyframe_requests = self._counter(
            "scq_keyframe_requests",
            "Key frames that clients asked for (received), and losses of the reference that "
            "clients were told of (sent).",
            "direction",
        )
        self.queue_depth = Gauge(
            "scq_queue_depth",
            "Frames admitted that wait for an engine thread.",
            registry=self._registry,
        )

    def _add_model_metrics(self) -> None:
        self._model_info = self._gauge(
            "scq_model_info",
            "1 while the model is loaded; the labels tell which one it is.",
            "model_hash",
        )
        self._codebook_usage = self._gauge(
            "scq_codebook_usage_ratio",
            f"Share of the codebook used in the last {self._window_frames} frames.",
        )
        self._codebook_perplexity = self._gauge(
            "scq_codebook_perplexity",
            f"Perplexity of the code indices of the last {self._window_frames} frames.",
        )
        self._supports = self._counter(
            "scq_coded_latents",
            "Latents that were encoded, by the number of codes in their support.",
            "support",
        )
        self._modes = self._counter(
            "scq_delta_latents",
            "Latents of delta frames, by how they were coded; skip means unchanged.",
            "mode",
        )

    def _add_health_metrics(self) -> None:
        self._probes = self._counter(
            "scq_health_probes", "Frames that were probed: ok, failed, or skipped when busy.",
            "outcome",
        )  # fmt: skip
        self._psnr = self._histogram(
            "scq_reconstruction_psnr_db", "PSNR of the probed frames after decoding.", PSNR_BUCKETS
        )
        self._iterations = self._histogram(
            "scq_solver_iterations",
            "Iterations of the exact solver, by latent of the probed frames.",
            COUNT_BUCKETS,
        )
        self._solver_support = self._histogram(
            "scq_solver_support_size",
            "Codes in the exact solution, by latent of the probed frames.",
            COUNT_BUCKETS,
        )
        self._kkt_residual = self._histogram(
            "scq_solver_kkt_residual",
            "Distance of the exact solution from optimality (Frank-Wolfe gap, squared latent "
            "units), by latent of the probed frames.",
            KKT_BUCKETS,
        )
        self._fallbacks = self._counter(
            "scq_solver_fallbacks", "Latents that the solver's fast path gave up on."
        )
        self._latent_error = self._gauge(
            "scq_latent_error_ratio",
            "Squared latent error over latent energy in the last probed frame: of the exact "
            "convex solution, and of the lattice codes that were sent.",
            "kind",
        )

    def watch_queue(self, depth: Callable[[], float]) -> None:
        """Read the queue depth from its owner whenever metrics are scraped."""
        self.queue_depth.set_function(depth)

    def model_loaded(self, name: str, model_hash: str, num_codes: int) -> None:
        """Begin the series of a model."""
        self._windows[name] = CodebookWindow(num_codes, self._window_frames)
        self._versions[name] = model_hash[:VERSION_DIGITS]
        self._model_info.labels(*self._model(name), model_hash).set(1)

    def model_unloaded(self, name: str, model_hash: str) -> None:
        """End the gauges of a model; its counters stay."""
        self._model_info.remove(*self._model(name), model_hash)
        self._windows.pop(name, None)
        self._versions.pop(name, None)

    def finished(self, model: str, op: str, transport: str, outcome: str) -> None:
        """Count one frame by what became of it."""
        self._frames.labels(*self._model(model), op, transport, outcome).inc()

    def timed(
        self, model: str, op: str, seconds: float, seconds_by_stage: Mapping[str, float]
    ) -> None:
        """Latency and stage times of one frame."""
        self._latency.labels(*self._model(model), op).observe(seconds)
        for stage, stage_seconds in seconds_by_stage.items():
            self._stages.labels(*self._model(model), stage).observe(stage_seconds)

    def dropped(self, model: str, reason: str) -> None:
        """Count one stream frame that was not processed."""
        self._dropped.labels(*self._model(model), reason).inc()

    def partial(self, model: str, op: str) -> None:
        """Count one truncated frame that was read as far as its base layer."""
        self._partial.labels(*self._model(model), op).inc()

    def keyframe_requested(self, model: str, direction: str) -> None:
        """Count one request for a key frame, "received" from or "sent" to a client."""
        self._keyframe_requests.labels(*self._model(model), direction).inc()

    def bitrate(self, model: str, bits_per_second: float) -> None:
        """The coded rate of one stream over about a second."""
        self._stream_bitrate.labels(*self._model(model)).observe(bits_per_second)

    def aged(self, model: str, seconds: float) -> None:
        """The age of one stream frame beyond its stream's quickest."""
        self._frame_age.labels(*self._model(model)).observe(seconds)

    def encoded(self, model: str, frame: EncodedFrame, source_bytes: int, pixels: int) -> None:
        """Sizes and code use of one frame that was encoded (`source_bytes` in bytes)."""
        labels, stats = self._model(model), frame.stats
        self._source_bytes.labels(*labels).inc(source_bytes)
        self._source_pixels.labels(*labels).inc(pixels)
        self._coded_bytes.labels(*labels, "out", stats.frame_type).inc(stats.coded_bytes)
        self._frame_size.labels(*labels, stats.frame_type).observe(stats.coded_bytes)
        self._bpp.labels(*labels, stats.frame_type).observe(stats.bpp)
        for mode, latents in stats.modes.items():
            self._modes.labels(*labels, mode).inc(latents)
        for size, latents in enumerate(np.bincount(stats.support_sizes).tolist()):
            if latents:
                self._supports.labels(*labels, str(size)).inc(latents)
        # Unused slots of the support repeat an index; only real weights count as use.
        self._codes_used(model, stats.indices[stats.numerators > 0])

    def received(self, model: str, codes: int, frame_type: str) -> None:
        """Size in bytes of one coded frame that came in."""
        self._coded_bytes.labels(*self._model(model), "in", frame_type).inc(codes)

    def probed(self, model: str, outcome: str, sample: HealthSample | None = None) -> None:
        """One probe; `sample` is there when its outcome is "ok"."""
        labels = self._model(model)
        self._probes.labels(*labels, outcome).inc()
        if sample is None:
            return
        self._psnr.labels(*labels).observe(sample.psnr_db)
        self._fallbacks.labels(*labels).inc(sample.fallbacks)
        self._latent_error.labels(*labels, "exact").set(sample.exact_error)
        self._latent_error.labels(*labels, "coded").set(sample.coded_error)
        _observe_all(self._iterations.labels(*labels), sample.iterations)
        _observe_all(self._solver_support.labels(*labels), sample.support_sizes)
        _observe_all(self._kkt_residual.labels(*labels), sample.kkt_residuals)

    def _codes_used(self, model: str, indices: Indices) -> None:
        window = self._windows.get(model)
        if window is None:
            return
        ratio, perplexity = window.add(indices)
        self._codebook_usage.labels(*self._model(model)).set(ratio)
        self._codebook_perplexity.labels(*self._model(model)).set(perplexity)

    def _model(self, name: str) -> tuple[str, str]:
        return name, self._versions.get(name, UNKNOWN_MODEL)


def _observe_all(histogram: Histogram, values: NDArray[np.number]) -> None:
    for value in values.tolist():
        histogram.observe(value)
