"""Scores of a folder: the numbers, their intervals, what is counted, and bad input."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from vqllm.checkpoint import Checkpoint
from vqllm.errors import CorruptCheckpoint, EvaluationError, InvalidConfig
from vqllm.evaluation.evaluate import EvaluationOptions, evaluate_folder
from vqllm.evaluation.perplexity import compare_windows, score_windows
from vqllm.evaluation.sizes import measure_sizes
from vqllm.evaluation.statistics import bootstrap_mean, ratio_interval
from vqllm.evaluation.windows import WindowConfig, read_windows

MakeFolder = Callable[..., Path]
RunVqllm = Callable[..., tuple[int, str, str]]

REQUIRED = (
    "perplexity",
    "reference_perplexity",
    "mean_kl",
    "median_kl",
    "p99_kl",
    "top1_agreement",
    "bpw",
    "file_bytes",
    "tokens",
)


class TableScorer:
    """Logits looked up by the current token: (vocabulary, vocabulary)."""

    def __init__(self, table: NDArray[np.float32]) -> None:
        self.table = table

    def score(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        return self.table[list(token_ids)]


def random_table(seed: int, size: int = 11) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0, 2, (size, size)).astype(np.float32)


class LetterEncoder:
    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(chr(97 + i * i % 23) for i in range(330)))
    return path


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    wide = logits.astype(np.float64)
    return np.asarray(wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True)))


def test_scores_are_those_of_the_definition() -> None:
    ours, theirs = random_table(0), random_table(1)
    windows = np.random.default_rng(2).integers(0, 11, (3, 200))
    scores = compare_windows(TableScorer(ours), TableScorer(theirs), windows)
    p, q = log_softmax(ours)[windows[:, :-1]], log_softmax(theirs)[windows[:, :-1]]
    targets = windows[:, 1:, None]
    np.testing.assert_allclose(scores.nll, -np.take_along_axis(p, targets, 2)[..., 0], rtol=1e-5)
    np.testing.assert_allclose(
        scores.reference_nll, -np.take_along_axis(q, targets, 2)[..., 0], rtol=1e-5
    )
    np.testing.assert_allclose(scores.kl, (np.exp(q) * (q - p)).sum(2), rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(scores.agrees, p.argmax(2) == q.argmax(2))
    correct = p.argmax(2) == targets[..., 0]
    np.testing.assert_array_equal(scores.flips, correct != (q.argmax(2) == targets[..., 0]))
    alone = score_windows(TableScorer(ours), windows)
    np.testing.assert_array_equal(alone.nll, scores.nll)


def test_a_model_is_at_no_distance_from_itself() -> None:
    windows = np.random.default_rng(2).integers(0, 11, (2, 40))
    scores = compare_windows(TableScorer(random_table(0)), TableScorer(random_table(0)), windows)
    assert not scores.kl.any()
    assert scores.agrees.all()
    assert not scores.flips.any()


def test_different_vocabularies_are_refused() -> None:
    windows = np.zeros((1, 5), dtype=np.int64)
    with pytest.raises(EvaluationError, match="11 tokens in its vocabulary, the reference 7"):
        compare_windows(TableScorer(random_table(0)), TableScorer(random_table(0, 7)), windows)


def test_logits_that_are_not_finite_are_refused() -> None:
    table = random_table(0)
    table[3] = np.nan
    with pytest.raises(EvaluationError, match="NaN"):
        score_windows(TableScorer(table), np.full((1, 5), 3))


@pytest.mark.parametrize(
    ("config", "starts"),
    [
        (WindowConfig(100), [0, 100, 200]),
        (WindowConfig(100, 2), [0, 100]),
        (WindowConfig(50, 3, spread=True), [0, 100, 200]),
        (WindowConfig(100, 9), [0, 100, 200]),
    ],
)
def test_windows_are_cut_from_the_text_in_order(
    text: Path, config: WindowConfig, starts: list[int]
) -> None:
    result = read_windows(LetterEncoder(), text, config)
    letters = np.array(LetterEncoder().encode(text.read_text()))
    wanted = [letters[start : start + config.window_length] for start in starts]
    np.testing.assert_array_equal(result.windows, wanted)
    assert result.sha256 == hashlib.sha256(text.read_bytes()).hexdigest()


def test_bad_texts_are_named(tmp_path: Path, text: Path) -> None:
    with pytest.raises(EvaluationError, match=r"text\.txt has 330 tokens, one window needs 400"):
        read_windows(LetterEncoder(), text, WindowConfig(400))
    with pytest.raises(EvaluationError, match="absent"):
        read_windows(LetterEncoder(), tmp_path / "absent", WindowConfig(4))
    text.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(EvaluationError, match="not UTF-8"):
        read_windows(LetterEncoder(), text, WindowConfig(2))
    with pytest.raises(InvalidConfig, match="window_length is 1"):
        WindowConfig(1)


def test_the_package_brings_a_text() -> None:
    text = read_windows(LetterEncoder(), None, WindowConfig(512))
    assert text.name == "default"
    assert len(text.windows) > 100


def test_intervals_cover_the_mean_and_shrink_with_the_text() -> None:
    values = np.random.default_rng(0).normal(3.0, 1.0, 400)
    few, many = bootstrap_mean(values[:40]), bootstrap_mean(values)
    assert few.low < values[:40].mean() < few.high
    assert many.high - many.low < 0.5 * (few.high - few.low)
    assert abs((many.high - many.low) - 2 * 1.96 * values.std() / 20) < 0.03
    single = bootstrap_mean(values[:1])
    assert single.low == single.high == pytest.approx(values[0])


def test_pairing_removes_what_the_windows_share() -> None:
    generator = np.random.default_rng(0)
    reference = generator.normal(3.0, 1.0, 100)
    interval = ratio_interval(reference + 0.1, reference)
    assert interval.low == pytest.approx(math.exp(0.1))
    assert interval.high == pytest.approx(math.exp(0.1))
    assert interval.excludes(1.0)


def test_sizes_are_counted_in_the_file(tiny_folder: Path) -> None:
    checkpoint = Checkpoint(tiny_folder)
    sizes = measure_sizes(checkpoint)
    assert sizes.bpw == sizes.total_bpw == sizes.embedding_bits == 32
    assert sizes.file_bytes == (tiny_folder / "model.safetensors").stat().st_size


def test_the_command_writes_every_number(
    make_folder: MakeFolder, text: Path, tmp_path: Path, run_vqllm: RunVqllm
) -> None:
    model, reference, out = (
        make_folder("model", 1),
        make_folder("reference", 2),
        tmp_path / "o.json",
    )
    words: list[str | Path] = [model, "--reference", reference, "--text", text]
    words += ["--window-length", "32"]
    code, output, errors = run_vqllm("evaluate", *words, "--json", out)
    assert code == 0, errors
    facts: dict[str, Any] = json.loads(out.read_text())
    assert all(name in facts for name in REQUIRED)
    assert "p99_kl" in output
    assert facts["tokens"] == 10 * 31
    assert facts["ratio_low"] <= facts["ratio"] <= facts["ratio_high"]
    assert facts["ratio"] == pytest.approx(facts["perplexity"] / facts["reference_perplexity"])
    assert facts["text_sha256"] == hashlib.sha256(text.read_bytes()).hexdigest()
    code, output, errors = run_vqllm("evaluate", *words, "--windows", "3", "--json", "-")
    assert code == 0, errors
    assert json.loads(output)["selection"] == "first"
    assert json.loads(output)["windows"] == 3


def test_the_command_names_what_is_wrong(
    tiny_folder: Path, text: Path, run_vqllm: RunVqllm
) -> None:
    code, _, errors = run_vqllm("evaluate", tiny_folder, "--text", text)
    assert code == 1
    assert "330 tokens" in errors
    code, _, errors = run_vqllm("evaluate", tiny_folder, "--text", text, "--window-length", "300")
    assert code == 1
    assert "context of 128" in errors
    assert "Traceback" not in errors


def test_a_damaged_file_ends_the_evaluation(tiny_folder: Path, text: Path) -> None:
    weights = tiny_folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(CorruptCheckpoint, match=r"model\.safetensors"):
        evaluate_folder(tiny_folder, None, EvaluationOptions(text, WindowConfig(32)))


def test_a_folder_is_at_no_distance_from_itself(tiny_folder: Path, text: Path) -> None:
    options = EvaluationOptions(text, WindowConfig(32, 2))
    facts = evaluate_folder(tiny_folder, tiny_folder, options).to_dict()
    assert facts["ratio"] == facts["ratio_low"] == facts["ratio_high"] == 1
    assert facts["mean_kl"] == 0


def test_the_served_path_is_scored_against_the_exact_one(tiny_folder: Path, text: Path) -> None:
    options = EvaluationOptions(text, WindowConfig(32, 2), "onnx", num_threads=1)
    facts = evaluate_folder(tiny_folder, tiny_folder, options).to_dict()
    assert facts["executor"] == "onnx"
    assert facts["ratio"] != 1  # its head has 8 bits
    assert facts["ratio"] == pytest.approx(1, abs=0.1)
    assert 0 < facts["mean_kl"] < 0.1
