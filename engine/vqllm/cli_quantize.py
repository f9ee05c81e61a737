"""`vqllm quantize`: a model folder to a quantized one, with progress and resume."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from vqllm.fetch import SOURCES

if TYPE_CHECKING:
    from vqllm.quantization.parts import QuantizedPart
    from vqllm.tuning.tune import TuningStep

LOG_LINES = 20

_output = Console()
_messages = Console(stderr=True)


def quantize(
    model: Annotated[str, typer.Argument(help=f"Folder, or a known name: {', '.join(SOURCES)}.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write; must be new.")],
    method: Annotated[str, typer.Option(help="gptq, rtn, vptq or tcq.")] = "gptq",
    bits: Annotated[
        int | None, typer.Option(help="Bits per code; 4 without --bpw.", show_default=False)
    ] = None,
    bpw: Annotated[
        float | None,
        typer.Option(help="True bits per weight of the linears, overhead counted."),
    ] = None,
    group_size: Annotated[
        int | None, typer.Option(help="Weights per scale; default suits the method.")
    ] = None,
    symmetric: Annotated[
        bool | None,
        typer.Option(
            "--symmetric/--asymmetric",
            help="Zero point of gptq and rtn in the middle of the codes, or stored per group; "
            "default is what rounds best and other tools still run fast.",
            show_default=False,
        ),
    ] = None,
    direction: Annotated[
        str, typer.Option(help="Of the trellis of tcq: column (along the outputs), or row.")
    ] = "column",
    preprocess: Annotated[
        str | None,
        typer.Option(
            help="none, quarot, quarot-portable (for other tools) or smoothquant; default suits "
            "the method."
        ),
    ] = None,
    alpha: Annotated[
        float, typer.Option(help="Correction towards full-precision activations, 0 to 1.")
    ] = 0.5,
    damping: Annotated[
        str, typer.Option(help="Parts of the mean hessian diagonal to choose from.")
    ] = "0.01,0.03,0.1",
    calibration: Annotated[
        Path | None,
        typer.Option(help="UTF-8 text to calibrate on; default is a text in the package."),
    ] = None,
    windows: Annotated[int, typer.Option(help="Calibration windows.", min=1)] = 64,
    window_length: Annotated[int, typer.Option(help="Tokens per window.", min=1)] = 512,
    seed: Annotated[int, typer.Option(help="Of everything random.", min=0)] = 0,
    tune_steps: Annotated[
        int | None,
        typer.Option(help="Steps of tuning afterwards; default suits the width.", min=0),
    ] = None,
    embedding_bits: Annotated[
        int, typer.Option(help="8 stores embedding and head in 8 bits; 0 leaves them.")
    ] = 0,
    max_memory: Annotated[
        str | None, typer.Option(help="Limit such as 3GB; slower ways are taken to keep it.")
    ] = None,
    executor: Annotated[str, typer.Option(help="local, or ray for a Ray cluster.")] = "local",
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Go on with an unfinished run.")
    ] = True,
    threads: Annotated[
        int, typer.Option(help="Threads; 0 is one per processor. The result is the same.", min=0)
    ] = 0,
    cache: Annotated[
        Path | None,
        typer.Option(help="Cache folder; default is the user's cache.", show_default=False),
    ] = None,
) -> None:
    """Quantize a model's linear layers block by block into a new folder.

    A run that was stopped goes on when the same command is given again.
    """
    import torch

    from vqllm.api import AutoQuantizer, RunOptions
    from vqllm.calibration import CalibrationConfig
    from vqllm.quantization.mappers import make_mapper
    from vqllm.quantization.memory import parse_bytes, peak_bytes, reset_peak
    from vqllm.quantization.presets import QuantizeConfig, suggested_steps
    from vqllm.quantization.workers import Workers

    if threads:
        torch.set_num_threads(threads)
    reset_peak()
    if tune_steps is None:
        tune_steps = suggested_steps(method, bpw or bits or 4)
    config = QuantizeConfig(
        method=method,
        bits=bits,
        bpw=bpw,
        group_size=group_size,
        symmetric=symmetric,
        direction=direction,
        preprocess=preprocess,
        alpha=alpha,
        dampings=_numbers(damping),
        seed=seed,
        tune_steps=tune_steps,
        embedding_bits=embedding_bits,
    )
    text = CalibrationConfig(calibration, windows, window_length)
    limit = None if max_memory is None else parse_bytes(max_memory)
    quantizer = AutoQuantizer.from_pretrained(model, cache)
    start = time.monotonic()
    with (
        Workers(threads) as workers,
        make_mapper(executor) as mapper,
        _Display(quantizer.num_linears, tune_steps, quantizer.num_blocks) as display,
    ):
        reports = (display.report, display.report_tuning, display.report_measuring)
        elsewhere = None if executor == "local" else mapper
        options = RunOptions(resume, limit, workers, elsewhere, *reports)
        quantizer.quantize_to(output, config, text, options)
    _messages.print(
        f"{time.monotonic() - start:.0f} s, peak memory {peak_bytes() / 1e9:.2f} GB",
        highlight=False,
    )
    _print_info(output)


def rehearse(
    model: Annotated[str, typer.Argument(help="A name that `vqllm plan` knows, or a config.json.")],
    method: Annotated[str, typer.Option(help="gptq, rtn, vptq or tcq.")] = "gptq",
    bits: Annotated[int, typer.Option(help="Bits per code.")] = 2,
    alpha: Annotated[float, typer.Option(help="As for quantize.")] = 0.5,
    damping: Annotated[str, typer.Option(help="As for quantize.")] = "0.01",
    windows: Annotated[int, typer.Option(help="Calibration windows.", min=2)] = 16,
    window_length: Annotated[int, typer.Option(help="Tokens per window.", min=1)] = 2048,
    max_memory: Annotated[str | None, typer.Option(help="Limit such as 20GB.")] = None,
    threads: Annotated[int, typer.Option(help="Threads; 0 is one per processor.", min=0)] = 0,
) -> None:
    """Quantize one block of a model's true shapes with random weights, and measure it."""
    import torch

    from vqllm.plan.shapes import find_shape
    from vqllm.quantization.memory import parse_bytes
    from vqllm.quantization.presets import QuantizeConfig, make_recipe
    from vqllm.quantization.rehearsal import rehearse as run
    from vqllm.quantization.workers import Workers

    if threads:
        torch.set_num_threads(threads)
    wish = QuantizeConfig(method=method, bits=bits, alpha=alpha, dampings=_numbers(damping))
    limit = None if max_memory is None else parse_bytes(max_memory)
    shape = find_shape(model)
    recipe, size = make_recipe(wish, {}), (windows, window_length)
    with Workers(threads) as workers, _Display(len(shape.linear_shapes())) as display:
        done = run(shape, recipe, size, limit, display.report, workers)
    table = Table(title=f"one block of {model}", show_header=False)
    table.add_row("way", "lean: weights and states on disk" if done.is_lean else "fast")
    table.add_row("expected peak", f"{done.expected_bytes / 1e9:.2f} GB")
    table.add_row("measured peak", f"{done.peak_bytes / 1e9:.2f} GB")
    table.add_row("seconds", f"{done.seconds:.1f}")
    table.add_row("worst relative error", f"{done.worst_error:.4f}")
    _output.print(table)


def _print_info(folder: Path) -> None:
    from vqllm.checkpoint import Checkpoint

    facts = asdict(Checkpoint(folder).info())
    table = Table(title=str(facts.pop("name")), show_header=False)
    for name, value in facts.items():
        table.add_row(name, f"{value:.4f}" if isinstance(value, float) else str(value))
    _output.print(table)


class _Display:
    """Bars for measuring, linears and tuning steps, with the last one's error and the time left.

    Where the output is no terminal, as in a log file, a line now and then takes their place.
    """

    def __init__(self, num_linears: int, tune_steps: int = 0, num_blocks: int = 0) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            TextColumn("{task.fields[last]}"),
            console=_messages,
            disable=not _messages.is_terminal,
        )
        self._measuring = self._add("measuring sensitivities", 2 * num_blocks)
        self._linears = self._add("quantizing", num_linears)
        self._tuning = self._add("tuning", tune_steps)

    def _add(self, what: str, total: int) -> TaskID:
        """A bar that is seen from its first step on: not all of them are needed every time."""
        return self._progress.add_task(what, total=total, last="", start=False, visible=False)

    def __enter__(self) -> _Display:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def report_measuring(self) -> None:
        """Count a block whose linears' sensitivities are being measured, once in each direction."""
        self._advance(self._measuring, "")

    def report(self, part: QuantizedPart) -> None:
        """Count a finished linear."""
        name = part.name.removeprefix("model.layers.")
        self._advance(self._linears, f"{name} error {part.relative_error:.5f}")

    def report_tuning(self, step: TuningStep) -> None:
        """Count a step of tuning."""
        self._advance(self._tuning, f"KL {step.divergence:.4f}")

    def _advance(self, bar: TaskID, last: str) -> None:
        task = self._progress.tasks[bar]
        if not task.started:
            self._progress.start_task(bar)
        self._progress.update(bar, advance=1, last=last, visible=True)
        if self._progress.disable and _is_due(int(task.completed), int(task.total or 1)):
            count, seconds = f"{task.completed:.0f}/{task.total:.0f}", f"{task.elapsed or 0:.0f} s"
            line = ", ".join(
                word for word in (f"{task.description} {count}", last, seconds) if word
            )
            _messages.print(line, highlight=False, soft_wrap=True)


def _is_due(done: int, total: int) -> bool:
    """Whether a log gets a line now: about twenty lines in all, and the last one."""
    return done == total or done % max(total // LOG_LINES, 1) == 0


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(word) for word in text.split(","))
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not a list of numbers such as 0.01,0.05") from error
