"""The scq command: files in, files out, and one clear line for what a person got wrong."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from typer.testing import CliRunner, Result

from scq.cli import app
from scq.data import CropConfig
from scq.images import read_image, write_png
from scq.metrics import psnr_db
from scq.model import ScqAutoencoder, load_model, save_model
from scq.training_config import TrainConfig

Pixels = NDArray[np.uint8]
MakeModel = Callable[..., ScqAutoencoder]


def scq(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refusal(*arguments: str | Path) -> str:
    """The one line that a refused command prints."""
    result = scq(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.startswith("scq: ")]
    assert len(lines) == 1, result.stderr
    return lines[0]


@pytest.fixture
def model_file(tmp_path: Path, make_model: MakeModel) -> Path:
    path = tmp_path / "tiny.safetensors"
    save_model(make_model(classes=("stop", "yield")), path)
    return path


@pytest.fixture
def picture_file(tmp_path: Path, photograph: Pixels) -> Path:
    path = tmp_path / "photo.png"
    path.write_bytes(write_png(photograph))
    return path


@pytest.mark.parametrize(("width", "height"), [(1, 1), (17, 31), (300, 200)])
def test_encode_then_decode_gives_a_png_of_the_original_size(
    tmp_path: Path, model_file: Path, width: int, height: int
) -> None:
    picture = tmp_path / "in.png"
    picture.write_bytes(write_png(np.full((height, width, 3), 60, np.uint8)))
    codes, output = tmp_path / "out.scq", tmp_path / "out.png"
    encoded = scq("encode", picture, "-o", codes, "--model", model_file)
    assert encoded.exit_code == 0, encoded.output
    assert f"{width}x{height} in {codes.stat().st_size} bytes" in encoded.stdout
    decoded = scq("decode", codes, "-o", output, "--model", model_file)
    assert decoded.exit_code == 0, decoded.output
    assert read_image(output.read_bytes()).shape == (height, width, 3)


@pytest.mark.shared_data
@pytest.mark.parametrize(
    ("size", "least_psnr_db"),
    # The first shipped weights reach 30.4, 31.6, 20.6 and 37.1 dB.
    [((960, 540), 28), ((3000, 2000), 28), ((17, 31), 17), ((1, 1), 17)],
)
def test_a_road_photograph_survives_the_shipped_model_at_its_size(
    tmp_path: Path, size: tuple[int, int], least_psnr_db: float
) -> None:
    photo = Path(__file__).parents[4] / "shared/data/udacity/lanes_solidWhiteRight.jpg"
    if not photo.exists():
        pytest.skip(f"no {photo.name} in ../shared/data/udacity")
    picture = Image.open(photo).convert("RGB")
    original = np.asarray(picture.resize(size))
    source, codes, output = (tmp_path / name for name in ("in.png", "out.scq", "out.png"))
    source.write_bytes(write_png(original))
    assert scq("encode", source, "-o", codes, "--model", "nav").exit_code == 0
    assert scq("decode", codes, "-o", output).exit_code == 0
    decoded = read_image(output.read_bytes())
    assert decoded.shape == original.shape
    assert codes.stat().st_size < 7600
    assert psnr_db(original, decoded) > least_psnr_db


def test_eval_prints_quality_codebook_use_and_bytes(model_file: Path, picture_file: Path) -> None:
    result = scq("eval", picture_file, "--model", model_file)
    assert result.exit_code == 0, result.output
    for measure in ("PSNR", "SSIM", "top-1 usage", "perplexity", "mass perplexity", "bpp"):
        assert measure in result.stdout
    assert "measured bytes" in result.stdout


def test_recognize_lists_classes_with_their_probability(
    tmp_path: Path, model_file: Path, picture_file: Path
) -> None:
    codes = tmp_path / "out.scq"
    assert scq("encode", picture_file, "-o", codes, "-m", model_file).exit_code == 0
    result = scq("recognize", codes, "-m", model_file, "--top", "1")
    assert result.exit_code == 0, result.output
    assert len(result.stdout.splitlines()) == 1
    assert "%" in result.stdout


def test_train_writes_a_model_that_encodes(
    tmp_path: Path, make_model: MakeModel, picture_file: Path
) -> None:
    config = TrainConfig(
        model=make_model("mini").config,
        crop=CropConfig(size=16),
        identity_steps=1,
        soft_steps=1,
        lattice_steps=1,
        finetune_steps=1,
        batch_size=4,
        bfloat16=False,
        hold_out="none",
    )
    (tmp_path / "mini.json").write_text(config.to_json())
    run = tmp_path / "run"
    trained = scq("train", tmp_path / "mini.json", "--data", picture_file, "-o", run)
    assert trained.exit_code == 0, trained.output
    assert "model mini" in trained.stdout
    codes = tmp_path / "out.scq"
    encoded = scq("encode", picture_file, "-o", codes, "-m", run / "model.safetensors")
    assert encoded.exit_code == 0, encoded.output


def test_train_goes_on_from_a_model_and_keeps_its_tables(
    tmp_path: Path, make_model: MakeModel, picture_file: Path
) -> None:
    config = TrainConfig(
        model=make_model("mini").config, crop=CropConfig(size=16), identity_steps=0, soft_steps=0,
        lattice_steps=0, finetune_steps=0, polish_steps=1, bfloat16=False, hold_out="none",
    )  # fmt: skip
    (tmp_path / "polish.json").write_text(config.to_json())
    model = make_model("mini")
    path, run = tmp_path / "model.safetensors", tmp_path / "run"
    command = ("train", tmp_path / "polish.json", "--data", picture_file, "-o", run)
    assert "identity_steps is 0" in refusal(*command)
    save_model(model, path)
    fitted = scq(*command, "--start", path)
    assert fitted.exit_code == 0, fitted.output
    assert "fitting entropy tables" in fitted.stderr
    kept = scq(*command[:-1], tmp_path / "again", "--start", run / "model.safetensors")
    assert kept.exit_code == 0, kept.output
    assert "fitting entropy tables" not in kept.stderr
    first, second = (
        load_model(folder / "model.safetensors").entropy_tensors
        for folder in (run, tmp_path / "again")
    )
    assert all(first[name].equal(second[name]) for name in first)


def test_models_lists_the_shipped_ones() -> None:
    result = scq("models")
    assert result.exit_code == 0, result.output
    assert "bits per" in result.stdout


def test_wrong_pictures_are_refused_in_one_line(tmp_path: Path, model_file: Path) -> None:
    picture, codes = tmp_path / "photo.jpg", tmp_path / "out.scq"
    assert "No such file" in refusal("encode", picture, "-o", codes, "-m", model_file)
    picture.write_bytes(b"not a picture")
    assert "JPEG, PNG or WebP" in refusal("encode", picture, "-o", codes, "-m", model_file)
    picture.write_bytes(write_png(np.zeros((20, 20, 3), np.uint8)))
    limited = refusal("encode", picture, "-o", codes, "-m", model_file, "--max-pixels", "399")
    assert "20x20 = 400 pixels" in limited
    assert not codes.exists()


def test_wrong_codes_are_refused_in_one_line(
    tmp_path: Path, model_file: Path, picture_file: Path
) -> None:
    codes, output = tmp_path / "out.scq", tmp_path / "out.png"
    codes.write_bytes(b"S")
    assert "at least 12" in refusal("decode", codes, "-o", output, "-m", model_file)
    assert scq("encode", picture_file, "-o", codes, "-m", model_file).exit_code == 0
    assert "unknown model" in refusal("decode", codes, "-o", output)
    assert "end in .png" in refusal("decode", codes, "-o", tmp_path / "out.jpg", "-m", model_file)
    codes.write_bytes(codes.read_bytes()[:-1] + b"\xff")
    assert "full check" in refusal("decode", codes, "-o", output, "-m", model_file)
    assert not output.exists()


def test_a_cut_frame_shows_its_base_layer_when_asked(
    tmp_path: Path, model_file: Path, picture_file: Path
) -> None:
    codes, output = tmp_path / "out.scq", tmp_path / "out.png"
    assert scq("encode", picture_file, "-o", codes, "-m", model_file).exit_code == 0
    codes.write_bytes(codes.read_bytes()[:-1])
    assert "allow_partial" in refusal("decode", codes, "-o", output, "-m", model_file)
    result = scq("decode", codes, "-o", output, "-m", model_file, "--partial")
    assert result.exit_code == 0, result.output
    assert "base layer only" in result.output
    assert output.exists()


def test_inspect_tells_a_frame_without_its_model(
    tmp_path: Path, model_file: Path, picture_file: Path
) -> None:
    codes = tmp_path / "out.scq"
    options = ("--entropy", "raw", "--tile", "2")
    assert scq("encode", picture_file, "-o", codes, "-m", model_file, *options).exit_code == 0
    text = scq("inspect", codes).output
    with Image.open(picture_file) as picture:
        assert f"width: {picture.width}\n" in text
    assert "entropy: raw\n" in text
    assert "tile: 2\n" in text
    assert f"bytes: {codes.stat().st_size}\n" in text


def test_wrong_models_and_missing_data_are_refused_in_one_line(
    tmp_path: Path, picture_file: Path
) -> None:
    codes = tmp_path / "out.scq"
    assert "unknown model 'nope'" in refusal("encode", picture_file, "-o", codes, "-m", "nope")
    text = tmp_path / "text.safetensors"
    text.write_text("hello")
    assert "cannot read" in refusal("encode", picture_file, "-o", codes, "-m", text)
    assert "give --data" in refusal("eval", "-m", "sign32")
    assert "give --data" in refusal("train", "--model", "nav")
    assert "unknown preset" in refusal("train", "--model", "moon", "--data", picture_file)
    assert "either a training config" in refusal("train", "--data", picture_file)
    text.write_text("{}")
    assert "not valid" in refusal("train", text, "--data", picture_file)


def test_the_module_runs_as_a_process() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "scq.cli", "decode", "/no/such/file", "-o", "x.png"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "No such file" in done.stderr
    assert "Traceback" not in done.stderr
