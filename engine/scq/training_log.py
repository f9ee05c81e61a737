"""The record of a training run: log.csv, and TensorBoard events where it is installed.

Knows rows of numbers and a folder, nothing of models.
"""

from __future__ import annotations

import csv
import importlib.util
import math
import warnings
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class LogRow:
    """One step. NaN: not measured in this phase, or not yet."""

    step: int
    phase: str
    learning_rate: float
    loss: float
    psnr_db: float
    quantization_error: float
    class_loss: float
    class_accuracy: float
    codes_restarted: int
    validation_psnr_db: float
    validation_accuracy: float
    seconds: float


class RunLog:
    """Appends rows to `folder`/log.csv and, if tensorboard can be imported, `folder`/tensorboard.

    `keep` is how many rows of an earlier part of the run stay; later ones are about to be
    repeated.
    """

    def __init__(self, folder: Path, *, keep: int = 0) -> None:
        self._path = folder / "log.csv"
        if keep:
            lines = self._path.read_text().splitlines(keepends=True)
            self._path.write_text("".join(lines[: keep + 1]))
        else:
            self._path.unlink(missing_ok=True)
        self._events = _event_writer(folder / "tensorboard", keep)

    def write(self, row: LogRow) -> None:
        """Append one step."""
        new = not self._path.exists()
        with self._path.open("a", newline="") as file:
            writer = csv.DictWriter(file, [item.name for item in fields(LogRow)])
            if new:
                writer.writeheader()
            writer.writerow({k: _short(v) for k, v in asdict(row).items()})
        if self._events is not None:
            for name, value in asdict(row).items():
                if isinstance(value, float) and math.isfinite(value):
                    self._events.add_scalar(name, value, row.step)

    def close(self) -> None:
        """Flush what is pending."""
        if self._events is not None:
            self._events.close()


def _short(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) else value


def _event_writer(folder: Path, keep: int) -> Any:
    if importlib.util.find_spec("tensorboard") is None:
        return None
    with warnings.catch_warnings():
        # tensorboard's own imports warn about their own dependencies.
        warnings.simplefilter("ignore")
        from torch.utils.tensorboard import SummaryWriter
    return SummaryWriter(str(folder), purge_step=keep + 1)
