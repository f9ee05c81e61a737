"""What the `scq` subcommands share: options, finding a model, progress bars.

Progress goes to stderr. Knows no subcommand.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
)

from scq import zoo
from scq.codec import FrameCodec
from scq.model import ScqAutoencoder, load_model

ModelOption = Annotated[
    str, typer.Option("--model", "-m", help="Shipped model name, or a .safetensors file.")
]
ModelFilesOption = Annotated[
    list[Path] | None,
    typer.Option("--model", "-m", help="Model files to know besides the shipped ones."),
]
MaxPixelsOption = Annotated[
    int, typer.Option(min=1, help="Refuse pictures with more pixels than this.")
]
PartialOption = Annotated[
    bool, typer.Option("--partial", help="Settle for the base layer where the codes are cut.")
]


def named_model(name: str) -> ScqAutoencoder:
    """A model file when `name` ends in .safetensors, else a shipped model.

    Raises ScqError for an unusable file, UnknownModel for an unknown name.
    """
    return load_model(name) if name.endswith(".safetensors") else zoo.load(name)


def named_codec(name: str) -> FrameCodec:
    """The codec of `named_model`."""
    return FrameCodec(named_model(name))


def progress_bar(*extra: Any) -> Progress:
    """A bar with counts on stderr, and `extra` columns after them."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, *extra, console=Console(stderr=True))


@contextmanager
def stages(*names: str) -> Iterator[Any]:
    """A bar over named stages; the yielded function marks one as done."""
    with progress_bar() as progress:
        task = progress.add_task(names[0], total=len(names))

        def finish_stage() -> None:
            progress.advance(task)
            done = int(progress.tasks[0].completed)
            progress.update(task, description=names[min(done, len(names) - 1)])

        yield finish_stage
