"""The text that ships for calibration, its openings, and the command that writes it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vqllm.calibration import (
    ENOUGH_FOR_TUNING,
    CalibrationConfig,
    calibration_windows,
    default_text,
    tuning_windows,
)
from vqllm.errors import CalibrationError, InvalidConfig
from vqllm.runtime.tokenizer import ChatTokenizer
from vqllm.texts.generate import GenerationConfig, generate, is_worth_keeping, tokenized
from vqllm.texts.openings import is_chat, opening, question


class Words:
    """One token per word."""

    def encode(self, text: str) -> list[int]:
        return [len(word) for word in text.split()]


def test_the_default_text_is_long_and_of_many_kinds() -> None:
    text = default_text()
    assert len(text) > 600_000
    assert " @-@ " in text
    assert "<|im_start|>user" in text
    assert len(set(text.split("\n\n\n"))) > 300


def test_calibration_and_tuning_windows_share_a_text() -> None:
    config = CalibrationConfig(num_windows=7, window_length=100)
    taken = calibration_windows(Words(), config)
    every = tuning_windows(Words(), config)
    assert taken.shape == (7, 100)
    assert len(every) > 500
    assert np.array_equal(every[-7:], taken)
    assert not any((window == taken).all(axis=1).any() for window in every[:50])


def test_a_short_text_is_tuned_on_first_and_filled_up_from_the_packages(tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("word " * 25)
    config = CalibrationConfig(path, num_windows=9, window_length=10)
    assert calibration_windows(Words(), config).shape == (2, 10)
    tuned = tuning_windows(Words(), config)
    assert tuned.shape == (ENOUGH_FOR_TUNING, 10)
    assert (tuned[:2] == 4).all()
    assert not (tuned[2:] == 4).all(axis=1).any()
    with pytest.raises(CalibrationError, match="25 tokens, one window needs 30"):
        tuning_windows(Words(), CalibrationConfig(path, window_length=30))


def test_openings_repeat_with_their_seed_and_leave_no_field() -> None:
    texts = [opening(random.Random(seed)) for seed in range(300)]
    assert texts == [opening(random.Random(seed)) for seed in range(300)]
    assert len(set(texts)) > 250
    assert not any("{" in text or "}" in text for text in texts)
    assert not any("{" in question(random.Random(seed)) for seed in range(100))
    assert sum(is_chat(index) for index in range(160)) == 10


def test_spacing_of_word_level_corpora() -> None:
    text = ' = Heading = \n\nWell-known (born 1902), he won 1,200.5 "games".\n\nIt\'s over.'
    assert tokenized(text) == (
        " \n = Heading = \n \n"
        ' Well @-@ known ( born 1902 ) , he won 1 @,@ 200 @.@ 5 " games " . \n'
        " It 's over . \n"
    )


def test_loops_are_dropped() -> None:
    words = [f"w{index}" for index in range(200)]
    assert is_worth_keeping(" ".join(words))
    assert not is_worth_keeping("the same few words " * 60)
    assert not is_worth_keeping("short")


def test_a_model_writes_texts(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vqllm.texts.generate.is_worth_keeping", lambda text: len(text) > 10)
    config = GenerationConfig(num_texts=4, num_tokens=96, batch_size=2)
    text = generate(tiny_folder, config)
    assert text == generate(tiny_folder, config)
    assert text != generate(tiny_folder, GenerationConfig(4, 96, 2, seed=1))
    assert len(ChatTokenizer.from_folder(tiny_folder).encode(text)) >= 4 * 90
    assert opening(random.Random("0/0")).strip()[:8] in text


@pytest.mark.parametrize("field", ["num_texts", "num_tokens", "batch_size"])
def test_bad_sizes(field: str) -> None:
    sizes: dict[str, Any] = {field: 0}
    with pytest.raises(InvalidConfig, match=field):
        GenerationConfig(**sizes)
