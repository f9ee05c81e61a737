"""Threads of this process that share out independent pieces of a job.

Every piece runs with one thread inside of torch, whatever their number, and results come back in
the order of the pieces: sums over them have the same bits for any number of workers. Knows no model
and no method.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import torch

from vqkernels.closing import Closing
from vqllm.errors import InvalidConfig

Item = TypeVar("Item")
Result = TypeVar("Result")


class Workers(Closing):
    """A fixed number of threads; one means the calling thread itself.

    Attributes:
        count: how many pieces run at a time.
    """

    def __init__(self, count: int = 1) -> None:
        """`count` 0 takes as many as there are processors.

        Raises:
            InvalidConfig: it is negative.
        """
        if count < 0:
            raise InvalidConfig("threads", count, "0 (one per processor) or more")
        self.count = count or _num_processors()
        self._pool: ThreadPoolExecutor | None = None

    def close(self) -> None:
        """End the threads; the next `map` starts new ones."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def map(
        self, function: Callable[[Item], Result], items: Iterable[Item]
    ) -> Generator[Result, None, None]:
        """`function(item)` for every item, in their order; few results wait at a time.

        Items are drawn on the calling thread. The function must not call `map` itself. What it
        raises is raised here, once the pieces that had begun have ended.
        """
        if self.count == 1:
            yield from map(function, items)
            return
        if self._pool is None:
            start = partial(torch.set_num_threads, 1)
            self._pool = ThreadPoolExecutor(self.count, "vqllm", start)
        has_gradients = torch.is_grad_enabled()  # a setting of every thread for itself
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                if len(waiting) == self.count:
                    yield waiting.popleft().result()
                waiting.append(self._pool.submit(_run, function, item, has_gradients))
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
            for future in waiting:
                if not future.cancelled():
                    future.exception()

    def run(self, function: Callable[[Item], object], items: Iterable[Item]) -> None:
        """`map` for functions without a result."""
        for _ in self.map(function, items):
            continue


def _run(function: Callable[[Item], Result], item: Item, has_gradients: bool) -> Result:
    with torch.set_grad_enabled(has_gradients):
        return function(item)


def _num_processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Let torch use one thread per calling thread, and as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
