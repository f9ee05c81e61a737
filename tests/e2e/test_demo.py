"""The demonstration from end to end: both services, every stage, with a tiny language model."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from demo.preparation import folder_of
from demo.serve import SERVICES_FILE
from support.llmd import write_tiny_llama
from support.tokenizerd import image_file
from vqllm.api import AutoQuantizer
from vqllm.calibration import CalibrationConfig

ROOT = Path(__file__).parents[2]


@pytest.fixture(params=[4, 2], ids=["4 bits", "2 bits"])
def bits(request: pytest.FixtureRequest) -> int:
    """Of the language model."""
    chosen: int = request.param
    return chosen


@pytest.fixture
def cache(tmp_path: Path, bits: int) -> Path:
    """A cache that already holds a prepared language model: one random layer, quantized."""
    write_tiny_llama(tmp_path / "tiny")
    config = tmp_path / "tiny" / "config.json"
    long_context = {**json.loads(config.read_text()), "max_position_embeddings": 512}
    config.write_text(json.dumps(long_context))
    quantizer = AutoQuantizer.from_pretrained(tmp_path / "tiny")
    calibration = CalibrationConfig(num_windows=2, window_length=32)
    quantizer.quantize(calibration, bits=bits, method="gptq" if bits == 4 else "tcq")
    folder = folder_of(tmp_path / "cache", bits).path
    folder.parent.mkdir(parents=True)
    quantizer.save_pretrained(folder)
    return tmp_path / "cache"


def run_demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "examples"), "COLUMNS": "120"}
    command = [sys.executable, "-m", "demo", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_the_demonstration_sends_frames_names_them_and_asks(
    tmp_path: Path, cache: Path, bits: int
) -> None:
    road, food = tmp_path / "road.png", tmp_path / "food.png"
    road.write_bytes(image_file("PNG", 170, 90))
    food.write_bytes(image_file("PNG", 96, 80))
    output = tmp_path / "out"
    folders = ["--output", str(output), "--cache", str(cache), "--bits", str(bits)]
    finished = run_demo("--images", str(road), str(food), "--stop", *folders)

    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "yield" in finished.stdout.split("dish (of")[0]
    for pattern in (r"codes .* bytes", r"PSNR .* dB", r"decoding .* tok/s", r":\d+/metrics"):
        assert re.search(pattern, finished.stdout), f"{pattern} not in:\n{finished.stdout}"
    tokens = re.search(r'llm_generation_tokens_total\{model="\S+"\} (\S+)', finished.stdout)
    assert tokens is not None
    assert float(tokens.group(1)) > 0
    with Image.open(output / "side-by-side.png") as sheet:
        assert sheet.width > 3 * 400
    assert not (output / SERVICES_FILE).exists()
    for log in ("tokenizerd.log", "llmd.log"):
        events = [json.loads(line) for line in (output / log).read_text().splitlines()]
        assert events, f"{log} is empty"


def test_a_missing_photograph_is_named_before_anything_starts(tmp_path: Path) -> None:
    output = tmp_path / "out"
    finished = run_demo("--images", str(tmp_path / "nowhere.jpg"), "--output", str(output))
    assert finished.returncode == 1
    assert "nowhere.jpg" in finished.stdout
    assert not output.exists()
