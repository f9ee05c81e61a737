"""`vqllm quantize`: a model folder to a quantized one, with progress and resume."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from vqllm.fetch import SOURCES

if TYPE_CHECKING:
    from vqllm.quantization.parts import QuantizedPart

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
        typer.Option(help="True bits per weight of the linears, overhead counted.", min=0.1),
    ] = None,
    group_size: Annotated[int, typer.Option(help="Weights per scale, a power of two.")] = 128,
    preprocess: Annotated[str, typer.Option(help="none, quarot or smoothquant.")] = "none",
    alpha: Annotated[
        float, typer.Option(help="Correction towards full-precision activations, 0 to 1.")
    ] = 0.5,
    damping: Annotated[
        str, typer.Option(help="Parts of the mean hessian diagonal to choose from.")
    ] = "0.005,0.01,0.02,0.05",
    calibration: Annotated[
        Path | None,
        typer.Option(help="UTF-8 text to calibrate on; default is a text in the package."),
    ] = None,
    windows: Annotated[int, typer.Option(help="Calibration windows.", min=1)] = 48,
    window_length: Annotated[int, typer.Option(help="Tokens per window.", min=1)] = 512,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    tune_steps: Annotated[int, typer.Option(help="Steps of tuning afterwards.", min=0)] = 0,
    resume: Annotated[bool, typer.Option(help="Go on with an unfinished run.")] = True,
    threads: Annotated[int, typer.Option(help="Threads; 0 leaves it to the library.", min=0)] = 0,
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
    from vqllm.quantization.presets import QuantizeConfig

    if threads:
        torch.set_num_threads(threads)
    config = QuantizeConfig(
        method=method,
        bits=4 if bits is None and bpw is None else bits,
        bpw=bpw,
        group_size=group_size,
        preprocess=preprocess,
        alpha=alpha,
        dampings=_numbers(damping),
        seed=seed,
        tune_steps=tune_steps,
    )
    text = CalibrationConfig(calibration, windows, window_length)
    quantizer = AutoQuantizer.from_pretrained(model, cache)
    with _progress() as progress:
        task = progress.add_task("quantizing", total=quantizer.num_linears, last="")

        def report(part: QuantizedPart) -> None:
            name = part.name.removeprefix("model.layers.")
            progress.update(task, advance=1, last=f"{name} error {part.relative_error:.5f}")

        quantizer.quantize_to(output, config, text, RunOptions(resume=resume, report=report))
    typer.echo(output)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[last]}"),
        console=_messages,
    )


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(word) for word in text.split(","))
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not a list of numbers such as 0.01,0.05") from error
