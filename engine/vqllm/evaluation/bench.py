"""The published comparison: `python -m vqllm.evaluation.bench [REFERENCE ...]`.

Runs a fixed grid on one or more references and writes quantization.md, .csv and .json with the
machine, the date, versions and token counts. Rows are kept in the work folder, so a stopped run
goes on and a new method adds its rows alone. Texts are those of the evaluation data beside the
checkout unless others are named; peers are run where their programs are named.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

from vqllm.api import resolve_model
from vqllm.checkpoint import write_json
from vqllm.errors import InvalidConfig
from vqllm.evaluation.compare import Comparison, ComparisonConfig, Row
from vqllm.evaluation.compare_arms import Arm, PeerArm
from vqllm.evaluation.compare_grid import PeerPaths, baselines, our_arm, peers
from vqllm.evaluation.compare_table import collect, duels, to_csv, to_json, to_markdown
from vqllm.evaluation.windows import WindowConfig
from vqllm.plan.criteria import verdicts
from vqllm.plan.hardware import find_hardware

SEEDS = (0, 1, 2)
COMMAND = "make bench-quant"
READING = (
    "The weights of `vqllm fetch smollm2` were dequantized from a 4-bit file with blocks of 32. "
    "They lie on that grid, which flatters scalar types of 4 bits and small blocks, llama.cpp's "
    "among them: its 2- and 3-bit types fall back to such ones where columns are no multiple of "
    "256. A reference called `rotated` (`python -m vqllm.offgrid.rotated MODEL OUT`) computes the "
    "same function with weights on no grid; compare at 4 bits there. Ours up to about 4 bits are "
    "tuned, on that calibration text and, where it is short, on the package's as well."
)
TEXTS = {"wikitext2-valid": "wikitext2_tok_valid.txt", "brown-heldout": "brown_heldout.txt"}
CALIBRATION = "brown_train.txt"
TCQ_BITS = (2.0, 2.25, 2.3, 3.0, 3.25, 4.0, 4.25, 4.3, 4.6)


def bench_arms(paths: PeerPaths, only: str = "") -> list[Arm]:
    """Ours at every width with the command's own defaults, then baselines and peers.

    Low widths are tuned by default, which no peer does, so the trellis stands there untuned too.
    `only` keeps arms whose name or family holds one of its comma-separated words. Peers run once:
    they draw nothing at random.
    """
    ours: list[Arm] = [our_arm("tcq", bits, "") for bits in TCQ_BITS]
    ours += [our_arm("tcq", bits, "", "--tune-steps", "0") for bits in (2.0, 3.0, 4.0)]
    ours += [our_arm("vptq", bits, "quarot") for bits in (2.0, 2.25, 3.0, 4.0)]
    ours += [our_arm("vptq", 2.25, "")]
    ours += [our_arm("vptq", bits, "quarot", "--tune-steps", "0") for bits in (2.0, 3.0, 4.0)]
    ours += [our_arm("gptq", bits, how) for bits in (2.0, 3.0, 4.0) for how in ("", "quarot")]
    others = [
        replace(arm, seeded=False) if isinstance(arm, PeerArm) else arm for arm in peers(paths)
    ]
    arms = [*ours, *baselines(), *others]
    words = [word.strip().lower() for word in only.split(",") if word.strip()]
    if not words:
        return arms
    return [arm for arm in arms if any(w in f"{arm.name} {arm.family}".lower() for w in words)]


def document(
    sections: Sequence[tuple[Comparison, Sequence[Row]]],
    texts: Sequence[str],
    facts: str,
    command: str = COMMAND,
) -> str:
    """The Markdown page of all references."""
    parts = ["# Quantization compared", "", f"    {command}", "", facts, "", READING, ""]
    for comparison, rows in sections:
        parts += [f"## Reference {comparison.title}", "", comparison.facts, ""]
        parts += [_verdict_line(rows, texts), "", to_markdown(rows, texts)]
    return "\n".join([*parts, *_cost_section()])


def _verdict_line(rows: Sequence[Row], texts: Sequence[str]) -> str:
    fought = [one for text in texts for one in duels(collect(rows, text))]
    won = sum(one.is_won for one in fought)
    if not fought:
        return "No peer at equal or more bits was run on this reference."
    return (
        f"Ours is lower in perplexity and in KL, both outside the paired interval, in {won} of "
        f"{len(fought)} comparisons with a peer at equal or more bits."
    )


def _cost_section() -> list[str]:
    machine = find_hardware("reference")
    errors = ", ".join(f"{name} {error:+.0%}" for name, error in machine.validation.items())
    lines = ["## Cost model", "", f"`vqllm plan`, prices measured on: {machine.note}.", ""]
    lines += [f"Predicted against measured time of a size that was not fitted: {errors}.", ""]
    lines += [f"- {v.criterion}: **{v.verdict}**. {v.reason}." for v in verdicts()]
    return [*lines, ""]


def machine_facts() -> str:
    """Date, processor and versions, one line."""
    processor = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("model name"):
            processor = line.partition(":")[2].strip()
            break
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "vqstack"))
    date = time.strftime("%Y-%m-%d", time.gmtime())
    return (
        f"{date}, {os.cpu_count()} cores of {processor}, Python {platform.python_version()}, "
        f"{versions}. Non-overlapping windows, no token in front; every arm is scored from its "
        "file by the float32 executor; embedding and head stay as they are in the reference. "
        "`bpw` counts every byte of the linears. `ratio` is perplexity over the reference's with "
        "its 95 % paired bootstrap interval over windows, `sd` its spread over seeds, each of "
        "which calibrates on other windows. Times are of this machine and shared with other work."
    )


def _named(entries: Iterable[str]) -> dict[str, Path]:
    pairs = dict(entry.split("=", 1) for entry in entries)
    return {name: Path(path) for name, path in pairs.items()}


def main(words: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("references", nargs="*", default=["smollm2"])
    parser.add_argument("--data", type=Path, default=Path("../shared/data/text"))
    parser.add_argument("--text", action="append", metavar="NAME=FILE")
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"))
    parser.add_argument("--json", type=Path, help="another copy of quantization.json")
    parser.add_argument("--work", type=Path, default=Path("runs/bench-quant"))
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--llama-cpp", type=Path)
    parser.add_argument("--gptqmodel-python", type=Path)
    parser.add_argument("--only", default="", help="arms whose name or family holds a word")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--window-length", type=int, default=512)
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args(words)
    given.text = given.text or [f"{name}={given.data / file}" for name, file in TEXTS.items()]
    given.calibration = given.calibration or given.data / CALIBRATION
    if not all("=" in entry for entry in given.text):
        raise InvalidConfig("text", given.text, "NAME=FILE")
    for folder in (given.output, given.json.parent if given.json else given.output):
        folder.mkdir(parents=True, exist_ok=True)  # hours before it is needed
    sections = [_run(reference, given) for reference in given.references]
    command = f"{COMMAND} SEEDS={given.seeds} WINDOWS={given.windows}"
    _write(sections, list(_named(given.text)), given.output, command)
    if given.json is not None:
        shutil.copyfile(given.output / "quantization.json", given.json)


def _run(reference: str, given: argparse.Namespace) -> tuple[Comparison, list[Row]]:
    folder = resolve_model(reference)
    work = given.work / folder.resolve().name
    config = ComparisonConfig(
        reference=folder,
        texts=_named(given.text),
        output=work,
        calibration=given.calibration,
        calibration_length=given.window_length,
        windows=WindowConfig(given.window_length, given.windows, spread=True),
        seeds=tuple(range(given.seeds)),
        num_threads=given.threads,
    )
    comparison = Comparison(config, lambda line: print(line, file=sys.stderr, flush=True))
    paths = PeerPaths(given.llama_cpp, given.gptqmodel_python, work / "cache")
    fresh = comparison.run(bench_arms(paths, given.only))
    kept = comparison.kept(bench_arms(paths))
    names = {(row.arm, row.seed) for row in kept}
    return comparison, [*kept, *(row for row in fresh if (row.arm, row.seed) not in names)]


def _write(
    sections: Sequence[tuple[Comparison, list[Row]]],
    texts: Sequence[str],
    output: Path,
    command: str,
) -> None:
    facts = machine_facts()
    (output / "quantization.md").write_text(
        document(sections, texts, facts, command), encoding="utf-8"
    )
    tables = {comparison.title: rows for comparison, rows in sections}
    (output / "quantization.csv").write_text(to_csv(tables, texts), encoding="utf-8")
    content: dict[str, Any] = {"facts": facts, "references": {}}
    for comparison, rows in sections:
        content["references"][comparison.title] = to_json(rows, texts)
    write_json(output / "quantization.json", json.loads(json.dumps(content)))


if __name__ == "__main__":
    main()
