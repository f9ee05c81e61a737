"""Where the jobs of a group of linears run: here, one after the other, or on other machines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

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
