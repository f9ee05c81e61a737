"""Calibration text to windows."""

from __future__ import annotations

from pathlib import Path

import pytest

from vqllm.calibration import CalibrationConfig, calibration_windows, default_text
from vqllm.errors import CalibrationError, InvalidConfig
from vqllm.runtime.tokenizer import ChatTokenizer


def test_the_default_text_fills_the_default_windows(tiny_folder: Path) -> None:
    tokenizer = ChatTokenizer.from_folder(tiny_folder)
    config = CalibrationConfig()
    windows = calibration_windows(tokenizer, config)
    assert windows.shape == (config.num_windows, config.window_length)
    assert len(default_text()) > 50_000


def test_windows_spread_over_the_text(tiny_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("a" * 100 + "b" * 100 + "c" * 100 + "d" * 100)
    tokenizer = ChatTokenizer.from_folder(tiny_folder)
    windows = calibration_windows(tokenizer, CalibrationConfig(path, 4, 50))
    assert [tokenizer.decode(window.tolist())[0] for window in windows] == list("abcd")


def test_a_text_shorter_than_a_window_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("too short")
    with pytest.raises(CalibrationError, match=r"short\.txt has 9 tokens, one window needs 512"):
        calibration_windows(ChatTokenizer.from_folder(tiny_folder), CalibrationConfig(path))


def test_an_unreadable_text_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "binary.txt"
    path.write_bytes(b"\xff\xfe\x00")
    tokenizer = ChatTokenizer.from_folder(tiny_folder)
    for name in (path, tmp_path / "absent.txt"):
        with pytest.raises(CalibrationError, match=f"{name.name} cannot be read"):
            calibration_windows(tokenizer, CalibrationConfig(name))


@pytest.mark.parametrize("field", ["num_windows", "window_length"])
def test_sizes_below_one_are_refused(field: str) -> None:
    with pytest.raises(InvalidConfig, match=field):
        CalibrationConfig(None, **{field: 0})
