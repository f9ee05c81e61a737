"""What the comparison asks of another quantizer, and what it gets back.

A peer writes its own file; what is scored is the dense folder that its file dequantizes to, so
that all arms run through one evaluation. Knows no peer.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from vqllm.errors import EvaluationError


@dataclass(frozen=True)
class PeerJob:
    """What every peer is given.

    Attributes:
        source: folder of the reference model.
        windows: calibration tokens (num_windows, window_length) int64.
        text: the calibration text, for programs that tokenize for themselves.
        work: an empty folder for what the peer writes.
        num_threads: threads it may use.
    """

    source: Path
    windows: NDArray[np.int64]
    text: Path
    work: Path
    num_threads: int = 1


@dataclass(frozen=True)
class PeerResult:
    """What a peer made.

    Attributes:
        folder: what to score.
        bpw: bits per weight of the decoder linears in the peer's own file, all overhead counted.
        file_bytes: of the peer's own file.
        types: how many linears lie in which storage type, in the peer's words.
        note: what a reader of the table has to know.
    """

    folder: Path
    bpw: float
    file_bytes: int
    types: dict[str, int] = field(default_factory=dict)
    note: str = ""


class Peer(Protocol):
    """Another quantizer with one fixed setting."""

    @property
    def name(self) -> str:
        """Name in the table."""
        ...

    def missing(self) -> str | None:
        """Why it cannot run here, None if it can."""
        ...

    def run(self, job: PeerJob) -> PeerResult:
        """Quantize. Raises EvaluationError with the program's last words."""
        ...


def run_program(words: Sequence[str | Path], log: Path) -> None:
    """Run a program to its end, output into a log file, in whose folder it may leave others.

    Raises:
        EvaluationError: it failed; quotes the end of its output.
    """
    absolute = [str(word.absolute()) if isinstance(word, Path) else word for word in words]
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run(
            absolute, stdout=file, stderr=subprocess.STDOUT, cwd=log.parent, check=False
        )
    if done.returncode:
        tail = log.read_text(encoding="utf-8", errors="replace")[-600:].strip()
        raise EvaluationError(f"{words[0]} ended with code {done.returncode}: {tail}")
