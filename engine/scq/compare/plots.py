"""Curves as PNG. Draws with matplotlib, part of the compare extra; shows no pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from scq.compare.measure import PointResult
from scq.compare.results import by_codec
from scq.errors import ScqError

_Measure = Callable[[PointResult], float | None]
_PANELS: tuple[tuple[str, _Measure], ...] = (
    ("PSNR, dB", lambda point: point.psnr_db),
    ("SSIM", lambda point: point.ssim),
    ("MS-SSIM", lambda point: point.ms_ssim),
    ("feature distance (lower is better)", lambda point: point.feature_distance),
    ("accuracy on decoded pictures", lambda point: point.decoded_accuracy),
)
_COLOURS = {"jpeg": "#c44e52", "webp": "#dd8452", "avif": "#55a868", "jxl": "#8172b3"}
_OURS = ("#1f4e9c", "#17a2b8", "#5b2a86")
Curve = tuple[Sequence[float], Sequence[float]]


def plot_points(points: Sequence[PointResult], title: str, path: Path) -> None:
    """A panel a measure, mean bytes on a logarithmic axis. Raises ScqError without matplotlib."""
    panels = [panel for panel in _PANELS if any(panel[1](point) is not None for point in points)]
    figure = new_figure(4.4 * len(panels), 4.0)
    for axes, (label, measure) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels,
                                      strict=True):  # fmt: skip
        for codec, curve in by_codec(points).items():
            _plot_codec(axes, codec, [(p.mean_bytes, measure(p)) for p in curve])
        if measure is _PANELS[-1][1]:
            _plot_heads(axes, points)
        finish_axes(axes, "mean bytes a picture", label)
        _logarithmic(axes)
    lines = {line.get_label(): line for axes in figure.axes for line in axes.lines}
    figure.legend(lines.values(), lines.keys(), fontsize=8, ncols=6, loc="outside lower center")
    figure.suptitle(title, fontsize=11)
    save_figure(figure, path)


def _plot_codec(axes: Any, codec: str, points: Sequence[tuple[float, float | None]]) -> None:
    known = [(size, value) for size, value in points if value is not None]
    if not known:
        return
    style = {"marker": "o", "markersize": 3, "linewidth": 1.2, "label": codec}
    base = codec.removesuffix(", scaled")
    style["color"] = _COLOURS.get(base, _OURS[len(axes.lines) % len(_OURS)])
    style["linestyle"] = ":" if base != codec else "-"
    axes.plot(*zip(*known, strict=True), **style)


def _plot_heads(axes: Any, points: Sequence[PointResult]) -> None:
    for codec, curve in by_codec(points).items():
        known = [(p.mean_bytes, p.codes_accuracy) for p in curve if p.codes_accuracy is not None]
        if known:
            axes.plot(*zip(*known, strict=True), "k*--", markersize=6, linewidth=0.8,
                      label=f"{codec}, from codes")  # fmt: skip


def _logarithmic(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def new_figure(width: float, height: float) -> Any:
    """An empty figure of so many inches. Raises ScqError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ScqError(
            "drawing curves needs matplotlib: pip install 'vqstack[compare]', or give --no-plot"
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def finish_axes(axes: Any, x_label: str, y_label: str) -> None:
    """Labels and a light grid."""
    axes.set_xlabel(x_label, fontsize=9)
    axes.set_ylabel(y_label, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)


def save_figure(figure: Any, path: Path) -> None:
    """Write the PNG, without the writing library's version in it."""
    figure.savefig(path, dpi=110, metadata={"Software": None})
