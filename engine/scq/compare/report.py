"""A comparison as files: CSV, PNG, and a section of a Markdown page that names its command.

`replace_section` keeps a page current: each suite owns what lies between its two markers.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from PIL import features

from scq.bitstream.changes import MODE_NAMES
from scq.compare.measure import PointResult
from scq.compare.plots import plot_points
from scq.compare.results import (
    EqualAccuracy,
    by_codec,
    bytes_for_accuracy,
    nearest_at_or_above,
    write_csv,
)
from scq.compare.run import Comparison
from scq.compare.video import VideoComparison
from scq.flops import PHONE_GFLOPS, encoder_costs, estimated_ms, model_cost
from scq.metrics import wilson_interval

_Column = tuple[str, Callable[[PointResult], str]]


def write_comparison(comparison: Comparison, folder: Path, *, plot: bool = True) -> list[Path]:
    """`<suite>.csv` and, with `plot`, `<suite>.png` in the folder; their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    table = folder / f"{comparison.suite.name}.csv"
    write_csv(comparison.points, table)
    if not plot:
        return [table]
    title = f"{comparison.suite.title}, n = {comparison.n}, {comparison.sizes}"
    plot_points(comparison.points, title, table.with_suffix(".png"))
    return [table, table.with_suffix(".png")]


def suite_section(comparison: Comparison, command: str) -> str:
    """The suite's tables as Markdown, without the heading's markers."""
    suite = comparison.suite
    parts = [
        f"## {suite.title} (`{suite.name}`)",
        f"n = {comparison.n} pictures, {comparison.sizes}. {circumstances(command)}",
        f"![{suite.title}: quality and accuracy against bytes]({suite.name}.png)",
        "### Every point",
        _points_table(comparison),
        "### Nearest file at or above our bytes",
        _nearest_table(comparison.points),
        "### Lowest rate of each format",
        _lowest_table(comparison),
    ]
    if comparison.originals_accuracy is not None:
        parts += ["### Recognition", _recognition(comparison)]
    parts += ["### Models", _models_table(comparison)]
    parts += [f"- {note}" for note in comparison.notes]
    return "\n\n".join(parts)


def video_section(comparison: VideoComparison, command: str) -> str:
    """The video table as Markdown."""
    header = [
        "rate weight", "stream", "key frames", "bytes/frame", "PSNR dB", "encode ms",
        *(mode.upper() for mode in MODE_NAMES), "bytes at equal PSNR",
    ]  # fmt: skip
    rows = []
    for position, pair in enumerate(comparison.pairs):
        ratio = comparison.ratio_at_equal_quality(position)
        for stream in pair:
            delta = stream is pair[1]
            shares = [f"{stream.share(mode):.1%}" if delta else "" for mode in MODE_NAMES]
            share = "outside the measured range" if ratio is None else f"{ratio:.1%}"
            rows.append([
                f"{stream.rate_weight:g}", stream.kind, f"{stream.key_frames} of {stream.frames}",
                f"{stream.mean_bytes:.0f}", f"{stream.psnr_db:.2f}", f"{stream.encode_ms:.0f}",
                *shares, share if delta else "",
            ])  # fmt: skip
    clip = Path(comparison.clip).stem
    taken = (
        "every frame" if comparison.options.step == 1 else f"one frame in {comparison.options.step}"
    )
    return "\n\n".join((
        f"## Key and delta frames (`{comparison.clip}`)",
        f"{taken.capitalize()} of the clip at {comparison.size}, model {comparison.model}, a key "
        f"frame every {comparison.options.interval} frames. {circumstances(command)}",
        "The last column divides the key + delta stream's bytes by those of key frames alone at "
        "the same PSNR: as measured where the two agree within 0.05 dB, else interpolated between "
        "the key-frame streams (dB against log bytes). Modes are shares of the delta frames' "
        "latents.",
        f"![PSNR against bytes a frame](video-{clip}.png)",
        markdown_table(header, rows),
    ))  # fmt: skip


def replace_section(page: Path, name: str, section: str) -> None:
    """Put a section between its markers, adding it at the end of the page where it is new."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    text = page.read_text() if page.is_file() else ""
    block = f"{begin}\n\n{section.strip()}\n\n{end}"
    if begin in text and end in text:
        before, rest = text.split(begin, 1)
        text = before + block + rest.split(end, 1)[1]
    else:
        text = f"{text.rstrip()}\n\n{block}\n".lstrip()
    page.write_text(text)


def circumstances(command: str) -> str:
    """The command, date, processor and versions behind some numbers, as a sentence."""
    return (
        f"Command: `{command}`. {datetime.now(UTC):%Y-%m-%d}, {_processor()}, one thread; "
        f"{_versions()}."
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {len(names) or 1} logical cores"


def _versions() -> str:
    found = [f"Python {sys.version_info.major}.{sys.version_info.minor}"]
    for package in ("torch", "pillow", "pillow-jxl-plugin"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    coders = [f"{name} {features.version(name)}" for name in ("libjpeg_turbo", "webp", "avif")
              if features.version(name)]  # fmt: skip
    return f"{', '.join(found)}; Pillow has {', '.join(coders)}"


def _points_table(comparison: Comparison) -> str:
    columns: list[_Column] = [
        ("codec", lambda p: p.codec),
        ("setting", lambda p: p.setting),
        ("bytes", lambda p: f"{p.mean_bytes:.0f}"),
        ("bpp", lambda p: f"{p.bpp:.4f}"),
        *_quality_columns(comparison.points),
    ]
    if any(p.codes_right is not None for p in comparison.points):
        columns.append(("from codes", lambda p: _share(p.codes_right, p.n)))
    columns += [
        ("encode ms", lambda p: f"{p.encode_ms:.1f}"),
        ("decode ms", lambda p: f"{p.decode_ms:.1f}"),
    ]
    rows = [
        [cell(p) for _, cell in columns] for c in by_codec(comparison.points).values() for p in c
    ]
    return markdown_table([name for name, _ in columns], rows)


def _quality_columns(points: Sequence[PointResult]) -> list[_Column]:
    columns: list[_Column] = [
        ("PSNR dB", lambda p: f"{p.psnr_db:.2f}"),
        ("SSIM", lambda p: f"{p.ssim:.3f}"),
        ("MS-SSIM", lambda p: f"{p.ms_ssim:.3f}"),
    ]
    if any(p.feature_distance is not None for p in points):
        columns.append(("feature distance", lambda p: _number(p.feature_distance, ".3f")))
    if any(p.decoded_right is not None for p in points):
        columns.append(("accuracy, decoded", lambda p: _share(p.decoded_right, p.n)))
    return columns


def _nearest_table(points: Sequence[PointResult]) -> str:
    columns = _quality_columns(points)
    curves = by_codec(points)
    files = {name: curve for name, curve in curves.items() if not name.startswith("scq ")}
    rows = []
    for ours in _first_and_leanest(points):
        rows.append([f"**{ours.codec}, {ours.setting}**", f"{ours.mean_bytes:.0f}", "",
                     *(cell(ours) for _, cell in columns)])  # fmt: skip
        for name, curve in files.items():
            found = nearest_at_or_above(curve, ours.mean_bytes)
            if found is not None:
                rows.append([f"{name} {found.setting}", f"{found.mean_bytes:.0f}",
                             f"{found.mean_bytes / ours.mean_bytes:.1f}x",
                             *(cell(found) for _, cell in columns)])  # fmt: skip
    return markdown_table(["point", "bytes", "of ours", *(name for name, _ in columns)], rows)


def _first_and_leanest(points: Sequence[PointResult]) -> list[PointResult]:
    """Of each of our codecs the point measured first and the one of fewest bytes."""
    chosen: list[PointResult] = []
    for name, curve in by_codec(points).items():
        first = next(point for point in points if point.codec == name)
        if name.startswith("scq "):
            chosen += [first] if curve[0] is first else [first, curve[0]]
    return chosen


def _lowest_table(comparison: Comparison) -> str:
    rows = []
    for name, curve in by_codec(comparison.points).items():
        lowest = curve[0]
        flat = comparison.flat_bytes.get(name)
        rows.append([name, lowest.setting, f"{lowest.mean_bytes:.0f}", f"{lowest.bpp:.4f}",
                     "" if flat is None else str(flat)])  # fmt: skip
    return markdown_table(
        ["codec", "setting", "bytes", "bpp", "bytes for a flat grey picture"], rows
    )


def _recognition(comparison: Comparison) -> str:
    assert comparison.originals_accuracy is not None
    share, low, high = comparison.originals_accuracy
    lines = [
        f"Independent recognizer: {comparison.recognizer}. On the originals themselves: "
        f"{share:.1%} ({low:.1%} to {high:.1%}, n = {comparison.n}). Brackets everywhere are 95 % "
        "Wilson intervals. Bytes for the same accuracy are interpolated, linear in log "
        "bytes; never: the recognizer names fewer of the originals themselves.",
        _equal_accuracy_table(comparison),
    ]
    return "\n\n".join(lines)


def _equal_accuracy_table(comparison: Comparison) -> str:
    curves = by_codec(comparison.points)
    files = [curve for name, curve in curves.items() if not name.startswith("scq ")]
    rows = []
    for ours in (p for p in comparison.points if p.codec.startswith("scq ")):
        for label, right in (("decoded", ours.decoded_right), ("from codes", ours.codes_right)):
            if right is None:
                continue
            needed = [bytes_for_accuracy(curve, right / ours.n) for curve in files]
            beyond = right >= (comparison.originals_right or 0)
            of_originals = right / max(1, comparison.originals_right or 0)
            rows.append([f"{ours.codec}, {ours.setting}, {label}", f"{ours.mean_bytes:.0f}",
                         _share(right, ours.n), f"{of_originals:.1%}",
                         *("never" if beyond else _needed(found) for found in needed)])  # fmt: skip
    header = ["ours", "bytes", "accuracy", "of the originals'"]
    return markdown_table([*header, *(f"{curve[0].codec} bytes" for curve in files)], rows)


def _needed(found: EqualAccuracy | None) -> str:
    if found is None:
        return ""
    relation = {"=": "", "<=": "at most ", ">": "more than "}[found.relation]
    return f"{relation}{found.mean_bytes:.0f}"


def _models_table(comparison: Comparison) -> str:
    header = ["model", "top-1 use", "perplexity", "mass perplexity", "parameters",
              "encoder MMAC", "search MMAC", "decoder MMAC", "phone estimate, ms"]  # fmt: skip
    rows, backbones = [], []
    for facts in comparison.models:
        config = facts.codec.config
        side = 256 if config.kind == "frame" else config.max_width
        cost = model_cost(facts.codec.model, side, side)
        rows.append([
            f"{facts.codec.name} ({facts.codec.model_hash[:8]}), {config.encoder_backbone}",
            f"{facts.top1_usage:.1%}", f"{facts.perplexity:.0f}", f"{facts.mass_perplexity:.0f}",
            f"{sum(cost.parameters.values()):,}",
            *(f"{cost.macs[part] / 1e6:.1f}" for part in ("encoder", "search", "decoder")),
            f"{estimated_ms(cost.sender_macs):.1f}",
        ])  # fmt: skip
        for backbone, (macs, parameters) in encoder_costs(config, side, side).items():
            backbones.append([f"{facts.codec.name} layout, {backbone}", f"{parameters:,}",
                              f"{macs / 1e6:.1f}", f"{estimated_ms(macs):.1f}"])  # fmt: skip
    note = (
        "Multiply-adds are for 256x256 pixels (32x32 for crop models); the search is n scans of "
        "the codebook, as the on-device pursuit does. The phone estimate is encoder and search at "
        f"{PHONE_GFLOPS:g} GFLOPS, an assumption about one big core, not a measurement. Encoders "
        "of the same widths on each backbone:"
    )
    encoders = ["encoder", "parameters", "MMAC", "phone estimate, ms"]
    return "\n\n".join((markdown_table(header, rows), note, markdown_table(encoders, backbones)))


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table of text cells."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _share(right: int | None, n: int) -> str:
    if right is None:
        return ""
    low, high = wilson_interval(right, n)
    return f"{right / n:.1%} ({low:.1%} to {high:.1%})"


def _number(value: float | None, style: str) -> str:
    return "" if value is None else format(value, style)
