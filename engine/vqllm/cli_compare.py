"""`vqllm compare`: our methods and other quantizers on one reference, one text, one table."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from vqllm.errors import InvalidConfig
from vqllm.fetch import SOURCES

if TYPE_CHECKING:
    from vqllm.evaluation.compare import Row

MAX_WIDTH = 16


def compare(
    model: Annotated[
        str, typer.Argument(help=f"Reference folder, or a known name: {', '.join(SOURCES)}.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of rows and tables.")],
    text: Annotated[
        list[str], typer.Option(help="NAME=FILE or FILE, UTF-8; may be given several times.")
    ],
    methods: Annotated[str, typer.Option(help="Of our grid, by commas; empty for none.")] = (
        "gptq,vptq,tcq"
    ),
    bits: Annotated[str, typer.Option(help="Widths, or budgets as 2.25, by commas.")] = "2,3,4",
    preprocess: Annotated[str, typer.Option(help="none, quarot, smoothquant.")] = "quarot",
    arm: Annotated[
        list[str] | None, typer.Option(help="One more arm: NAME=options of vqllm quantize.")
    ] = None,
    baselines: Annotated[bool, typer.Option(help="RTN and GPTQ without anything added.")] = True,
    peers: Annotated[bool, typer.Option(help="Other quantizers, where they can be run.")] = True,
    llama_cpp: Annotated[
        Path | None, typer.Option(help="Folder of llama-quantize and llama-imatrix.")
    ] = None,
    gptqmodel_python: Annotated[
        Path | None, typer.Option(help="Python of an environment with gptqmodel.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Seeds per arm.", min=1)] = 3,
    calibration: Annotated[
        Path | None, typer.Option(help="Text all arms calibrate on; default is the package's.")
    ] = None,
    calibration_windows: Annotated[int, typer.Option(min=1)] = 64,
    windows: Annotated[int, typer.Option(help="Windows per text; 0 is all.", min=0)] = 0,
    window_length: Annotated[int, typer.Option(help="Tokens per window.", min=2)] = 512,
    threads: Annotated[int, typer.Option(help="Threads of every arm.", min=1)] = 2,
    cache: Annotated[
        Path | None,
        typer.Option(help="Cache folder; default is the user's cache.", show_default=False),
    ] = None,
) -> None:
    """Quantize by every method and score all on the same tokens; a stopped run goes on.

    Writes comparison.md, comparison.csv and comparison.json into the output folder.
    """
    from vqllm.api import resolve_model
    from vqllm.evaluation import compare_grid as grid
    from vqllm.evaluation.compare import Comparison, ComparisonConfig
    from vqllm.evaluation.windows import WindowConfig

    messages = Console(stderr=True)
    config = ComparisonConfig(
        reference=resolve_model(model, cache),
        texts=dict(_named(entry) for entry in text),
        output=output,
        calibration=calibration,
        calibration_windows=calibration_windows,
        calibration_length=window_length,
        windows=WindowConfig(window_length, windows),
        seeds=tuple(range(seeds)),
        num_threads=threads,
    )
    paths = grid.PeerPaths(llama_cpp, gptqmodel_python, output / "cache")
    widths = _widths(bits)
    arms = [
        *grid.our_grid(_words(methods), widths, _words(preprocess)),
        *(grid.parse_arm(entry) for entry in arm or ()),
        *(grid.baselines() if baselines else ()),
        *(grid.peers(paths) if peers else ()),
    ]
    comparison = Comparison(config, lambda line: messages.print(line, highlight=False))
    write_tables(comparison.title, comparison.run(arms), list(config.texts), output)
    typer.echo((output / "comparison.md").read_text(encoding="utf-8"))


def write_tables(reference: str, rows: list[Row], texts: list[str], output: Path) -> None:
    """comparison.md, .csv and .json."""
    from vqllm.evaluation import compare_table as table

    contents = {
        "md": table.to_markdown(rows, texts),
        "csv": table.to_csv({reference: rows}, texts),
        "json": json.dumps(table.to_json(rows, texts), indent=2) + "\n",
    }
    for suffix, content in contents.items():
        (output / f"comparison.{suffix}").write_text(content, encoding="utf-8")


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _widths(text: str) -> tuple[float, ...]:
    try:
        widths = tuple(float(word) for word in _words(text))
    except ValueError:
        widths = (math.nan,)
    if not all(0 < width <= MAX_WIDTH for width in widths):
        raise InvalidConfig("bits", text, f"numbers in (0, {MAX_WIDTH}] by commas, as in 2,2.25,4")
    return widths


def _named(entry: str) -> tuple[str, Path]:
    name, separator, path = entry.partition("=")
    return (name, Path(path)) if separator else (Path(entry).stem, Path(entry))
