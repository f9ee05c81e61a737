"""The vqllm command, as a person types it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from vqllm.cli import main


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str | Path
) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of one command."""
    monkeypatch.setattr(sys, "argv", ["vqllm", *map(str, words)])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as done:
        main()
    captured = capsys.readouterr()
    return int(done.value.code or 0), captured.out, captured.err


def test_help_lists_the_commands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, output, _ = run(monkeypatch, capsys, "--help")
    assert code == 0
    for command in ("fetch", "quantize", "generate", "evaluate", "info"):
        assert command in output


def test_quantize_then_generate_then_evaluate(
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    target, text = tmp_path / "q", tmp_path / "text.txt"
    text.write_text("some text to calibrate on " * 40)
    quantize: list[str | Path] = ["quantize", tiny_folder, "-o", target, "--group-size", "32"]
    quantize += ["--calibration", text, "--windows", "4", "--window-length", "64"]
    code, output, errors = run(monkeypatch, capsys, *quantize)
    assert code == 0, errors
    assert "gptq" in output
    code, output, errors = run(
        monkeypatch, capsys, "generate", target, "hello", "--max-tokens", "5", "--threads", "1"
    )
    assert code == 0, errors
    assert "tok/s" in errors
    evaluate: list[str | Path] = [
        "evaluate",
        target,
        "--text",
        text,
        "--reference",
        tiny_folder,
        "--windows",
        "3",
    ]
    evaluate += ["--window-length", "64", "--threads", "1"]
    code, output, errors = run(monkeypatch, capsys, *evaluate)
    assert code == 0, errors
    assert "perplexity" in output
    assert "mean_kl" in output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("info", "no-such-folder"), "no-such-folder"),
        (("fetch", "gpt5"), "known: smollm2"),
        (("generate", "no-such-folder", "hi", "--temperature", "9"), "temperature is 9.0"),
        (("quantize", "no-such-folder", "-o", "out", "--bits", "7"), "bits is 7"),
    ],
)
def test_mistakes_end_with_one_line_and_no_traceback(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    message: str,
) -> None:
    code, _, errors = run(monkeypatch, capsys, *words)
    assert code == 1
    assert errors.startswith("error:")
    assert message in errors
    assert "Traceback" not in errors
