"""The `scq` command and its short subcommands; longer ones are in their own `cli_*` modules.

Talks to people only: progress on stderr, results on stdout, one line and exit code 2 for
anything a person can put right. The work is done by the other modules; nothing imports this one.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import TextColumn
from rich.table import Table
from typer.core import TyperGroup

from scq import zoo
from scq.bitstream import parse_header
from scq.bitstream.frame import EntropyChoice
from scq.cli_compare import compare_command, features_app
from scq.cli_data import data_app
from scq.cli_export import export_command
from scq.cli_shared import (
    MaxPixelsOption,
    ModelFilesOption,
    ModelOption,
    PartialOption,
    named_codec,
    progress_bar,
    stages,
)
from scq.cli_study import study_command
from scq.cli_train import train_command
from scq.cli_vqvae import vqvae_app
from scq.codec import CodecRegistry
from scq.data import load_images
from scq.errors import InvalidImage, ScqError
from scq.evaluation import Evaluation, evaluate
from scq.images import DEFAULT_MAX_PIXELS, read_image, write_png
from scq.model import load_model

# Pictures listed one by one by `scq eval`; more than this and only the totals are of use.
_MAX_LISTED = 20


class _Commands(TyperGroup):
    """Turns the errors of scq and of the file system into one line and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (ScqError, OSError) as error:
            typer.echo(f"scq: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(2) from error


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Soft Convex Quantization: pictures to a few hundred bytes of codes, and back.",
)


@app.command()
def encode(
    image: Annotated[Path, typer.Argument(help="JPEG, PNG or WebP picture.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File for the codes.")],
    model: ModelOption = "nav",
    entropy: Annotated[
        EntropyChoice, typer.Option(help="auto takes the shorter of raw and rans.")
    ] = "auto",
    tile: Annotated[
        int | None, typer.Option(help="Side of independently decodable tiles, in latents.")
    ] = None,
    rate_weight: Annotated[
        float | None,
        typer.Option(help="Squared latent error that a bit is worth; more means fewer bytes."),
    ] = None,
    max_pixels: MaxPixelsOption = DEFAULT_MAX_PIXELS,
) -> None:
    """Code a picture of any size."""
    with stages("reading", "loading model", "coding", "writing") as stage:
        pixels = read_image(image.read_bytes(), max_pixels)
        stage()
        codec = named_codec(model)
        stage()
        encoded = codec.encode(pixels, entropy=entropy, tile=tile, rate_weight=rate_weight)
        stage()
        output.write_bytes(encoded.codes)
        stage()
    typer.echo(
        f"{output}: {pixels.shape[1]}x{pixels.shape[0]} in {encoded.stats.coded_bytes} bytes, "
        f"{encoded.stats.bpp:.4f} bpp, {encoded.stats.entropy}, "
        f"model {codec.name} ({codec.frame_hash.hex()})"
    )


@app.command()
def decode(
    codes: Annotated[Path, typer.Argument(help="File written by `scq encode`.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="PNG file to write.")],
    model: ModelFilesOption = None,
    partial: PartialOption = False,
    max_pixels: MaxPixelsOption = DEFAULT_MAX_PIXELS,
) -> None:
    """Turn codes back into a picture of the original size; the codes name their model."""
    if output.suffix.lower() != ".png":
        raise InvalidImage(f"decode writes PNG files, {output.name!r} should end in .png")
    with stages("reading", "loading model", "decoding", "writing") as stage:
        frame = codes.read_bytes()
        stage()
        codec = _registry(model, max_pixels).for_codes(frame, allow_partial=partial)
        stage()
        picture = codec.read(frame, allow_partial=partial)
        pixels = codec.render(picture)
        stage()
        output.write_bytes(write_png(pixels))
        stage()
    layer = "" if picture.complete else ", base layer only"
    typer.echo(f"{output}: {pixels.shape[1]}x{pixels.shape[0]} by model {codec.name}{layer}")


@app.command()
def recognize(
    codes: Annotated[Path, typer.Argument(help="File written by `scq encode`.")],
    model: ModelFilesOption = None,
    partial: PartialOption = False,
    top: Annotated[int, typer.Option(min=1, help="How many classes to list.")] = 5,
) -> None:
    """Name what the codes show, without decoding a picture."""
    registry = _registry(model, DEFAULT_MAX_PIXELS)
    labels = registry.recognize(codes.read_bytes(), allow_partial=partial)
    for label in labels[:top]:
        typer.echo(f"{label.score:7.2%}  {label.name}")


@app.command()
def inspect(
    codes: Annotated[Path, typer.Argument(help="File written by `scq encode`.")],
    partial: PartialOption = False,
) -> None:
    """Say what a frame's header says; needs no model."""
    frame = codes.read_bytes()
    header = parse_header(frame, allow_partial=partial)
    for field in fields(header):
        value = getattr(header, field.name)
        typer.echo(f"{field.name}: {value.hex() if isinstance(value, bytes) else value}")
    typer.echo(f"bytes: {len(frame)}")


@app.command()
def models() -> None:
    """List the shipped models."""
    table = Table("name", "id", "kind", "stride", "codes", "bits per latent", "classes")
    for info in zoo.list_models():
        config = info.config
        table.add_row(
            config.name,
            info.model_hash[:8],
            config.kind,
            str(config.stride),
            f"{config.num_codes} x {config.code_dim}",
            f"{config.lattice.bits_per_latent:.2f}",
            str(len(config.classes)),
        )
    Console().print(table)


@app.command("eval")
def evaluate_command(
    images: Annotated[list[Path] | None, typer.Argument(help="Pictures to code.")] = None,
    data: Annotated[
        list[Path] | None, typer.Option(help="Folders, zips or clips of pictures.")
    ] = None,
    model: ModelOption = "nav",
) -> None:
    """Measure quality, codebook use and bytes on pictures."""
    sources = [*(images or []), *(data or [])]
    if not sources:
        raise ScqError("nothing to evaluate; name pictures or give --data")
    codec = named_codec(model)
    with progress_bar(TextColumn("{task.fields[note]}")) as progress:
        task = progress.add_task("reading", total=None, note="")
        pictures = load_images(sources)
        progress.update(task, description="coding", total=len(pictures))
        report = evaluate(codec, pictures, lambda done, _: progress.update(task, completed=done))
    _print_evaluation(report)


app.command("train")(train_command)
app.command("export")(export_command)
app.command("compare")(compare_command)
app.add_typer(features_app, name="features")
app.command("study")(study_command)
app.add_typer(data_app, name="data")
app.add_typer(vqvae_app, name="vqvae")


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="scq")


def _registry(files: list[Path] | None, max_pixels: int) -> CodecRegistry:
    shipped = (zoo.load(info.name) for info in zoo.list_models())
    own = [load_model(path) for path in files or []]
    # A file named on the command line stands in for a shipped model of the same name.
    names = {model.config.name for model in own}
    others = [model for model in shipped if model.config.name not in names]
    return CodecRegistry([*own, *others], max_pixels=max_pixels)


def _print_evaluation(report: Evaluation) -> None:
    console = Console()
    if len(report.images) <= _MAX_LISTED:
        table = Table("picture", "size", "PSNR dB", "SSIM", "bytes", "bpp")
        for image in report.images:
            table.add_row(
                image.name,
                f"{image.width}x{image.height}",
                f"{image.psnr_db:.2f}",
                f"{image.ssim:.4f}",
                str(image.coded_bytes),
                f"{image.bpp:.4f}",
            )
        console.print(table)
    totals = Table("measure", "value", title=f"{report.model} ({report.model_hash[:8]})")
    for name, value in _totals(report):
        totals.add_row(name, value)
    console.print(totals)


def _totals(report: Evaluation) -> list[tuple[str, str]]:
    rows = [
        ("pictures", str(len(report.images))),
        ("PSNR", f"{report.psnr_db:.2f} dB"),
        ("SSIM", f"{report.ssim:.4f}"),
        ("top-1 usage", f"{report.top1_usage:.1%}"),
        ("perplexity", f"{report.perplexity:.1f}"),
        ("mass perplexity", f"{report.mass_perplexity:.1f}"),
        ("measured bytes", f"{report.coded_bytes} ({report.mean_coded_bytes:.1f} per picture)"),
        ("bpp", f"{report.bpp:.4f}"),
    ]
    if report.accuracy is not None:
        rows.append(("top-1 accuracy", f"{report.accuracy:.1%}"))
    return rows


if __name__ == "__main__":
    main()
