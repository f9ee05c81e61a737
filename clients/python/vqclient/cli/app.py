"""The commands in one place."""

from __future__ import annotations

import typer

from vqclient.cli import images
from vqclient.cli.chat import chat
from vqclient.cli.codes import fetch, inspect
from vqclient.cli.config import connect
from vqclient.cli.models import models
from vqclient.cli.stream import stream

app = typer.Typer(
    name="vqclient",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.callback()(connect)
for function in (
    images.encode,
    images.decode,
    images.recognize,
    inspect,
    stream,
    chat,
    models,
    fetch,
):
    app.command()(function)


def main() -> None:
    """Entry point of the console script."""
    app()
