"""`vqllm bench`: tokens per second of our engines and of others, side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from vqllm.cli_output import STANDARD_OUTPUT, check_target

_PIPE_COLUMNS = 180


def bench(
    models: Annotated[list[str], typer.Argument(help="Model folders, or known names.")],
    json_file: Annotated[
        str | None, typer.Option("--json", help="Write the rows to this file; - prints them.")
    ] = None,
    engines: Annotated[
        str,
        typer.Option(
            help="Which, by commas: native, onnx, llama.cpp; the last only with a --gguf.",
            show_default="those that have something to run",
        ),
    ] = "",
    gguf: Annotated[
        list[Path] | None, typer.Option(help="A file that llama.cpp runs; may be repeated.")
    ] = None,
    prompt: Annotated[int, typer.Option(help="Tokens per prompt.", min=1)] = 512,
    tokens: Annotated[int, typer.Option(help="Tokens per answer.", min=5)] = 64,
    batch: Annotated[int, typer.Option(help="Sequences at the same time.", min=1)] = 1,
    rounds: Annotated[int, typer.Option(help="Turns of every engine, interleaved.", min=5)] = 5,
    temperature: Annotated[float, typer.Option(help="Of sampling; 0 is greedy.")] = 0.0,
    threads: Annotated[int, typer.Option(help="Threads of every engine.", min=0)] = 0,
    cache: Annotated[
        Path | None,
        typer.Option(help="Cache folder; default is the user's cache.", show_default=False),
    ] = None,
) -> None:
    """Measure decode and prefill speed, interleaved, beside the memory's speed in the same run."""
    from vqllm.runtime.bench import BenchConfig, make_contenders, run_bench

    check_target("json", json_file)
    messages = Console(stderr=True)
    config = BenchConfig(threads, prompt, tokens, batch, rounds, temperature)
    folders = [_folder(model, cache) for model in models]
    names = (engines or ("native,onnx,llama.cpp" if gguf else "native,onnx")).split(",")
    contenders = make_contenders(folders, names, config, gguf or (), messages.print)
    rows = [row.to_dict() for row in run_bench(contenders, config, messages.print)]
    text = json.dumps(rows, indent=2)
    if json_file == STANDARD_OUTPUT:
        typer.echo(text)
        return
    if json_file is not None:
        Path(json_file).write_text(text + "\n", encoding="utf-8")
    console = Console()
    # A file or a pipe has no width of its own, and the table needs more than the usual 80 columns.
    (console if console.is_terminal else Console(width=_PIPE_COLUMNS)).print(_table(rows))


def _folder(model: str, cache: Path | None) -> Path:
    if Path(model).is_dir():
        return Path(model)
    from vqllm.api import resolve_model  # imports the quantizers, and torch with them

    return resolve_model(model, cache)


def _table(rows: list[dict[str, object]]) -> Table:
    columns = {
        "engine": "engine",
        "model": "model",
        "bits": "bits",
        "threads": "threads",
        "batch_size": "batch",
        "decode_tok_s": "decode tok/s",
        "prefill_tok_s": "prefill tok/s",
        "p10_ms": "p10 ms",
        "median_ms": "median ms",
        "p90_ms": "p90 ms",
        "cold_ms": "cold ms",
        "ceiling_gb_s": "memory GB/s",
        "ceiling_fraction": "of it, cold",
        "hot_fraction": "hot",
        "load_s": "load s",
    }
    table = Table(*columns.values())
    for row in rows:
        table.add_row(*(_text(row[name]) for name in columns))
    return table


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if value < 100 else f"{value:.0f}"
    return "" if value is None else str(value)
