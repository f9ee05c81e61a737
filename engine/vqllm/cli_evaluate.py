"""`vqllm evaluate`: perplexity, distance to a reference and true size of one folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from vqllm.cli_output import STANDARD_OUTPUT, check_target
from vqllm.fetch import SOURCES


def evaluate(
    model: Annotated[str, typer.Argument(help=f"Folder, or a known name: {', '.join(SOURCES)}.")],
    reference: Annotated[
        str | None,
        typer.Option(help="Folder or known name of the original, for KL and agreement."),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="UTF-8 text to score; default is one in the package.")
    ] = None,
    json_file: Annotated[
        str | None, typer.Option("--json", help="Write every number to this file; - prints it.")
    ] = None,
    windows: Annotated[int, typer.Option(help="Windows to score; 0 is the whole text.", min=0)] = 0,
    spread: Annotated[
        bool, typer.Option("--spread", help="Take --windows evenly over the text, not the first.")
    ] = False,
    window_length: Annotated[int, typer.Option(help="Tokens per window.", min=2)] = 512,
    executor: Annotated[
        str,
        typer.Option(help="torch is exact; native and onnx score what is served."),
    ] = "torch",
    tasks: Annotated[
        str, typer.Option(help="Zero-shot tasks by commas: arc_easy, piqa and so on.")
    ] = "",
    tasks_dir: Annotated[
        Path, typer.Option(help="Local copies of the tasks in their official files.")
    ] = Path("tasks"),
    task_limit: Annotated[int, typer.Option(help="First items of each; 0 is all.", min=0)] = 0,
    threads: Annotated[int, typer.Option(help="Threads; 0 leaves it to the library.", min=0)] = 0,
    cache: Annotated[
        Path | None,
        typer.Option(help="Cache folder; default is the user's cache.", show_default=False),
    ] = None,
) -> None:
    """Score a text with a model as it lies on disk, and compare with a reference model.

    Windows do not overlap and no token is put in front of them.
    """
    from vqllm.api import resolve_model
    from vqllm.evaluation.evaluate import (
        EvaluationOptions,
        TaskOptions,
        evaluate_folder,
        evaluate_tasks,
        read_items,
    )
    from vqllm.evaluation.windows import WindowConfig

    check_target("json", json_file)
    options = EvaluationOptions(
        text, WindowConfig(window_length, windows, spread), executor, threads
    )
    names = tuple(name.strip() for name in tasks.split(",") if name.strip())
    asked = TaskOptions(tasks_dir, names, task_limit)
    read_items(asked)  # a task that is missing shows now, not after the text is scored
    folder = resolve_model(model, cache)
    original = None if reference is None else resolve_model(reference, cache)
    columns = (TextColumn("scoring"), BarColumn(), MofNCompleteColumn())
    messages = Console(stderr=True)
    with Progress(*columns, TimeElapsedColumn(), console=messages, transient=True) as progress:
        task = progress.add_task("scoring", total=None)

        def show(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        result = evaluate_folder(folder, original, options, show)
        facts = result.to_dict()
        if names:
            facts["tasks"] = evaluate_tasks(folder, original, asked, options, show)
    _show(facts, json_file)


def _show(facts: dict[str, Any], json_file: str | None) -> None:
    content = json.dumps(facts, indent=2)
    if json_file == STANDARD_OUTPUT:
        typer.echo(content)
        return
    if json_file is not None:
        Path(json_file).write_text(content + "\n", encoding="utf-8")
    table = Table(title=str(facts["model"]), show_header=False)
    tasks = facts.pop("tasks", {})
    for name, value in [*facts.items(), *tasks.items()]:
        table.add_row(name, f"{value:.4f}" if isinstance(value, float) else str(value))
    Console().print(table)
