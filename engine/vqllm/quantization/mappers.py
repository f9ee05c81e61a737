"""Where the jobs of a group of linears run: here, one after the other, or on other machines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, TypeVar

from vqllm.errors import InvalidConfig

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
    """Runs jobs in this process; the methods use its threads themselves."""

    def map(
        self, function: Callable[[Shared, Job], Result], shared: Shared, jobs: Sequence[Job]
    ) -> list[Result]:
        return [function(shared, job) for job in jobs]


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
