"""`vqclient encode`, `decode` and `recognize`: one file in, one answer out."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from vqclient.cli.coding import EntropyOption, PartialOption, RateOption, TileOption
from vqclient.cli.config import TokenizerAddress, connections
from vqclient.cli.run import CliError, command, console, read_file, write_file
from vqclient.scq1 import is_codes
from vqclient.types import Coding, EntropyMode, ImageFormat

_FORMATS_BY_SUFFIX = {
    ".png": ImageFormat.PNG,
    ".jpg": ImageFormat.JPEG,
    ".jpeg": ImageFormat.JPEG,
    ".webp": ImageFormat.WEBP,
}

Output = Annotated[Path | None, typer.Option("--output", "-o", help="File to write.")]


@command
async def encode(
    context: typer.Context,
    image: Annotated[Path, typer.Argument(help="JPEG, PNG or WebP file.")],
    output: Output = None,
    model: Annotated[str, typer.Option(help="Tokenizer model.")] = "nav",
    entropy: EntropyOption = EntropyMode.AUTO,
    tile_side: TileOption = 0,
    rate_weight: RateOption = 0.0,
    tokenizer_address: TokenizerAddress = None,
) -> None:
    """Turn a picture into codes (default output: the picture's name with .scq)."""
    source = read_file(image)
    target = output or image.with_suffix(".scq")
    coding = Coding(entropy, tile_side, rate_weight)
    async with connections(context).tokenizer(tokenizer_address) as client:
        start = time.perf_counter()
        encoded = await client.encode(source, model=model, coding=coding)
        milliseconds = 1000 * (time.perf_counter() - start)
    write_file(target, encoded.codes)
    ratio = len(source) / max(len(encoded.codes), 1)
    typer.echo(
        f"{target}: {len(encoded.codes):,} bytes, {encoded.bpp:.4f} bpp, "
        f"{encoded.width}x{encoded.height}, model {encoded.model}, "
        f"{ratio:.1f}x smaller than {image.name}, {milliseconds:.0f} ms"
    )


@command
async def decode(
    context: typer.Context,
    codes: Annotated[Path, typer.Argument(help="File made by encode.")],
    output: Output = None,
    partial: PartialOption = False,
    tokenizer_address: TokenizerAddress = None,
) -> None:
    """Turn codes into a picture (default output: the codes' name with .decoded.png)."""
    target = output or codes.with_suffix(".decoded.png")
    image_format = _format_of(target)
    source = read_file(codes)
    async with connections(context).tokenizer(tokenizer_address) as client:
        start = time.perf_counter()
        decoded = await client.decode(source, format=image_format, allow_partial=partial)
        milliseconds = 1000 * (time.perf_counter() - start)
    write_file(target, decoded.image)
    typer.echo(
        f"{target}: {decoded.width}x{decoded.height} {decoded.format}, model {decoded.model}, "
        f"from {len(source):,} bytes of codes, {milliseconds:.0f} ms{_cut_note(decoded.complete)}"
    )


@command
async def recognize(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="Picture, or codes made by encode.")],
    model: Annotated[
        str | None, typer.Option(help="Model; codes name their own. [default: food]")
    ] = None,
    top_k: Annotated[int, typer.Option(min=1, max=100, help="Labels wanted.")] = 5,
    partial: PartialOption = False,
    tokenizer_address: TokenizerAddress = None,
) -> None:
    """Say what a picture, or the codes of one, shows."""
    payload = read_file(file)
    async with connections(context).tokenizer(tokenizer_address) as client:
        if is_codes(payload):
            found = await client.recognize(
                codes=payload, model=model or "", top_k=top_k, allow_partial=partial
            )
        else:
            found = await client.recognize(image=payload, model=model or "food", top_k=top_k)
    table = Table("label", "probability")
    for label in found.labels:
        table.add_row(label.name, f"{label.score:.3f}")
    console.print(table)
    typer.echo(
        f"model {found.model}, {found.coded_bytes:,} bytes of codes{_cut_note(found.complete)}"
    )


def _cut_note(complete: bool) -> str:
    return "" if complete else "; the codes were cut, so this is their base layer"


def _format_of(target: Path) -> ImageFormat:
    image_format = _FORMATS_BY_SUFFIX.get(target.suffix.lower())
    if image_format is None:
        raise CliError(f"cannot write {target}: name it .png, .jpg or .webp")
    return image_format
