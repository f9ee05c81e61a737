"""Results of studies as CSV files that grow by one row per finished run.

A row is written in one piece, so a killed study leaves whole rows; a torn last line is dropped
on reading. Knows no training.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from scq.errors import ScqError


@dataclass(frozen=True)
class ResultRow:
    """One finished run, or the same model with an encoder that minds the rate.

    Bytes are per picture; seconds of training; steps after pretraining; rate_weight in squared
    latent units a bit.
    """

    study: str
    pictures: str
    label: str
    quantizer: str
    seed: int
    steps: int
    rate_weight: float
    raw_bits_per_latent: float
    raw_bytes: float
    rans_bytes: float
    mse: float
    psnr_db: float
    forward_mse: float
    latent_mse: float
    top1_usage: float
    perplexity: float
    mass_perplexity: float
    seconds: float

    @property
    def key(self) -> tuple[str, str, int]:
        """What identifies the run."""
        return (self.pictures, self.label, self.seed)


@dataclass(frozen=True)
class TraceRow:
    """Solver state at one step of a traced run, over the latents of that step's batch.

    kkt_residual: largest, in squared latent units. support: mean codes above zero weight.
    error: mean squared distance of the solution to the latents.
    """

    study: str
    pictures: str
    label: str
    seed: int
    step: int
    kkt_residual: float
    support: float
    iterations: float
    error: float
    perplexity: float


RowType = TypeVar("RowType", ResultRow, TraceRow)


def read_rows(path: Path, kind: type[RowType]) -> list[RowType]:
    """Every whole row of the file; none if it does not exist. Raises ScqError for another file."""
    if not path.exists():
        return []
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    reader = csv.DictReader(io.StringIO(whole, newline=""))
    names = [item.name for item in fields(kind)]
    if reader.fieldnames != names:
        raise ScqError(f"{path}: columns are {reader.fieldnames}, not {names}; use a new --out")
    types = get_type_hints(kind)
    try:
        return [kind(**{name: types[name](row[name]) for name in names}) for row in reader]
    except (TypeError, ValueError) as error:
        raise ScqError(f"{path}: a row cannot be read: {error}; repair or delete it") from error


def append_rows(path: Path, rows: Sequence[RowType]) -> None:
    """Add rows, after dropping a torn last line."""
    if not rows:
        return
    names = [item.name for item in fields(rows[0])]
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator="\n")
    if not path.exists():
        writer.writerow(names)
    for row in rows:
        writer.writerow([_text(getattr(row, name)) for name in names])
    _drop_torn_line(path)
    with path.open("a", newline="") as file:
        file.write(buffer.getvalue())


def _drop_torn_line(path: Path) -> None:
    if not path.exists():
        return
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        path.write_bytes(data[: data.rfind(b"\n") + 1])


def _text(value: Any) -> str:
    if isinstance(value, float):
        return "nan" if math.isnan(value) else f"{value:.7g}"
    return str(value)
