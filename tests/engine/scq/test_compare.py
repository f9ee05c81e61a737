"""`scq compare` on small pictures: bytes are the files' own, curves are read as they should be."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from typer.testing import CliRunner

from scq import features
from scq.bitstream import fit_tables
from scq.bitstream.fitting import CodedGrid
from scq.cli import app
from scq.codec import FrameCodec
from scq.compare import Suite, run_suite, write_comparison
from scq.compare.measure import PointResult
from scq.compare.points import FilePoint, ScqPoint, available_formats
from scq.compare.report import replace_section, suite_section
from scq.compare.results import by_codec, bytes_for_accuracy, nearest_at_or_above, write_csv
from scq.compare.run import Options
from scq.compare.suites import SUITES, file_points, suite_named
from scq.data import ImageSet
from scq.errors import ScqError
from scq.images import write_png
from scq.metrics import psnr_db
from scq.model import ScqAutoencoder

Pixels = NDArray[np.uint8]


@pytest.fixture
def codec(tiny_model: ScqAutoencoder, photograph: Pixels) -> FrameCodec:
    """A codec with tables and a head of three classes."""
    bare = FrameCodec(tiny_model)
    picture = bare.read(bare.encode(photograph).codes)
    coded = CodedGrid(picture.assignment, picture.placement.grid)
    tables = fit_tables([coded], tiny_model.config.lattice, base_clusters=2, other_clusters=2)
    tiny_model.entropy_tensors = tables.to_tensors()
    return FrameCodec(tiny_model)


@pytest.fixture
def pictures(photograph: Pixels) -> ImageSet:
    """Six pictures of two sizes in three classes."""
    small = np.ascontiguousarray(photograph[:32, :40])
    images = (photograph, 255 - photograph, photograph // 2, small, 255 - small, small // 2)
    names = tuple(f"{label}/{side}.png" for side in range(2) for label in "abc")
    return ImageSet(images, names, (0, 1, 2, 0, 1, 2), ("a", "b", "c"))


@pytest.fixture
def no_features(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine on which the features were not fetched."""
    monkeypatch.setattr("scq.compare.run.default_weights_path", lambda: tmp_path / "absent")


def point(codec: str, mean_bytes: float, right: int | None = None) -> PointResult:
    return PointResult(codec, "q1", 100, mean_bytes, 0.1, 20.0, 0.5, 0.6, None, right, None, 1, 1)


@pytest.mark.parametrize("name", available_formats()[0])
def test_files_are_whole_and_of_that_format(name: str, photograph: Pixels) -> None:
    low, high = FilePoint(name, 0), FilePoint(name, 90)
    files = [p.encode(photograph) for p in (low, high)]
    assert len(files[0]) < len(files[1])
    assert Image.open(io.BytesIO(files[0])).size == (56, 40)
    decoded = [p.decode(file) for p, file in zip((low, high), files, strict=True)]
    assert psnr_db(photograph, decoded[0]) < psnr_db(photograph, decoded[1])
    assert low.recognize(files[0]) is None


def test_scaled_files_count_the_size_that_they_must_know(photograph: Pixels) -> None:
    half = FilePoint("jpeg", 30, 0.5)
    codes = half.encode(photograph)
    assert codes[:4] == bytes((56, 0, 40, 0))
    assert Image.open(io.BytesIO(codes[4:])).size == (28, 20)
    assert half.decode(codes).shape == photograph.shape
    assert (half.codec, half.setting) == ("jpeg, scaled", "1/2 q30")


def test_unknown_formats_and_settings_are_refused() -> None:
    with pytest.raises(ScqError, match="unknown format 'bpg'"):
        FilePoint("bpg", 10)
    with pytest.raises(ScqError, match="quality"):
        FilePoint("jpeg", 101)
    with pytest.raises(ScqError, match="unknown suite 'roads'; available: nav"):
        suite_named("roads")


def test_jpeg_takes_the_shorter_of_both_scan_orders(photograph: Pixels) -> None:
    buffer = io.BytesIO()
    Image.fromarray(photograph).save(buffer, "JPEG", quality=20, optimize=True, subsampling=2)
    assert len(FilePoint("jpeg", 20).encode(photograph)) <= len(buffer.getvalue())


def test_our_points_are_the_codecs_frames(codec: FrameCodec, photograph: Pixels) -> None:
    frame = codec.encode(photograph, entropy="rans")
    assert ScqPoint(codec, "rans").encode(photograph) == frame.codes
    assert np.array_equal(ScqPoint(codec, "rans").decode(frame.codes), codec.decode(frame.codes))
    base = ScqPoint(codec, base=True)
    codes = base.encode(photograph)
    assert len(codes) < len(codec.encode(photograph).codes)
    assert base.decode(codes).shape == photograph.shape
    assert base.recognize(codes) in (0, 1, 2)
    assert ScqPoint(codec, rate_weight=0.5).setting == "rate 0.5"


def test_a_suite_measures_every_point(
    codec: FrameCodec, pictures: ImageSet, tmp_path: Path, no_features: None
) -> None:
    suite = Suite("tiny", "Tiny", ("tiny",), 4, "", "features", {"jpeg": (1, 50)}, {})
    suite = replace(suite, qualities={name: (10,) for name in available_formats()[0]})
    heard: list[tuple[int, int, str]] = []
    options = Options(rate_weights=(0.5,))
    result = run_suite(suite, pictures, [codec], options, print, lambda *step: heard.append(step))
    ours = [p for p in result.points if p.codec.startswith("scq")]
    assert [p.setting for p in ours] == ["rans", "raw", "s = 1", "rate 0.5"]
    assert len(result.points) == 4 + len(available_formats()[0])
    assert heard[-1] == (len(result.points), len(result.points), "done")
    chosen = [pictures.images[i] for i in (0, 1, 3, 4)]
    sizes = [len(codec.encode(image, entropy="raw").codes) for image in chosen]
    raw = ours[1]
    assert (raw.n, raw.mean_bytes) == (4, sum(sizes) / 4)
    assert raw.bpp == pytest.approx(8 * sum(sizes) / sum(i.shape[0] * i.shape[1] for i in chosen))
    assert raw.decoded_right is None
    labels = (0, 1, 0, 1)
    named = [codec.recognize(codec.encode(image).codes)[0].class_index for image in chosen]
    assert raw.codes_right == sum(a == b for a, b in zip(named, labels, strict=True))
    assert any("scq features fetch" in note for note in result.notes)
    assert any("--train" in note for note in result.notes)
    written = write_comparison(result, tmp_path)
    assert [path.name for path in written] == ["tiny.csv", "tiny.png"]
    assert len(list(csv.DictReader(io.StringIO(written[0].read_text())))) == len(result.points)
    section = suite_section(result, "scq compare")
    assert "| scq tiny | raw |" in section
    assert "n = 4 pictures, 40x32 to 56x40" in section


def test_features_give_distance_and_recognition(
    codec: FrameCodec,
    pictures: ImageSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    extractor = features.FeatureExtractor(features.EfficientNetLite0())
    monkeypatch.setattr("scq.compare.run.load_extractor", lambda path: extractor)
    monkeypatch.setattr("scq.compare.recognizers.user_cache_path", lambda *_, **__: tmp_path)
    for name, image in zip(pictures.names, pictures.images, strict=True):
        (tmp_path / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "train" / name)
    suite = Suite("tiny", "Tiny", ("tiny",), None, "", "features", {"jpeg": (95,)}, {})
    suite = replace(suite, qualities={name: (95,) for name in available_formats()[0]})
    options = Options(0, (tmp_path / "train",), (), tmp_path / "weights")
    result = run_suite(suite, pictures, [codec], options, print, lambda *_: None)
    assert result.originals_right == 6  # it has seen these very pictures
    jpeg = next(p for p in result.points if p.codec == "jpeg")
    assert jpeg.decoded_accuracy is not None
    assert jpeg.feature_distance is not None
    assert 0 < jpeg.feature_distance < 1
    assert "### Recognition" in suite_section(result, "scq compare")


def test_pictures_of_other_classes_are_refused(
    codec: FrameCodec, pictures: ImageSet, no_features: None
) -> None:
    two = ImageSet(pictures.images[:2], pictures.names[:2], (0, 1), ("a", "b"))
    suite = Suite("tiny", "Tiny", ("tiny",), None, "", None, {}, {})
    suite = replace(suite, qualities={name: () for name in available_formats()[0]})
    with pytest.raises(ScqError, match="knows 3 classes"):
        run_suite(suite, two, [codec], Options(rate_weights=()), print, lambda *_: None)


def test_suites_reach_each_formats_lowest_quality() -> None:
    for suite in SUITES.values():
        points = file_points(suite, available_formats()[0])
        lowest = {p.codec: p.setting for p in reversed(points)}
        assert lowest["jpeg"] == "q1"
        assert {lowest[name] for name in ("webp", "avif") if name in lowest} <= {"q0"}


def test_neighbours_are_at_or_above_our_bytes() -> None:
    curve = by_codec([point("jpeg", 300), point("webp", 50), point("jpeg", 100)])["jpeg"]
    assert [p.mean_bytes for p in curve] == [100, 300]
    for wanted, found in ((90, 100), (100, 100), (101, 300)):
        nearest = nearest_at_or_above(curve, wanted)
        assert nearest is not None
        assert nearest.mean_bytes == found
    assert nearest_at_or_above(curve, 301) is None


def test_bytes_for_an_accuracy_are_interpolated_in_log_bytes() -> None:
    curve = [point("jpeg", 100, 50), point("jpeg", 200, 40), point("jpeg", 400, 90)]
    found = bytes_for_accuracy(curve, 0.7)
    assert found is not None
    assert (found.codec, found.relation) == ("jpeg", "=")
    assert found.mean_bytes == pytest.approx(200)  # half way from 100 to 400 in log bytes
    below, above = bytes_for_accuracy(curve, 0.5), bytes_for_accuracy(curve, 0.95)
    assert below is not None
    assert above is not None
    assert (below.relation, below.mean_bytes) == ("<=", 100)
    assert (above.relation, above.mean_bytes) == (">", 400)
    assert bytes_for_accuracy([point("jpeg", 100)], 0.5) is None


def test_csv_holds_intervals_and_leaves_the_unknown_empty(tmp_path: Path) -> None:
    path = tmp_path / "points.csv"
    write_csv([point("jpeg", 100.5, 80), point("webp", 10)], path)
    first, second = csv.DictReader(io.StringIO(path.read_text()))
    assert (first["mean_bytes"], first["decoded_accuracy"]) == ("100.5", "0.8")
    assert float(first["decoded_low"]) < 0.8 < float(first["decoded_high"])
    assert second["decoded_accuracy"] == second["feature_distance"] == ""


def test_sections_of_a_page_are_renewed_in_place(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Title\n")
    replace_section(page, "nav", "old")
    replace_section(page, "food", "other")
    replace_section(page, "nav", "new")
    text = page.read_text()
    assert text.startswith("# Title\n\n<!-- nav: begin -->\n\nnew\n")
    assert "old" not in text
    assert text.index("new") < text.index("other")


def test_the_command_names_what_is_missing() -> None:
    runner = CliRunner()
    absent = runner.invoke(app, ["compare", "--suite", "nav"])
    assert absent.exit_code == 2
    assert "give --data" in absent.output
    unknown = runner.invoke(app, ["compare", "--suite", "roads", "--data", "x.zip"])
    assert unknown.exit_code == 2
    assert "unknown suite" in unknown.output


@pytest.mark.parametrize("option", ["--out", "--report"])
def test_the_command_looks_for_room_before_it_compares(
    option: str, tmp_path: Path, photograph: Pixels, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compared(*_: object) -> None:
        raise AssertionError("compared before looking where results go")

    monkeypatch.setattr("scq.cli_compare.run_suite", compared)
    picture = tmp_path / "picture.png"
    picture.write_bytes(write_png(photograph))
    target = {"--out": picture, "--report": tmp_path}[option]
    words = ["compare", "--suite", "nav", "--data", str(picture), option, str(target)]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2, result.output
    assert target.name in result.output.replace("\n", "")
