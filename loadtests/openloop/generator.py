"""The open loop: every request leaves at its due time, and the run ends by itself.

Knows the clock and the schedule; knows nothing of what a request is.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from openloop.drivers.base import Driver
from openloop.outcome import Fate, Outcome, Reply, RequestFailed
from vqclient import ResourceExhaustedError, VqError

# Between making the schedule and its first request, so that the first is not late by set-up.
_LEAD_SECONDS = 0.05


@dataclass(frozen=True)
class Recording:
    """A finished run; `cpu_seconds` is what this process itself used during `seconds`."""

    outcomes: tuple[Outcome, ...]
    seconds: float
    cpu_seconds: float


async def run_open_loop(
    driver: Driver, offsets: Sequence[float], drain_seconds: float
) -> Recording:
    """Send one request per offset (seconds after the start), then wait for the rest.

    What has not ended `drain_seconds` after the last due time is cancelled and is UNFINISHED.
    """
    loop = asyncio.get_running_loop()
    cpu_before = time.process_time()
    start = loop.time() + _LEAD_SECONDS
    tasks: list[asyncio.Task[Outcome]] = []
    for index, offset in enumerate(offsets):
        await _sleep_until(start + offset)
        tasks.append(asyncio.create_task(_request(driver, index, start + offset)))
    _, pending = await asyncio.wait(tasks, timeout=drain_seconds)
    for task in pending:
        task.cancel()
    outcomes = tuple(await asyncio.gather(*tasks))
    seconds = max(outcome.finished for outcome in outcomes) - start
    return Recording(outcomes, seconds, time.process_time() - cpu_before)


async def _sleep_until(due: float) -> None:
    delay = due - asyncio.get_running_loop().time()
    if delay > 0:
        await asyncio.sleep(delay)


async def _request(driver: Driver, index: int, due: float) -> Outcome:
    loop = asyncio.get_running_loop()
    started = loop.time()
    reply, fate, reason = Reply(), Fate.OK, ""
    try:
        reply = await driver.send(index)
    except RequestFailed as error:
        fate, reason = error.fate, error.reason
    except ResourceExhaustedError as error:
        fate, reason = Fate.REJECTED, error.reason
    except VqError as error:
        fate, reason = Fate.ERROR, error.reason
    except asyncio.CancelledError:
        fate, reason = Fate.UNFINISHED, "not answered before the end of the run"
    return Outcome(due, started, loop.time(), fate, reason, reply)
