"""Runs the jobs of a group of linears on a Ray cluster.

The factor of the hessian goes into the object store once per group, every linear is a task. Each
task uses as many torch threads as this process does, so that results have the same bits wherever
they are computed. Knows jobs as picklable values, nothing of what they do.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from vqllm.errors import ExecutorUnavailable

Shared = TypeVar("Shared")
Job = TypeVar("Job")
Result = TypeVar("Result")


class RayMapper:
    """A Mapper over a cluster that is connected already."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        self._run = ray.remote(_run)

    def map(
        self, function: Callable[[Shared, Job], Result], shared: Shared, jobs: Sequence[Job]
    ) -> list[Result]:
        """Raises what the function raises, as it is."""
        threads = torch.get_num_threads()
        reference = self._ray.put(shared)
        tasks = [self._run.remote(function, reference, job, threads) for job in jobs]
        try:
            results: list[Result] = self._ray.get(tasks)
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from error
        return results


def _run(
    function: Callable[[Shared, Job], Result], shared: Shared, job: Job, threads: int
) -> Result:
    torch.set_num_threads(threads)
    with torch.no_grad():
        return function(shared, job)


def _why_not(address: str | None, error: Exception) -> str:
    if address is not None:
        return f"no Ray cluster answers at {address}: {error}"
    return (
        f"Ray did not start on this machine: {error}; try again, or start a cluster by "
        "`ray start --head` first"
    )


@contextmanager
def ray_mapper(address: str | None = None) -> Iterator[RayMapper]:
    """Connect to a cluster, or start one on this machine, and leave it afterwards.

    Raises:
        ExecutorUnavailable: Ray is not installed or does not start, or no cluster answers at
            `address`.
    """
    try:
        import ray
    except ImportError as error:
        raise ExecutorUnavailable(
            "--executor ray needs the package ray; install vqstack[ray]"
        ) from error
    was_running = ray.is_initialized()
    if not was_running:
        try:
            ray.init(address=address, include_dashboard=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError) as error:
            raise ExecutorUnavailable(_why_not(address, error)) from error
    try:
        yield RayMapper(ray)
    finally:
        if not was_running:
            ray.shutdown()
