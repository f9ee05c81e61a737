"""Calibration text to token windows.

Knows tokenizers and files, no model. The default text needs no data folder: see
`default_text`.
"""

from __future__ import annotations

import gzip
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from vqllm.errors import CalibrationError, InvalidConfig

Windows = NDArray[np.int64]

DEFAULT_TEXT = "texts/calibration_en.txt.gz"
ENOUGH_FOR_TUNING = 320


class TextEncoder(Protocol):
    """What calibration needs of a tokenizer."""

    def encode(self, text: str) -> list[int]: ...


@dataclass(frozen=True)
class CalibrationConfig:
    """How much text to calibrate on: `num_windows` windows of `window_length` tokens.

    `path` None is the default text.
    """

    path: Path | None = None
    num_windows: int = 64
    window_length: int = 512

    def __post_init__(self) -> None:
        for field in ("num_windows", "window_length"):
            if getattr(self, field) < 1:
                raise InvalidConfig(field, getattr(self, field), "at least 1")


def calibration_windows(tokenizer: TextEncoder, config: CalibrationConfig) -> Windows:
    """Token windows (num_windows, window_length), spread evenly over the text.

    Fewer windows come back when the text has no more.

    Raises:
        CalibrationError: the file cannot be read as UTF-8 text, or is shorter than a window.
    """
    windows = _all_windows(tokenizer, config)
    return np.ascontiguousarray(windows[_spread(len(windows), config.num_windows)])


def tuning_windows(tokenizer: TextEncoder, config: CalibrationConfig) -> Windows:
    """Every window of the text, those that `calibration_windows` leaves out before the others.

    A text of fewer than `ENOUGH_FOR_TUNING` windows is filled up from the package's: tuning on the
    same windows again and again fits them and little else.

    Raises:
        CalibrationError: as `calibration_windows`.
    """
    windows = _all_windows(tokenizer, config)
    taken = _spread(len(windows), config.num_windows)
    others = np.setdiff1d(np.arange(len(windows)), taken)
    parts = [windows[others], windows[taken]]
    if config.path is not None and len(windows) < ENOUGH_FOR_TUNING:
        shipped = _all_windows(tokenizer, replace(config, path=None))
        parts.append(shipped[_spread(len(shipped), ENOUGH_FOR_TUNING - len(windows))])
    return np.ascontiguousarray(np.concatenate(parts))


def default_text() -> str:
    """English text that ships with the package, about 400 windows of 512 tokens.

    SmolLM2-135M-Instruct (Apache-2.0) wrote it, continuing openings of many kinds (see
    `vqllm.texts.openings`; `python -m vqllm.texts.generate` made it): encyclopedia articles, some
    in the spacing of WikiText, news, stories, essays, science, letters, conversations. It is
    fluent and often wrong.
    """
    packed = resources.files("vqllm").joinpath(DEFAULT_TEXT).read_bytes()
    return gzip.decompress(packed).decode("utf-8")


def _all_windows(tokenizer: TextEncoder, config: CalibrationConfig) -> Windows:
    text = default_text() if config.path is None else _read_text(config.path)
    token_ids = np.array(tokenizer.encode(text), dtype=np.int64)
    num_available = len(token_ids) // config.window_length
    if num_available == 0:
        raise CalibrationError(
            f"calibration text {config.path or 'by default'} has {len(token_ids)} tokens, one "
            f"window needs {config.window_length}; use a longer text or a shorter window"
        )
    return token_ids[: num_available * config.window_length].reshape(num_available, -1)


def _spread(num_available: int, num_wanted: int) -> NDArray[np.int64]:
    """Indices of windows, evenly spread; all of them where there are too few."""
    count = min(num_wanted, num_available)
    return np.arange(count) * num_available // count


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"calibration file {path} cannot be read: {error}") from error
