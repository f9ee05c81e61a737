"""`scq study`: run a study, or turn its results into tables."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from scq.errors import ScqError

_REPORT = "report"


def study_command(
    name: Annotated[
        str, typer.Argument(help="rate, curve, solver, lambda, codes; all; or report.")
    ],
    folder: Annotated[Path | None, typer.Argument(help="Results folder of report.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Results folder.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Folder that holds cifar10, gtsrb, camvid and food101."),
    ] = None,
    seeds: Annotated[str, typer.Option(help="Seeds, separated by commas.")] = "0,1,2",
    sets: Annotated[
        str, typer.Option(help="Only these picture sets: cifar10, gtsrb, nav, food.")
    ] = "",
) -> None:
    """Run a study: every finished run is a row of results.csv, and is not run again.

    "scq study report DIR" prints the tables of the results in DIR.
    """
    # Torch is loaded only when a study is asked for.
    from scq.study.report import report
    from scq.study.runner import Workplace, run_study
    from scq.study.spec import STUDIES, Settings, find_study

    if name == _REPORT:
        typer.echo(report(_required(folder or out, "report needs the results folder")))
        return
    place = Workplace(
        _required(out or folder, "give --out DIR for the results"),
        _required(data, "give --data DIR with the picture sets"),
        Settings(),
    )
    names = tuple(part for part in sets.split(",") if part)
    studies = tuple(STUDIES.values()) if name == "all" else (find_study(name),)
    done = sum(
        run_study(study, place, (seed,), names, lambda line: typer.echo(line, err=True))
        for seed in _seeds(seeds)
        for study in studies
    )
    typer.echo(f"{place.out}: {done} runs done; scq study report {place.out}")


def _required(path: Path | None, remedy: str) -> Path:
    if path is None:
        raise ScqError(remedy)
    return path


def _seeds(text: str) -> tuple[int, ...]:
    try:
        seeds = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ScqError(f"--seeds must be integers separated by commas, got {text!r}") from error
    if min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise ScqError(f"--seeds must be different and >= 0, got {text!r}")
    return seeds
