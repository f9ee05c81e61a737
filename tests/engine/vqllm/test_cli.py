"""The vqllm command, as a person types it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

RunVqllm = Callable[..., tuple[int, str, str]]


def test_help_lists_the_commands(run_vqllm: RunVqllm) -> None:
    code, output, _ = run_vqllm("--help")
    assert code == 0
    for command in ("fetch", "quantize", "generate", "evaluate", "info"):
        assert command in output


def test_quantize_then_generate_then_evaluate(
    tiny_folder: Path,
    tmp_path: Path,
    run_vqllm: RunVqllm,
) -> None:
    target, text = tmp_path / "q", tmp_path / "text.txt"
    text.write_text("some text to calibrate on " * 40)
    quantize: list[str | Path] = ["quantize", tiny_folder, "-o", target, "--group-size", "32"]
    quantize += ["--calibration", text, "--windows", "4", "--window-length", "64"]
    code, output, errors = run_vqllm(*quantize)
    assert code == 0, errors
    assert "gptq" in output
    code, output, errors = run_vqllm(
        "generate", target, "hello", "--max-tokens", "5", "--threads", "1"
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
    code, output, errors = run_vqllm(*evaluate)
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
        (("plan", "llama-2-7b", "--bits", "nan"), "bits is 'nan'"),
        (("plan", "llama-2-7b", "--bits", "2.25"), "bits is '2.25'"),
        (("plan", "llama-2-7b", "--bits", ""), "bits is ''"),
        (("plan", "llama-2-7b", "--hardware", ""), "hardware is ''"),
        (("plan", "llama-2-7b", "--json", "no-such-folder/x.json"), "json is 'no-such-folder"),
        (("evaluate", "no-such-folder", "--json", "/"), "json is '/'"),
        (("evaluate", "no-such-folder", "--tasks", "chess"), "known: arc_easy"),
        (("bench", "no-such-folder", "--json", "no-such-folder/x"), "json is 'no-such-folder/x'"),
    ],
)
def test_mistakes_end_with_one_line_and_no_traceback(
    run_vqllm: RunVqllm,
    words: tuple[str, ...],
    message: str,
) -> None:
    code, _, errors = run_vqllm(*words)
    assert code == 1
    assert errors.startswith("error:")
    assert message in errors
    assert "Traceback" not in errors


def test_a_cache_that_is_a_file_is_named(tmp_path: Path, run_vqllm: RunVqllm) -> None:
    occupied = tmp_path / "file"
    occupied.write_text("not a folder")
    code, _, errors = run_vqllm("info", "smollm2", "--cache", occupied)
    assert code == 1
    assert errors.startswith("error:")
    assert str(occupied) in errors


def test_a_prompt_that_is_no_utf8_is_refused(tiny_folder: Path, run_vqllm: RunVqllm) -> None:
    code, _, errors = run_vqllm("generate", tiny_folder, "caf\udce9", "--raw")
    assert code == 1
    assert "surrogate" in errors.splitlines()[-1]


def test_a_picture_is_no_hardware_profile(tmp_path: Path, run_vqllm: RunVqllm) -> None:
    picture = tmp_path / "photo.jpg"
    picture.write_bytes(b"\xff\xd8\xff")
    code, _, errors = run_vqllm("plan", "llama-2-7b", "--hardware", picture)
    assert code == 1
    assert "is no hardware profile" in errors
