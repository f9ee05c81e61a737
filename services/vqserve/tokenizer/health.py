"""A sampled look at how well frames are coded, beside the frames' own path.

Every so many encoded frames of a model one is decoded and compared, and some of its latents are
solved exactly: coding itself searches the lattice and never runs the exact solver. Probes run one
at a time and are skipped while frames wait. Knows no protobuf and no transport.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from vqserve.tokenizer.metrics import ScqMetrics
from vqserve.tokenizer.pipeline import EncodedPicture
from vqserve.tokenizer.probe import probe

logger = logging.getLogger(__name__)
NICENESS = 10


class HealthProbe:
    """Probes one frame in `every`, the first of each model included; none when it is 0."""

    def __init__(self, metrics: ScqMetrics, every: int) -> None:
        self._thread = ThreadPoolExecutor(1, "health", initializer=_give_way)
        self._metrics = metrics
        self._every = every
        self._frames: Counter[str] = Counter()
        self._running: asyncio.Task[None] | None = None

    def consider(self, encoded: EncodedPicture, *, is_busy: bool) -> None:
        """Count one encoded frame; begin a probe when it is this frame's turn."""
        model = encoded.model.name
        turn = self._frames[model]
        self._frames[model] += 1
        if not self._every or turn % self._every:
            return
        if is_busy or (self._running is not None and not self._running.done()):
            self._metrics.probed(model, "skipped")
            return
        self._running = asyncio.create_task(self._probe(encoded))

    async def close(self) -> None:
        """Give up a probe that runs; its thread ends with it."""
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _probe(self, encoded: EncodedPicture) -> None:
        model, loop = encoded.model.name, asyncio.get_running_loop()
        frame = encoded.model.codec, encoded.pixels, encoded.frame
        try:
            sample = await loop.run_in_executor(self._thread, probe, *frame)
        except Exception:
            # Nobody waits for this answer; the counter and the log are where it shows.
            logger.exception("health probe failed", extra={"model": model})
            self._metrics.probed(model, "failed")
        else:
            self._metrics.probed(model, "ok", sample)


def _give_way() -> None:
    """Lower the priority of this thread; on Linux it has one of its own."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
