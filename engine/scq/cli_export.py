"""`scq export`: a model as files for a phone. Talks to people only; the work is `scq.export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from scq.cli_shared import ModelOption, named_model, stages
from scq.data import load_images
from scq.errors import ScqError
from scq.export import ExportConfig, ImagesForCalibration, export_model
from scq.export.coder import DEFAULT_CANDIDATES

# More pictures than this change int8 ranges little and cost memory.
_MAX_CALIBRATION_IMAGES = 64


def export_command(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the bundle.")],
    model: ModelOption = "nav",
    int8: Annotated[bool, typer.Option("--int8", help="Also write an int8 encoder.")] = False,
    calibration: Annotated[
        list[Path] | None,
        typer.Option(help="Pictures like the phone's, for int8 ranges: folders, zips or clips."),
    ] = None,
    candidates: Annotated[
        int, typer.Option(min=1, help="Nearest codes that the on-device coder tries.")
    ] = DEFAULT_CANDIDATES,
    ort: Annotated[bool, typer.Option(help="Also write ORT-format files.")] = True,
) -> None:
    """Write encoder, coder and decoder as ONNX, with codebook, tables and a hashed manifest."""
    if int8 != bool(calibration):
        raise ScqError("--int8 and --calibration PATH go together; give both or neither")
    with stages("loading model", "exporting") as stage:
        chosen = named_model(model)
        stage()
        images = _calibration(calibration) if calibration else None
        bundle = export_model(chosen, output, ExportConfig(candidates, ort, images))
        stage()
    table = Table("file", "bytes", "sha256", title=f"{output} ({bundle.model['model_id'][:8]})")
    for artifact in bundle.artifacts:
        table.add_row(artifact.name, f"{artifact.size_bytes:,}", artifact.sha256[:16])
    Console().print(table)


def _calibration(paths: list[Path]) -> ImagesForCalibration:
    images = load_images(paths)
    step = max(1, len(images) // _MAX_CALIBRATION_IMAGES)
    chosen = range(0, len(images), step)[:_MAX_CALIBRATION_IMAGES]
    return ImagesForCalibration(images.subset(chosen).images)
