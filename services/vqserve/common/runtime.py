"""The three things every part of a running service shares."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from vqserve.common.config import ServiceSettings
from vqserve.common.metrics import ServerMetrics
from vqserve.common.state import ServiceState


@dataclass(frozen=True)
class Runtime:
    """Name, version, settings, state and metrics of one service process."""

    name: str
    version: str
    settings: ServiceSettings
    state: ServiceState
    metrics: ServerMetrics

    @classmethod
    def create(cls, name: str, settings: ServiceSettings) -> Runtime:
        """A fresh runtime for the service called `name` (tokenizerd or llmd)."""
        release = distribution_version()
        metrics = ServerMetrics(name, release, settings.build_commit)
        return cls(name, release, settings, ServiceState(settings.max_open_requests), metrics)


def distribution_version() -> str:
    """Version of the installed vqstack distribution; 0.0.0 in a bare source tree."""
    try:
        return version("vqstack")
    except PackageNotFoundError:
        return "0.0.0"
