"""`scq train`: run or resume a training. Talks to people only; the work is `scq.training`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import TextColumn, TimeRemainingColumn

from scq.cli_shared import progress_bar
from scq.data import ImageSet, load_images
from scq.errors import ScqError
from scq.experiments import experiment_names, load_experiment
from scq.features import load_extractor
from scq.training import TrainOptions, TrainProgress, TrainResult, train
from scq.training_config import PRESETS, TrainConfig, reference_of
from scq.training_losses import Features
from scq.training_parallel import choose_device, current_team, process_group
from scq.training_tables import TableData, add_tables, take_tables


def train_command(
    config: Annotated[
        Path | None, typer.Argument(help="Training config, JSON; see config.json of any run.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", help=f"Preset: {', '.join((*PRESETS, *experiment_names()))}."
        ),
    ] = None,
    data: Annotated[
        list[Path] | None, typer.Option(help="Training pictures: folders, zips or clips.")
    ] = None,
    validation: Annotated[
        list[Path] | None, typer.Option(help="Validation pictures; else some are held out.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Run folder, default runs/<name>.")
    ] = None,
    start: Annotated[
        Path | None, typer.Option(help="Model to start from; the config says what goes on.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Continue the run in the output folder.")] = False,
    reference: Annotated[
        bool,
        typer.Option("--reference", help="Train the classifier alone, on unquantized latents."),
    ] = False,
    video: Annotated[
        list[Path] | None, typer.Option(help="Clips that the delta frames' tables are fitted to.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Train a model, then fit its entropy tables; the run folder always holds a usable model.

    Start it with torchrun to use several GPUs.
    """
    settings = _settings(config, model, reference)
    if not data:
        raise ScqError("nothing to train on; give --data PATH, more than once if need be")
    folder = output or Path("runs") / settings.model.name
    typer.echo(f"reading pictures for {settings.model.name}", err=True)
    pictures = load_images(data)
    held_out = load_images(validation) if validation else None
    with process_group(device) as own_device:
        options = TrainOptions(own_device, _features(settings, own_device), start, resume)
        result = _train(settings, pictures, held_out, folder, options)
        if not current_team().leads:
            return
    name = f"{result.model_path}: model {settings.model.name}"
    if not settings.coded:
        typer.echo(f"{name}, validation accuracy {result.validation_accuracy:.2%}")
        return
    model_hash = None
    if settings.keeps_codes and start is not None:
        model_hash = take_tables(result.model_path, start)
    if model_hash is None:
        typer.echo("fitting entropy tables", err=True)
        clips = tuple(load_images([clip]) for clip in video or ())
        model_hash = add_tables(result.model_path, TableData(pictures, clips))
    typer.echo(f"{name} ({model_hash[:8]})")


def _features(settings: TrainConfig, device: str) -> Features | None:
    """What a feature loss looks through; None where the config has none."""
    if not settings.feature_weight:
        return None
    return load_extractor(device=choose_device(device)).stages


def _train(
    settings: TrainConfig,
    pictures: ImageSet,
    held_out: ImageSet | None,
    folder: Path,
    options: TrainOptions,
) -> TrainResult:
    with progress_bar(TextColumn("{task.fields[note]}"), TimeRemainingColumn()) as progress:
        task = progress.add_task("training", total=settings.total_steps, note="")

        def show(state: TrainProgress) -> None:
            progress.update(
                task, completed=state.step, description=state.phase, note=train_note(state)
            )

        return train(
            settings, pictures, folder, validation=held_out, progress=show, options=options
        )


def _settings(config: Path | None, preset: str | None, reference: bool) -> TrainConfig:
    if (config is None) == (preset is None):
        raise ScqError("give either a training config file or --model with a preset")
    if config is not None:
        settings = TrainConfig.from_json(config.read_text())
    elif preset in PRESETS:
        settings = PRESETS[preset]
    elif preset in experiment_names():
        settings = load_experiment(str(preset))
    else:
        available = ", ".join((*PRESETS, *experiment_names()))
        raise ScqError(f"unknown preset {preset!r}; available: {available}")
    return reference_of(settings) if reference else settings


def train_note(state: TrainProgress) -> str:
    """One line on a step: what was measured in it, nothing for what was not."""
    note = f"loss {state.loss:.4f}"
    for value, text in (
        (state.psnr_db, f", {state.psnr_db:.2f} dB"),
        (state.class_accuracy, f", {state.class_accuracy:.1%}"),
        (state.validation_psnr_db, f", validation {state.validation_psnr_db:.2f} dB"),
        (state.validation_accuracy, f", {state.validation_accuracy:.1%}"),
    ):
        if not math.isnan(value):
            note += text
    return note
