"""Options of the commands that make or read codes, each written once."""

from __future__ import annotations

from typing import Annotated

import typer

from vqclient.types import EntropyMode

EntropyOption = Annotated[EntropyMode, typer.Option(help="Entropy coder: auto, raw or rans.")]
TileOption = Annotated[
    int, typer.Option("--tile", min=0, max=255, help="Side of a tile in latents; 0 for one tile.")
]
RateOption = Annotated[
    float, typer.Option(min=0.0, help="Squared latent error that one bit is worth.")
]
PartialOption = Annotated[
    bool, typer.Option("--partial", help="Read the base layer of codes that were cut.")
]
KeyframeOption = Annotated[
    int | None,
    typer.Option(min=1, help="Frames between key frames. [default: the server's]"),
]
