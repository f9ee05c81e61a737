"""Text to the token windows that a score is taken over, with what a report says about them.

Windows never overlap and nothing is put in front of them, so every token but the first of its
window is predicted once, from its own window alone. Knows no model.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from vqllm.errors import EvaluationError, InvalidConfig

Windows = NDArray[np.int64]

# Written by SmolLM2-135M-Instruct (Apache-2.0) at temperature 0.8, continuing openings of many
# kinds; not the text that calibration takes by default. For a first look: report on real text.
DEFAULT_TEXT = "texts/evaluation_en.txt"


class TextEncoder(Protocol):
    """What evaluation needs of a tokenizer."""

    def encode(self, text: str) -> list[int]: ...


@dataclass(frozen=True)
class WindowConfig:
    """Which windows of a text are scored.

    Attributes:
        window_length: tokens of a window.
        num_windows: how many; 0 is the whole text.
        spread: take them evenly over the text instead of from its start.

    Raises:
        InvalidConfig: a value is outside its range.
    """

    window_length: int = 512
    num_windows: int = 0
    spread: bool = False

    def __post_init__(self) -> None:
        if self.window_length < 2:
            raise InvalidConfig("window_length", self.window_length, "at least 2")
        if self.num_windows < 0:
            raise InvalidConfig("num_windows", self.num_windows, "at least 0")

    @property
    def selection(self) -> str:
        """One word on which part of the text is scored."""
        if self.num_windows == 0:
            return "all"
        return "spread" if self.spread else "first"


@dataclass(frozen=True)
class EvaluationText:
    """Windows of one text.

    Attributes:
        name: file name, or `default` for the text of the package.
        sha256: of the text's bytes, hexadecimal.
        selection: `all`, `first` or `spread`.
        windows: (num_windows, window_length) int64.
    """

    name: str
    sha256: str
    selection: str
    windows: Windows

    @property
    def num_predicted(self) -> int:
        """Tokens that are predicted: all but the first of each window."""
        return int(self.windows.shape[0] * (self.windows.shape[1] - 1))


def read_windows(tokenizer: TextEncoder, path: Path | None, config: WindowConfig) -> EvaluationText:
    """Tokenize a UTF-8 text file, None for the text of the package, and cut it into windows.

    The rest that fills no window is dropped. With `num_windows` above what the text holds, all
    of it is taken.

    Raises:
        EvaluationError: the file cannot be read, or the text is shorter than a window.
    """
    content = _read(path)
    name = "default" if path is None else path.name
    token_ids = np.array(tokenizer.encode(_decode(content, name)), dtype=np.int64)
    windows = _cut(token_ids, config.window_length, name)
    return EvaluationText(
        name, hashlib.sha256(content).hexdigest(), config.selection, _select(windows, config)
    )


def _read(path: Path | None) -> bytes:
    source = resources.files("vqllm").joinpath(DEFAULT_TEXT) if path is None else path
    try:
        return source.read_bytes()
    except OSError as error:
        raise EvaluationError(
            f"text {path or 'of the package'} cannot be read: {error}; name a file by --text"
        ) from error


def _decode(content: bytes, name: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise EvaluationError(f"text {name} is not UTF-8: {error}") from error


def _cut(token_ids: NDArray[np.int64], window_length: int, name: str) -> Windows:
    num_windows = len(token_ids) // window_length
    if num_windows == 0:
        raise EvaluationError(
            f"text {name} has {len(token_ids)} tokens, one window needs {window_length}; "
            "use a longer text or a smaller --window-length"
        )
    return token_ids[: num_windows * window_length].reshape(num_windows, window_length)


def _select(windows: Windows, config: WindowConfig) -> Windows:
    num_all = len(windows)
    if config.num_windows == 0 or config.num_windows >= num_all:
        return windows
    if config.spread:
        return windows[np.arange(config.num_windows) * num_all // config.num_windows]
    return windows[: config.num_windows]
