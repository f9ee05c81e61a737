"""`vqllm quantize`, as a person types it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from vqllm.checkpoint import Checkpoint

RunVqllm = Callable[..., tuple[int, str, str]]

WORDS: tuple[str | Path, ...] = ("--windows", "4", "--window-length", "64", "--damping", "0.01")


def test_a_bit_budget_with_a_memory_limit(
    tiny_folder: Path, tmp_path: Path, run_vqllm: RunVqllm
) -> None:
    target = tmp_path / "out"
    budget = ("--method", "tcq", "--bpw", "3", "--max-memory", "30GB")
    words = (tiny_folder, "-o", target, *budget, "--tune-steps", "2")
    code, output, errors = run_vqllm("quantize", *words, *WORDS)
    assert code == 0, errors
    stages = ["measuring sensitivities 4/4", "quantizing 14/14", "tuning 2/2"]
    assert sorted(stages, key=errors.index) == stages
    assert "error 0." in errors
    assert "peak memory" in errors
    assert "is_rotated" in output
    info = Checkpoint(target).info()
    assert info.method == "tcq"
    assert info.bpw <= 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--method", "magic"), "method is 'magic', allowed is one of gptq"),
        (("--bits", "4", "--bpw", "4"), "bits is 4"),
        (("--bits", "0"), "bits is 0"),
        (("--group-size", "0"), "group_size is 0"),
        (("--method", "tcq", "--bpw", "0.5"), "0.5 bits per weight cannot be met"),
        (("--max-memory", "lots"), "max_memory is 'lots'"),
        (("--max-memory", "1MB"), "the run needs about"),
        (("--executor", "slurm"), "executor is 'slurm', allowed is one of local, ray"),
        (("--alpha", "3"), "alpha is 3.0"),
        (("--preprocess", "blur"), "preprocess is 'blur'"),
        (("--window-length", "1000000"), "one window needs 1000000"),
    ],
)
def test_mistakes_end_with_one_line(
    tiny_folder: Path,
    tmp_path: Path,
    run_vqllm: RunVqllm,
    words: tuple[str, ...],
    message: str,
) -> None:
    arguments = (tiny_folder, "-o", tmp_path / "out", *WORDS, *words)
    code, _, errors = run_vqllm("quantize", *arguments)
    assert code == 1
    assert errors.splitlines()[-1].startswith("error:")
    assert message in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "out").exists()


def test_a_list_of_words_is_no_damping(
    tiny_folder: Path, tmp_path: Path, run_vqllm: RunVqllm
) -> None:
    code, _, errors = run_vqllm("quantize", tiny_folder, "-o", tmp_path / "out", "--damping", "a,b")
    assert code == 2
    assert "not a list of numbers" in errors
