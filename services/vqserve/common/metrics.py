"""Prometheus metrics that both services expose, and the registry that holds all of them.

One registry per process. Labels come from small closed sets (never ids or raw paths).
"""

from __future__ import annotations

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.responses import Response

DURATION_BUCKETS = (
    0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0,
)  # fmt: skip
REJECTION_REASONS = ("queue_full", "too_large", "draining", "not_ready", "deadline")

prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]


class ServerMetrics:
    """Metrics of the server itself. Services register theirs in `registry`."""

    def __init__(self, service: str, version: str, commit: str = "unknown") -> None:
        self.registry = CollectorRegistry()
        self.service = service
        self._build_info = Gauge(
            "build_info",
            "Always 1; the labels tell which build is running.",
            ["service", "version", "commit", "contract"],
            registry=self.registry,
        )
        self._build_info.labels(service, version, commit, "v1").set(1)
        self._add_server_metrics()
        self._add_transport_metrics()

    def _add_server_metrics(self) -> None:
        self.ready = Gauge(
            "server_ready", "1 while new requests should be sent here.", registry=self.registry
        )
        self.draining = Gauge(
            "server_draining", "1 once shutdown has begun.", registry=self.registry
        )
        self.requests_in_flight = Gauge(
            "server_requests_in_flight", "Requests being served.", registry=self.registry
        )
        self.event_loop_lag = Gauge(
            "server_event_loop_lag_seconds",
            "How late the last heartbeat of the event loop was.",
            registry=self.registry,
        )
        self.admission_rejections = Counter(
            "server_admission_rejections",
            "Requests refused before any work was done.",
            ["service", "reason"],
            registry=self.registry,
        )
        for reason in REJECTION_REASONS:
            self.admission_rejections.labels(self.service, reason)

    def _add_transport_metrics(self) -> None:
        call_labels = ["grpc_type", "grpc_service", "grpc_method"]
        self.grpc_started = Counter(
            "grpc_server_started", "RPCs started.", call_labels, registry=self.registry
        )
        self.grpc_handled = Counter(
            "grpc_server_handled",
            "RPCs ended, by status code.",
            [*call_labels, "grpc_code"],
            registry=self.registry,
        )
        self.grpc_handling = Histogram(
            "grpc_server_handling_seconds",
            "Time from the start of an RPC to its end.",
            call_labels,
            buckets=DURATION_BUCKETS,
            registry=self.registry,
        )
        self.http_duration = Histogram(
            "http_request_duration_seconds",
            "Time from the start of an HTTP request to the end of its response.",
            ["method", "route", "code"],
            buckets=DURATION_BUCKETS,
            registry=self.registry,
        )

    def reject(self, reason: str) -> None:
        """Count one refusal."""
        self.admission_rejections.labels(self.service, reason).inc()

    def exposition(self) -> Response:
        """GET /metrics."""
        return Response(
            prometheus_client.generate_latest(self.registry),
            headers={"content-type": prometheus_client.CONTENT_TYPE_LATEST},
        )
