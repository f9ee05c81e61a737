"""Studies: shared pictures and autoencoder, rows that survive a kill, tables at equal bytes."""

from __future__ import annotations

import math
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner, Result

from scq.cli import app
from scq.errors import InvalidImage, ScqError
from scq.images import write_png
from scq.quantizers import QuantizerConfig
from scq.study.autoencoder import AutoencoderConfig, StudyAutoencoder, load_autoencoder
from scq.study.pictures import load_pictures
from scq.study.report import interpolate, report
from scq.study.results import ResultRow, TraceRow, append_rows, read_rows
from scq.study.runner import RESULTS, TRACES, Workplace, run_study
from scq.study.spec import STUDIES, Settings, Study, Variant, find_study, runs
from scq.study.training import Budget, batches, optimise

TINY = Settings(
    autoencoder=AutoencoderConfig(8, 8, 4),
    pretraining=Budget(3, 4),
    finetuning=Budget(3, 4, bfloat16=False),
    table_pictures=6,
    initial_latents=200,
    num_train=20,
    num_test=5,
)
CODES = QuantizerConfig(code_dim=4, num_codes=16, dead_code_interval=2)
VARIANTS = (
    Variant("SCQ K=16 s=2 n=4", "scq_sparse", CODES),
    Variant("VQ 16", "vq", CODES),
    Variant("unquantized", "none", CODES),
)
STUDY = Study("rate", "A question.", VARIANTS)
SOFT = Study(
    "solver", "Another.", (Variant("exact", "scq_exact", CODES),), end_to_end=True, traced=True
)
ROW = ResultRow(
    study="rate",
    pictures="cifar10",
    label="VQ 16",
    quantizer="vq",
    seed=0,
    steps=3,
    rate_weight=0.0,
    raw_bits_per_latent=4.0,
    raw_bytes=8.0,
    rans_bytes=7.5,
    mse=0.01,
    psnr_db=20.0,
    forward_mse=0.01,
    latent_mse=0.2,
    top1_usage=1.0,
    perplexity=12.0,
    mass_perplexity=12.0,
    seconds=1.0,
)


def write_zip(path: Path, count: int, size: int = 32) -> None:
    rng = np.random.default_rng(count)
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(count):
            coarse = rng.integers(0, 256, (4, 4, 3), np.uint8)
            pixels = coarse.repeat(size // 4, 0).repeat(size // 4, 1)
            archive.writestr(f"{number:03d}.png", write_png(pixels))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for name, size in (("cifar10", 32), ("camvid", 64)):
        write_zip(tmp_path / "data" / name / "train.zip", 20, size)
        write_zip(tmp_path / "data" / name / "test.zip", 5, size)
    return tmp_path / "data"


@pytest.fixture
def place(tmp_path: Path, data: Path) -> Workplace:
    return Workplace(tmp_path / "out", data, TINY)


def scq(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_study_writes_one_measured_row_per_run(place: Workplace) -> None:
    lines: list[str] = []
    assert run_study(STUDY, place, (0, 1), progress=lines.append) == 6
    rows = read_rows(place.out / RESULTS, ResultRow)
    assert [(row.label, row.seed) for row in rows] == [
        (variant.label, seed) for seed in (0, 1) for variant in VARIANTS
    ]
    sparse, plain, bound = rows[:3]
    assert sparse.raw_bytes >= 16 * sparse.raw_bits_per_latent / 8
    # 16 latents of 4 bits; 64 to a chunk, so nothing is lost to rounding.
    assert plain.raw_bytes == 8.0
    assert 0 < plain.rans_bytes < 16
    assert math.isnan(bound.raw_bytes)
    assert all(0 < row.mse < 1 for row in rows)
    assert "cifar10 VQ 16 seed 0" in lines[1]


def test_a_killed_study_goes_on_where_it_stopped(place: Workplace) -> None:
    run_study(STUDY, place, (0,))
    path = place.out / RESULTS
    whole = path.read_text()
    lines = whole.splitlines(keepends=True)
    # Killed while the last row was being written.
    path.write_text("".join(lines[:-1]) + lines[-1][:20])
    assert run_study(STUDY, place, (0,)) == 1
    again = read_rows(path, ResultRow)
    assert [row.key for row in again] == [("cifar10", variant.label, 0) for variant in VARIANTS]
    # The same seed gives the same numbers.
    assert again[2].mse == float(lines[-1].split(",")[10])
    assert run_study(STUDY, place, (0,)) == 0


def test_traced_studies_log_how_well_the_solver_did(place: Workplace) -> None:
    run_study(SOFT, place, (0,))
    (trace,) = read_rows(place.out / TRACES, TraceRow)
    assert trace.step == 0
    assert trace.kkt_residual < 1e-6
    assert 1 <= trace.support <= 5
    (row,) = read_rows(place.out / RESULTS, ResultRow)
    assert row.forward_mse == pytest.approx(row.mse, rel=0.05)


def test_frozen_studies_leave_the_encoder_alone(place: Workplace) -> None:
    run_study(replace(STUDY, variants=VARIANTS[1:2]), place, (0,))
    (path,) = (place.out / "autoencoders").iterdir()
    assert path.name == "cifar10-0.safetensors"
    model = load_autoencoder(path, TINY.autoencoder)
    pictures = load_pictures("cifar10", place.data, 20, 5).train
    latents = model.encode(pictures.float() / 255)
    assert float(latents.detach().std()) == pytest.approx(1, abs=0.05)


def test_results_of_other_settings_are_not_mixed(place: Workplace) -> None:
    with pytest.raises(ScqError, match="other settings; use a new --out"):
        Workplace(place.out, place.data, replace(TINY, num_test=4))


def test_broken_autoencoders_are_named(place: Workplace, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"no")
    with pytest.raises(ScqError, match=r"x\.safetensors: .*delete it to pretrain again"):
        load_autoencoder(path, TINY.autoencoder)


def test_pictures_are_the_same_every_time(data: Path) -> None:
    first, second = (load_pictures("nav", data, 50, 10) for _ in range(2))
    assert first.train.shape == (50, 3, 32, 32)
    assert first.train.dtype == torch.uint8
    assert torch.equal(first.test, second.test)
    assert not torch.equal(first.train[:5], first.train[5:10])


def test_whole_pictures_are_resized(data: Path) -> None:
    write_zip(data / "gtsrb" / "train.zip", 4, 48)
    write_zip(data / "gtsrb" / "test.zip", 3, 24)
    pictures = load_pictures("gtsrb", data, 9, 9)
    assert (pictures.train.shape, len(pictures.test)) == ((4, 3, 32, 32), 3)


def test_missing_picture_sets_are_named_with_the_remedy(data: Path) -> None:
    with pytest.raises(ScqError, match=r"food101: no such folder.*scq data fetch food101"):
        load_pictures("food", data, 9, 9)
    with pytest.raises(ScqError, match="unknown picture set 'mnist'"):
        load_pictures("mnist", data, 9, 9)


def test_the_autoencoder_takes_one_size() -> None:
    model = StudyAutoencoder(TINY.autoencoder)
    images = torch.rand(2, 3, 32, 32)
    latents = model.encode(images)
    assert latents.shape == (2, 4, 4, 4)
    assert model.decode(latents).shape == images.shape
    with pytest.raises(InvalidImage, match=r"must be \(B, 3, 32, 32\)"):
        model.encode(torch.rand(2, 3, 16, 16))


def test_batches_show_every_picture_once_an_epoch() -> None:
    shown = torch.cat(list(batches(12, Budget(6, 4), seed=3)))
    assert sorted(shown[:12].tolist()) == list(range(12))
    assert sorted(shown[12:].tolist()) == list(range(12))
    assert next(batches(3, Budget(1, 8), 0)).shape == (8,)


def test_training_moves_what_is_trained_and_stops_at_nonsense() -> None:
    model = nn.Linear(1, 1)
    source = batches(4, Budget(30, 2, learning_rate=0.1), 0)
    averaged = optimise(
        model, lambda chosen, step: model.weight.square().sum(), source, Budget(30, 2, 0.1)
    )
    assert abs(float(averaged.weight.detach())) < 0.5
    with pytest.raises(ScqError, match="not finite at step 0"):
        optimise(
            model,
            lambda chosen, step: model.weight.sum() * math.nan,
            batches(4, Budget(1, 2), 0),
            Budget(1, 2),
        )
    model.requires_grad_(False)
    with pytest.raises(ScqError, match="every parameter is frozen"):
        optimise(model, lambda chosen, step: torch.zeros(()), iter(()), Budget(1))


@pytest.mark.parametrize(
    "change", [{"steps": 0}, {"batch_size": 0}, {"learning_rate": 1.0}, {"average_decay": 1.0}]
)
def test_impossible_budgets_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(ScqError):
        Budget(**({"steps": 5} | change))  # type: ignore[arg-type]


def test_rows_survive_the_file_and_a_torn_end(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    assert read_rows(path, ResultRow) == []
    append_rows(path, [ROW])
    path.write_text(path.read_text() + "rate,cifar10,half a r")
    assert read_rows(path, ResultRow) == [ROW]
    append_rows(path, [replace(ROW, seed=1)])
    assert [row.seed for row in read_rows(path, ResultRow)] == [0, 1]
    with pytest.raises(ScqError, match=r"columns are .*use a new --out"):
        read_rows(path, TraceRow)
    path.write_text(path.read_text().replace("20", "twenty"))
    with pytest.raises(ScqError, match="a row cannot be read"):
        read_rows(path, ResultRow)


def test_every_study_names_its_runs_apart() -> None:
    for study in STUDIES.values():
        keys = [run.key for run in runs(study, (0, 1))]
        assert len(set(keys)) == len(keys)
    with pytest.raises(ScqError, match="unknown study 'speed'; available: rate"):
        find_study("speed")
    with pytest.raises(ScqError, match="unknown picture set 'moon'"):
        list(runs(STUDY, (0,), ("moon",)))


def test_curves_are_followed_a_little_beyond_their_ends() -> None:
    curve = [(24.0, 20.0), (32.0, 21.0)]
    assert interpolate(curve, 28) == pytest.approx(20.5)
    assert interpolate(curve, 23) == pytest.approx(19.875)
    assert interpolate(curve, 34) == pytest.approx(21.25)
    assert math.isnan(interpolate(curve, 21))
    assert math.isnan(interpolate(curve, 36))
    assert math.isnan(interpolate(curve[:1], 24))


def test_reports_compare_at_equal_bytes(tmp_path: Path) -> None:
    rows = [
        replace(ROW, seed=seed, psnr_db=20.0 + seed, mse=0.01 - 0.001 * seed) for seed in (0, 1)
    ]
    for seed in (0, 1):
        for label, raw, rans, psnr in (
            ("SCQ K=9 s=2 n=2", 6.0, 6.0, 20.0),
            ("SCQ K=12 s=2 n=2", 10.0, 10.0, 21.0),
        ):
            rows.append(
                replace(
                    ROW,
                    label=label,
                    quantizer="scq_sparse",
                    seed=seed,
                    raw_bytes=raw,
                    rans_bytes=rans,
                    psnr_db=psnr + seed,
                )
            )
    append_rows(tmp_path / RESULTS, [replace(row, label="VQ 4096") for row in rows[:2]] + rows[2:])
    text = report(tmp_path)
    assert "| VQ 4096 | 4.00 | 8.00 | 7.50 ± 0.00 | 9.500 ± 0.707 | 20.50 ± 0.71 |" in text
    assert "| cifar10 | VQ 4096 | +0.50 ± 0.00 | +0.38 ± 0.00 | - | 2 |" in text


def test_the_command_refuses_in_one_line(tmp_path: Path) -> None:
    for arguments, message in (
        (("study", "rate"), "give --out DIR"),
        (("study", "rate", "--out", tmp_path), "give --data DIR"),
        (("study", "speed", "--out", tmp_path, "--data", tmp_path), "unknown study 'speed'"),
        (("study", "rate", "--out", tmp_path, "--data", tmp_path, "--seeds", "0,x"), "--seeds"),
        (("study", "rate", "--out", tmp_path, "--data", tmp_path), "cifar10: no such folder"),
        (("study", "report"), "report needs the results folder"),
        (("study", "report", tmp_path / "none"), "no results.csv"),
    ):
        result = scq(*arguments)
        assert result.exit_code == 2, result.output
        assert message in " ".join(result.stderr.split())


def test_the_published_tables_are_those_of_the_committed_rows() -> None:
    docs = Path(__file__).parents[3] / "docs/benchmarks"
    text = (docs / "scq-studies.md").read_text()
    start, end = "<!-- scq study report docs/benchmarks/scq-studies -->", "<!-- end of report -->"
    published = text.split(start)[1].split(end)[0].strip()
    assert published == report(docs / "scq-studies").strip()
