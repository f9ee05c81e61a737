"""The arms of a comparison: our methods as commands, other quantizers as peers.

Our arms run `vqllm quantize` as a process of its own, as a person would: that measures its peak
memory, and no state leaks from one arm to the next. Knows no metric.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from vqllm.checkpoint import Checkpoint
from vqllm.errors import EvaluationError
from vqllm.evaluation.peers.base import Peer, PeerJob
from vqllm.evaluation.sizes import measure_sizes


@dataclass(frozen=True)
class Calibration:
    """The calibration text of one seed.

    Attributes:
        path: UTF-8 text.
        num_windows, window_length: how much of it every arm uses.
    """

    path: Path
    num_windows: int
    window_length: int


@dataclass(frozen=True)
class Made:
    """A quantized model, ready to be scored.

    Attributes:
        folder: what to score.
        bpw: true bits per weight of the linears as the arm stores them.
        file_bytes: of the arm's own weight files.
        types: number of linears by storage type.
        note: what a reader of the table has to know.
        peak_bytes: largest resident memory of the process, 0 where it was not measured.
    """

    folder: Path
    bpw: float
    file_bytes: int
    types: dict[str, int] = field(default_factory=dict)
    note: str = ""
    peak_bytes: int = 0


class Arm(Protocol):
    """One row of the table."""

    @property
    def name(self) -> str: ...

    @property
    def family(self) -> str:
        """`ours`, or the peer's name: who is compared with whom."""
        ...

    @property
    def seeded(self) -> bool:
        """Whether it is run once per seed."""
        ...

    def missing(self) -> str | None:
        """Why it cannot run here, None if it can."""
        ...

    def make(self, job: PeerJob, calibration: Calibration) -> Made:
        """Quantize. Raises VqllmError."""
        ...


@dataclass(frozen=True)
class OurArm:
    """`vqllm quantize` with the given options."""

    name: str
    options: tuple[str, ...]
    family: str = "ours"
    seeded: bool = True

    def missing(self) -> str | None:
        return None

    def make(self, job: PeerJob, calibration: Calibration) -> Made:
        target = job.work / "model"
        words = [sys.executable, "-m", "vqllm", "quantize", str(job.source), "-o", str(target)]
        return _run(words, target, self.options, job, calibration)


@dataclass(frozen=True)
class PublishedArm:
    """VPTQ as its released tool quantizes, at the codebook sizes of our own."""

    bits: int
    family: str = "vptq as published"
    seeded: bool = True

    @property
    def name(self) -> str:
        return f"VPTQ as published {self.bits}"

    def missing(self) -> str | None:
        return None

    def make(self, job: PeerJob, calibration: Calibration) -> Made:
        target, module = job.work / "model", "vqllm.evaluation.published"
        words = [sys.executable, "-m", module, str(job.source), str(target)]
        return _run(words, target, ("--bits", str(self.bits)), job, calibration)


def _run(
    words: list[str],
    target: Path,
    options: tuple[str, ...],
    job: PeerJob,
    calibration: Calibration,
) -> Made:
    words += ["--calibration", str(calibration.path)]
    words += ["--windows", str(calibration.num_windows)]
    words += ["--window-length", str(calibration.window_length)]
    words += ["--threads", str(job.num_threads), *options]
    peak = run_measured(words, job.work / "quantize.log")
    sizes = measure_sizes(Checkpoint(target))
    return Made(target, sizes.bpw, sizes.file_bytes, note=" ".join(options), peak_bytes=peak)


@dataclass(frozen=True)
class PeerArm:
    """Another quantizer."""

    peer: Peer
    family: str
    seeded: bool = True

    @property
    def name(self) -> str:
        return self.peer.name

    def missing(self) -> str | None:
        return self.peer.missing()

    def make(self, job: PeerJob, calibration: Calibration) -> Made:
        result = self.peer.run(job)
        return Made(
            result.folder, result.bpw, result.file_bytes, result.types, result.note, peak_bytes=0
        )


def run_measured(words: Sequence[str], log: Path) -> int:
    """Run a program to its end; its peak resident memory in bytes.

    Raises:
        EvaluationError: it failed; quotes the end of its output.
    """
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(list(words), stdout=file, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    code = process.returncode = os.waitstatus_to_exitcode(status)
    if code:
        tail = log.read_text(encoding="utf-8", errors="replace")[-600:].strip()
        raise EvaluationError(f"`{' '.join(words[1:4])}` ended with code {code}: {tail}")
    return int(usage.ru_maxrss) * 1024


class Stopwatch:
    """Wall clock of a `with` block, in `seconds`."""

    seconds = 0.0

    def __enter__(self) -> Stopwatch:
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._start
