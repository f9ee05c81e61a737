"""Where the jobs of a group of linears run: on threads of this process, or on other machines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Protocol, TypeVar

from vqllm.errors import InvalidConfig
from vqllm.quantization.workers import Workers

EXECUTORS = ("local", "ray")

Shared = TypeVar("Shared")
Job = TypeVar("Job")
Result = TypeVar("Result")


class Mapper(Protocol):
    """Runs independent jobs. Results must not depend on which mapper it is."""

    def map(
        self, function: Callable[[Shared, Job], Result], shared: Shared, jobs: Sequence[Job]
    ) -> list[Result]:
        """`function(shared, job)` for every job, in their order; `shared` is sent once."""
        ...


class LocalMapper:
    """Runs jobs in this process, as many at a time as there are workers."""

    def __init__(self, workers: Workers | None = None) -> None:
        """Without workers the calling thread does it all."""
        self._workers = workers or Workers()

    def map(
        self, function: Callable[[Shared, Job], Result], shared: Shared, jobs: Sequence[Job]
    ) -> list[Result]:
        return list(self._workers.map(partial(function, shared), jobs))


@contextmanager
def make_mapper(executor: str, address: str | None = None) -> Iterator[Mapper]:
    """The mapper of an executor's name; leaves a cluster when the block ends.

    Args:
        address: of a Ray cluster; None starts one on this machine.

    Raises:
        InvalidConfig: no such executor.
        ExecutorUnavailable: Ray is not installed.
    """
    if executor not in EXECUTORS:
        raise InvalidConfig("executor", executor, f"one of {', '.join(EXECUTORS)}")
    if executor == "local":
        yield LocalMapper()
        return
    from vqllm.quantization.ray_executor import ray_mapper

    with ray_mapper(address) as mapper:
        yield mapper
