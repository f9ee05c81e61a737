"""`vqclient inspect` and `vqclient fetch`: what codes say of themselves, what a device needs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from vqclient.cli.config import TokenizerAddress, connections
from vqclient.cli.run import CliError, command, console, read_file, with_exit_code, write_file
from vqclient.scq1 import CodesHeader, HeaderError, parse_header


def inspect(codes: Annotated[Path, typer.Argument(help="File made by encode.")]) -> None:
    """Show the header of codes; needs no server."""
    with_exit_code(lambda: _inspect(codes))


def _inspect(path: Path) -> None:
    codes = read_file(path)
    try:
        header = parse_header(codes)
    except HeaderError as error:
        raise CliError(f"{path}: {error}") from error
    table = Table("field", "value")
    for name, value in _described(header, len(codes)).items():
        table.add_row(name, value)
    console.print(table)


def _described(header: CodesHeader, num_bytes: int) -> dict[str, str]:
    size = f"{header.width}x{header.height}" if header.width else "that of the key frame before it"
    rows = {
        "frame": f"{header.frame_type}, {header.entropy}",
        "picture": size + (", scaled down to fit the model" if header.letterboxed else ""),
        "model": header.model_hash,
        "tiles": f"of {header.tile_side} latents" if header.tile_side else "one",
        "bytes": f"{num_bytes:,}, {header.header_bytes} of them header",
        "checksum": "holds" if header.intact else "does not hold: the frame is cut or damaged",
    }
    if header.reference is not None:
        rows["changes"] = f"the frame with fingerprint {header.reference:08x}"
    return rows


@command
async def fetch(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Tokenizer model, by name or hash.")],
    names: Annotated[list[str] | None, typer.Argument(help="Files wanted. [default: all]")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to write to. [default: MODEL]")
    ] = None,
    tokenizer_address: TokenizerAddress = None,
) -> None:
    """Download the files that a device needs of a model: graphs, codebook, entropy tables."""
    folder = output or Path(model)
    async with connections(context).tokenizer(tokenizer_address) as client:
        described = await client.model(model)
        listed = [file.name for file in described.artifacts]
        _make_folder(folder)
        for name in names or listed:
            file = await client.artifact(described.model.model_hash, name)
            write_file(folder / Path(file.name).name, file.data)
            typer.echo(f"{folder / file.name}: {file.size_bytes:,} bytes, {file.sha256[:12]}")


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CliError(f"cannot make folder {folder}: {error.strerror}") from error
