"""The loop is open: requests leave on time whatever is outstanding, and waiting is counted."""

from __future__ import annotations

import asyncio

import pytest
from grpc import StatusCode

from openloop.drivers.base import Driver
from openloop.generator import run_open_loop
from openloop.outcome import Fate, Reply, RequestFailed
from openloop.workload import Workload
from vqclient import ResourceExhaustedError, UnavailableError


class FakeDriver(Driver):
    """A kind of request that needs no service; subclasses say what happens."""

    def __init__(self) -> None:
        super().__init__("127.0.0.1:1", Workload())

    async def open(self) -> None: ...

    async def close(self) -> None: ...


class AnswersOnlyAllTogether(FakeDriver):
    """Answers nobody until `count` requests are waiting: a closed loop would wait for ever."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.barrier = asyncio.Barrier(count)

    async def send(self, index: int) -> Reply:
        await self.barrier.wait()
        return Reply()


class OneAtATime(FakeDriver):
    """A server that is busy for `seconds` with each request."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self.lock = asyncio.Lock()

    async def send(self, index: int) -> Reply:
        async with self.lock:
            await asyncio.sleep(self.seconds)
        return Reply()


class FailsInTurn(FakeDriver):
    """Every request ends another way."""

    async def send(self, index: int) -> Reply:
        match index:
            case 0:
                raise ResourceExhaustedError(
                    "full", code=StatusCode.RESOURCE_EXHAUSTED, reason="QUEUE_FULL"
                )
            case 1:
                raise UnavailableError("gone", code=StatusCode.UNAVAILABLE)
            case 2:
                raise RequestFailed(Fate.DROPPED, "TOO_OLD")
            case 3:
                await asyncio.sleep(3600)
        return Reply(num_tokens=7)


class Broken(FakeDriver):
    """A driver with a bug."""

    async def send(self, index: int) -> Reply:
        raise KeyError("bug")


async def test_requests_leave_although_none_is_answered() -> None:
    async with asyncio.timeout(60):
        recording = await run_open_loop(AnswersOnlyAllTogether(8), [0.001] * 8, 10)
    assert [outcome.fate for outcome in recording.outcomes] == [Fate.OK] * 8


async def test_latency_counts_the_wait_for_a_busy_server_from_the_due_time() -> None:
    offsets = [0.001 * index for index in range(10)]
    recording = await run_open_loop(OneAtATime(0.02), offsets, 10)
    # The last request is due after 9 ms and served after 10 turns of 20 ms.
    assert max(outcome.latency for outcome in recording.outcomes) >= 0.2 - 0.009 - 0.005
    assert all(outcome.slip <= outcome.latency for outcome in recording.outcomes)
    assert recording.seconds >= 0.19


async def test_requests_never_leave_early() -> None:
    recording = await run_open_loop(OneAtATime(0.0), [0.0, 0.02, 0.05], 10)
    assert all(outcome.slip >= -0.001 for outcome in recording.outcomes)


async def test_every_way_to_end_is_told_apart() -> None:
    recording = await run_open_loop(FailsInTurn(), [0.0] * 5, 0.2)
    assert [(outcome.fate, outcome.reason) for outcome in recording.outcomes] == [
        (Fate.REJECTED, "QUEUE_FULL"),
        (Fate.ERROR, "UNAVAILABLE"),
        (Fate.DROPPED, "TOO_OLD"),
        (Fate.UNFINISHED, "not answered before the end of the run"),
        (Fate.OK, ""),
    ]
    assert recording.outcomes[-1].reply.num_tokens == 7


async def test_a_bug_of_a_driver_is_not_taken_for_a_result() -> None:
    with pytest.raises(KeyError, match="bug"):
        await run_open_loop(Broken(), [0.0], 1)
