"""`scq data`: fetch data sets when asked, and say what lies at a path."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

from scq.datasets import describe
from scq.datasets.fetch import DOWNLOADS, fetch

data_app = typer.Typer(no_args_is_help=True, help="Data sets: fetch them, look at them.")


@data_app.command("fetch")
def fetch_command(
    name: Annotated[str, typer.Argument(help=f"One of: {', '.join(sorted(DOWNLOADS))}.")],
    to: Annotated[Path, typer.Option("--to", help="Folder to unpack into.")],
    mirror: Annotated[
        str | None, typer.Option(help="Address that serves the archives by name, http or https.")
    ] = None,
) -> None:
    """Download and unpack a data set from its official address; run again to resume."""
    if name in DOWNLOADS:
        known = DOWNLOADS[name]
        typer.echo(f"{name}: {known.size}; terms: {known.terms}", err=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, TransferSpeedColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task(name, total=None)

        def show(done: int, total: int | None, file: str) -> None:
            progress.update(task, description=file, completed=done, total=total)

        fetch(name, to, mirror=mirror, progress=show)
    info_command(to)


@data_app.command("info")
def info_command(
    path: Annotated[Path, typer.Argument(help="A data set, or a folder, zip, picture or video.")],
) -> None:
    """Say which layout lies at a path, and count its pictures."""
    info = describe(path)
    table = Table("split", "pictures", "classes", "sizes", title=f"{info.layout} at {info.root}")
    for split in info.splits:
        small, large = ("x".join(map(str, size)) for size in (split.smallest, split.largest))
        sizes = small if small == large else f"{small} to {large}"
        table.add_row(split.name, str(split.num_images), str(split.num_classes), sizes)
    Console().print(table)
