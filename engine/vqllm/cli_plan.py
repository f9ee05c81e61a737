"""`vqllm plan`: what a model will cost to quantize and to run, and how that is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from vqllm.cli_output import STANDARD_OUTPUT, check_target
from vqllm.errors import InvalidConfig

if TYPE_CHECKING:
    from vqllm.plan.measure import MeasureConfig


def plan(
    models: Annotated[
        list[str] | None,
        typer.Argument(help="Names, folders or config.json files; default is every known shape."),
    ] = None,
    bits: Annotated[str, typer.Option(help="Widths, by commas.")] = "2,3,4",
    method: Annotated[str, typer.Option(help="gptq, vptq or tcq.")] = "tcq",
    hardware: Annotated[
        str, typer.Option(help="By commas: reference, a100-80gb, h100-80gb, h200-141gb, a file.")
    ] = "reference,h100-80gb",
    tokens: Annotated[int, typer.Option(help="Calibration tokens.", min=1)] = 32_768,
    json_file: Annotated[
        str | None, typer.Option("--json", help="Write every number to this file; - prints it.")
    ] = None,
    criteria: Annotated[
        bool, typer.Option("--criteria", help="Say which of the first criteria physics allows.")
    ] = False,
    measure: Annotated[
        Path | None, typer.Option(help="Measure this machine into a profile file instead.")
    ] = None,
    name: Annotated[str, typer.Option(help="Name of the measured machine.")] = "this machine",
    operations: Annotated[
        str, typer.Option(help="Operations to measure, by commas; default all.")
    ] = "",
    repeats: Annotated[int, typer.Option(help="Rounds of measuring.", min=1)] = 3,
    threads: Annotated[int, typer.Option(help="Threads while measuring.", min=1)] = 2,
) -> None:
    """Bytes, memory, hours and tokens per second, each labelled measured or projected."""
    check_target("json", json_file)
    check_target("measure", measure)
    if measure is not None:
        from vqllm.plan.measure import MeasureConfig

        config = MeasureConfig(name, repeats=repeats, num_threads=threads)
        _measure(config, [word for word in operations.split(",") if word], measure)
        return
    facts = _facts(models or [], _widths(bits), method, _machines(hardware), tokens)
    if criteria:
        from vqllm.plan.criteria import verdicts

        facts["criteria"] = [vars(verdict) for verdict in verdicts()]
    _show(facts, json_file)


def _facts(
    models: list[str], bits: list[int], method: str, machines: list[str], tokens: int
) -> dict[str, Any]:
    from vqllm.plan.cost import QuantizationPlan, make_plan
    from vqllm.plan.hardware import find_hardware
    from vqllm.plan.shapes import NAMES, find_shape
    from vqllm.quantization.presets import QuantizeConfig

    profiles = [find_hardware(machine) for machine in machines]
    rows = []
    for model in models or NAMES:
        shape = find_shape(model)
        for width in bits:
            options = QuantizeConfig(method=method, bits=width).options()
            for profile in profiles:
                lines = make_plan(shape, QuantizationPlan(options, tokens), profile)
                head = {"model": model, "bits": width, "hardware": profile.name}
                rows += [{**head, **line.to_dict()} for line in lines]
    notes = {profile.name: f"{profile.basis}: {profile.note}" for profile in profiles}
    return {"method": method, "tokens": tokens, "hardware": notes, "lines": rows}


def _show(facts: dict[str, Any], json_file: str | None) -> None:
    content = json.dumps(facts, indent=2)
    if json_file == STANDARD_OUTPUT:
        typer.echo(content)
        return
    if json_file is not None:
        Path(json_file).write_text(content + "\n", encoding="utf-8")
    console = Console()
    console.print(_table(facts["lines"]))
    for machine, note in facts["hardware"].items():
        console.print(f"{machine}: {note}", highlight=False)
    for verdict in facts.get("criteria", ()):
        text = f"{verdict['criterion']}: {verdict['verdict']}. {verdict['reason']}"
        console.print(text, highlight=False)


def _table(lines: list[dict[str, Any]]) -> Table:
    """A row per model, width and machine; every number with its basis and how it is known."""
    rows: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for line in lines:
        rows.setdefault((line["model"], line["bits"], line["hardware"]), []).append(line)
    quantities = [line["quantity"] for line in next(iter(rows.values()))]
    table = Table("model", "bits", "hardware", *quantities, "basis", title="vqllm plan")
    for (model, bits, machine), group in rows.items():
        values = [_value(line) for line in group]
        basis = ", ".join(dict.fromkeys(line["basis"] for line in group))
        table.add_row(model, str(bits), machine, *values, basis)
    return table


def _value(line: dict[str, Any]) -> str:
    return f"{line['value']:.4g} {line['unit']}" if line["value"] else str(line["how"])


def _measure(config: MeasureConfig, chosen: list[str], target: Path) -> None:
    """Measure the chosen operations into a profile, one after the other; others are kept."""
    from vqllm.plan.measure import (
        measurable,
        measure_operation,
        measure_stream,
        profile_note,
        profile_of,
    )

    messages = Console(stderr=True)
    stream = measure_stream(config.num_threads)
    for name in chosen or measurable():
        result = measure_operation(name, config, lambda line: messages.print(line, highlight=False))
        profile = profile_of(config, [result], stream, profile_note(config))
        _merge(profile.to_dict(), target)
    typer.echo(target)


def _merge(profile: dict[str, Any], target: Path) -> None:
    """Put a profile into a file, over what the file has of the same operations."""
    if target.is_file():
        kept = json.loads(target.read_text(encoding="utf-8"))
        for key in ("fits", "validation", "timings"):
            profile[key] = {**kept.get(key, {}), **profile[key]}
    target.write_text(json.dumps(profile, indent=2) + "\n", encoding="utf-8")


def _widths(text: str) -> list[int]:
    words = _words(text)
    if not words or not all(word.isascii() and word.isdigit() for word in words):
        raise InvalidConfig("bits", text, "whole numbers by commas, such as 2,3,4")
    return [int(word) for word in words]


def _machines(text: str) -> list[str]:
    machines = _words(text)
    if not machines:
        raise InvalidConfig("hardware", text, "one or more machines by commas")
    return machines


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]
