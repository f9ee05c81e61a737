"""The llm_* metric families and the two objects that write them.

Every family carries the label `model`. The engine's thread and the event loop both write here;
prometheus_client locks each value.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from vqllm.model_info import ModelInfo
from vqllm.runtime.engine import EngineStats

_TIME_TO_FIRST_TOKEN = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0),
)
_TOKEN_GAP = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_REQUEST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0)
_TOKENS = (1, 4, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
_BATCH = (1, 2, 4, 8, 16, 32, 64)
_INFO_LABELS = (
    *("model", "architecture", "quant", "bits", "avg_bits", "group_size"),
    *("revision", "executor"),
)


@dataclass(frozen=True)
class FinishedSequence:
    """What is counted once per request, when it has left the engine. Durations in seconds."""

    reason: str
    num_prompt_tokens: int
    num_output_tokens: int
    first_token_after: float | None
    total: float


class LlmMetrics:
    """All llm_* families of one process."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self.running = self._gauge("requests_running", "Sequences in the running batch.")
        self.waiting = self._gauge("requests_waiting", "Sequences waiting to be admitted.")
        self.kv_usage = self._gauge(
            "kv_cache_usage_ratio", "Share of the KV cache's token slots in use, 0 to 1."
        )
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens processed.")
        self.generation_tokens = self._counter("generation_tokens", "Tokens generated.")
        self.requests = self._counter(
            "requests", "Requests that left the engine, by finish reason.", "finish_reason"
        )
        self.rejected = self._counter(
            "requests_rejected", "Requests refused before the engine, by reason.", "reason"
        )
        self.engine_failures = self._counter("engine_failures", "Engine steps that failed.")
        self.info = Gauge(
            "llm_model_info", "Loaded models, always 1.", _INFO_LABELS, registry=registry
        )
        self._add_engine()
        self._add_latencies()
        self._add_sizes()

    def _add_engine(self) -> None:
        self.pages_used = self._gauge("kv_pages_used", "Pages of the KV cache that are held.")
        self.pages_total = self._gauge("kv_pages", "Pages of the KV cache that exist.")
        self.tokens_per_second = self._gauge(
            "generation_tokens_per_second", "Tokens generated in the last ten seconds, per second."
        )
        self.prefix_hits = self._counter(
            "prefix_hit_tokens", "Prompt tokens found in the KV cache, so not computed again."
        )
        self.preemptions = self._counter(
            "preemptions", "Sequences that lost their pages to older ones and started over."
        )
        self.drafted = self._counter("drafted_tokens", "Tokens guessed ahead.")
        self.accepted = self._counter("accepted_tokens", "Guessed tokens that were right.")

    def _add_latencies(self) -> None:
        self.time_to_first_token = self._histogram(
            "time_to_first_token_seconds",
            "From arrival to the first token, in seconds.",
            _TIME_TO_FIRST_TOKEN,
        )
        self.inter_token_latency = self._histogram(
            "inter_token_latency_seconds",
            "Between two tokens of a sequence, in seconds, once per gap.",
            _TOKEN_GAP,
        )
        self.time_per_output_token = self._histogram(
            "time_per_output_token_seconds",
            "Mean time per token after the first, in seconds, once per request.",
            _TOKEN_GAP,
        )
        self.e2e_latency = self._histogram(
            "e2e_request_latency_seconds", "From arrival to the end, in seconds.", _REQUEST
        )
        self.step_duration = self._histogram(
            "step_duration_seconds", "Duration of one engine step, in seconds.", _TOKEN_GAP
        )

    def _add_sizes(self) -> None:
        self.request_prompt_tokens = self._histogram(
            "request_prompt_tokens", "Prompt length of a request, in tokens.", _TOKENS
        )
        self.request_generation_tokens = self._histogram(
            "request_generation_tokens", "Answer length of a request, in tokens.", _TOKENS
        )
        self.step_batch_size = self._histogram(
            "step_batch_size", "Sequences advanced by one engine step.", _BATCH
        )

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"llm_{name}", text, ("model",), registry=self._registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"llm_{name}", text, ("model", *labels), registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"llm_{name}", text, ("model",), registry=self._registry, buckets=buckets)


class RecentRate:
    """Events per second over the last ten seconds; safe to read from another thread."""

    _SECONDS = 10

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_second: deque[tuple[int, int]] = deque(maxlen=self._SECONDS + 1)

    def add(self, count: int) -> None:
        """Count events that happen now."""
        second = int(time.monotonic())
        with self._lock:
            if self._by_second and self._by_second[-1][0] == second:
                count += self._by_second.pop()[1]
            self._by_second.append((second, count))

    def per_second(self) -> float:
        """Mean over the last ten whole seconds."""
        now = int(time.monotonic())
        with self._lock:
            recent = [n for second, n in self._by_second if now - self._SECONDS <= second < now]
        return sum(recent) / self._SECONDS


class ModelMetrics:
    """The llm_* series of one loaded model."""

    def __init__(self, families: LlmMetrics, model: str) -> None:
        self._families = families
        self._model = model
        self._info_labels: tuple[str, ...] | None = None
        self._running = families.running.labels(model)
        self._waiting = families.waiting.labels(model)
        self._kv_usage = families.kv_usage.labels(model)
        self._prompt_tokens = families.prompt_tokens.labels(model)
        self._generation_tokens = families.generation_tokens.labels(model)
        self._first_token = families.time_to_first_token.labels(model)
        self._gap = families.inter_token_latency.labels(model)
        self._rate = RecentRate()
        families.tokens_per_second.labels(model).set_function(self._rate.per_second)
        self._previous: EngineStats | None = None
        self._step_duration = families.step_duration.labels(model)
        self._step_batch_size = families.step_batch_size.labels(model)
        for reason in ("stop", "length", "abort", "error"):
            families.requests.labels(model, reason)

    def describe(self, info: ModelInfo, executor: str) -> None:
        """Publish the model's facts as llm_model_info."""
        self._info_labels = (
            *(self._model, info.architecture, info.method, str(info.bits), f"{info.bpw:.4g}"),
            *(str(info.group_size), info.revision, executor),
        )
        self._families.info.labels(*self._info_labels).set(1)

    def forget(self) -> None:
        """Drop the gauges of an unloaded model; counters keep their last value."""
        families = self._families
        loads = (families.running, families.waiting, families.kv_usage)
        engine = (families.pages_used, families.pages_total, families.tokens_per_second)
        for gauge in (*loads, *engine):
            gauge.remove(self._model)
        if self._info_labels is not None:
            self._families.info.remove(*self._info_labels)

    def load(self, stats: EngineStats) -> None:
        """Set the load gauges and count what the engine's totals gained."""
        families, model = self._families, self._model
        self._running.set(stats.running)
        self._waiting.set(stats.waiting)
        self._kv_usage.set(stats.kv_tokens_used / max(1, stats.kv_tokens_capacity))
        families.pages_used.labels(model).set(stats.pages_used)
        families.pages_total.labels(model).set(stats.pages_total)
        counters = {
            "prefix_hit_tokens": families.prefix_hits,
            "preemptions": families.preemptions,
            "drafted_tokens": families.drafted,
            "accepted_tokens": families.accepted,
        }
        for total, counter in counters.items():
            before = 0 if self._previous is None else getattr(self._previous, total)
            counter.labels(model).inc(getattr(stats, total) - before)
        self._previous = stats

    def step(self, seconds: float, num_sequences: int) -> None:
        """Count one engine step."""
        self._step_duration.observe(seconds)
        self._step_batch_size.observe(num_sequences)

    def prefilled(self, num_prompt_tokens: int, first_token_after: float) -> None:
        """Count a prompt that has been processed and its first token's latency in seconds."""
        self._prompt_tokens.inc(num_prompt_tokens)
        self._first_token.observe(first_token_after)

    def tokens(self, num_tokens: int, gap_seconds: float | None) -> None:
        """Count new tokens; `gap_seconds` since the sequence's previous one, if there was one."""
        self._generation_tokens.inc(num_tokens)
        self._rate.add(num_tokens)
        if gap_seconds is not None:
            for _ in range(num_tokens):
                self._gap.observe(gap_seconds / num_tokens)

    def rejected(self, reason: str) -> None:
        """Count a request that the engine never saw."""
        self._families.rejected.labels(self._model, reason).inc()

    def engine_failed(self) -> None:
        """Count a step that raised."""
        self._families.engine_failures.labels(self._model).inc()

    def finished(self, sequence: FinishedSequence) -> None:
        """Count a request that has left the engine."""
        families, model = self._families, self._model
        families.requests.labels(model, sequence.reason).inc()
        families.request_prompt_tokens.labels(model).observe(sequence.num_prompt_tokens)
        families.request_generation_tokens.labels(model).observe(sequence.num_output_tokens)
        families.e2e_latency.labels(model).observe(sequence.total)
        num_gaps = sequence.num_output_tokens - 1
        if num_gaps > 0 and sequence.first_token_after is not None:
            decode = sequence.total - sequence.first_token_after
            families.time_per_output_token.labels(model).observe(decode / num_gaps)
