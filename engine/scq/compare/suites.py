"""The suites: which models, qualities and recognizer belong to which kind of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from scq.codec import FrameCodec
from scq.compare.points import FilePoint, OperatingPoint, ScqPoint
from scq.compare.recognizers import RecognizerKind
from scq.errors import ScqError

# From each format's lowest quality up to a few times our rate.
_QUALITIES = {
    "jpeg": (1, 4, 8, 15, 30),
    "webp": (0, 5, 15, 35),
    "avif": (0, 10, 20, 35),
    "jxl": (0, 10, 25),
}
_CROP_QUALITIES = {
    "jpeg": (1, 10, 25, 50, 75, 92),
    "webp": (0, 10, 30, 60, 90),
    "avif": (0, 15, 30, 50, 75),
    "jxl": (0, 15, 40, 65, 88),
}
# (1 / scale, quality)
_Scaled = dict[str, tuple[tuple[int, int], ...]]
_SCALED: _Scaled = {
    "jpeg": ((4, 10), (4, 30), (2, 8), (2, 20)),
    "webp": ((4, 10), (4, 50), (2, 0), (2, 10)),
}
_CROP_SCALED: _Scaled = {"jpeg": ((2, 20), (2, 60)), "webp": ((2, 0), (2, 30))}
# In squared latent units per bit.
DEFAULT_RATE_WEIGHTS = (0.01, 0.05, 0.2, 0.5)


@dataclass(frozen=True)
class Suite:
    """What `scq compare` does by default for one kind of pictures.

    models: shipped models, each against all formats. limit: pictures measured, evenly spaced in
    sorted order; None is all of them. recognizer: kind of the independent classifier.
    """

    name: str
    title: str
    models: tuple[str, ...]
    limit: int | None
    data: str
    recognizer: RecognizerKind | None = None
    qualities: dict[str, tuple[int, ...]] = field(default_factory=lambda: _QUALITIES)
    scaled: _Scaled = field(default_factory=lambda: _SCALED)


SUITES = {
    suite.name: suite
    for suite in (
        Suite("nav", "Road scenes", ("nav",), 24, "camvid/test.zip"),
        Suite("food", "Dishes", ("food",), 125, "food101/test.zip", "features"),
        Suite(
            "sign",
            "Traffic-sign crops",
            ("sign32",),
            1000,
            "gtsrb/test.zip",
            "convolutions",
            _CROP_QUALITIES,
            _CROP_SCALED,
        ),
        Suite("kodak", "Kodak photographs", ("nav", "food"), None, "the folder of kodim*.png"),
    )
}


def suite_named(name: str) -> Suite:
    """The suite called `name`. Raises ScqError naming those there are."""
    if name not in SUITES:
        raise ScqError(f"unknown suite {name!r}; available: {', '.join((*SUITES, 'video'))}")
    return SUITES[name]


def file_points(suite: Suite, formats: Sequence[str]) -> list[OperatingPoint]:
    """The other codecs' points of a suite, as far as `formats` can be had."""
    points: list[OperatingPoint] = []
    for name in formats:
        points += [FilePoint(name, quality) for quality in suite.qualities[name]]
        points += [FilePoint(name, q, 1 / scale) for scale, q in suite.scaled.get(name, ())]
    return points


def scq_points(
    codec: FrameCodec, rate_weights: Sequence[float]
) -> tuple[list[OperatingPoint], list[str]]:
    """Our points of one model, and a note for what it cannot do."""
    points: list[OperatingPoint] = [ScqPoint(codec, "raw"), ScqPoint(codec, base=True)]
    if codec.tables is None:
        return points, [f"model {codec.name} ships no entropy tables: RAW only, no rate weights"]
    points.insert(0, ScqPoint(codec, "rans"))
    points += [ScqPoint(codec, "rans", weight) for weight in rate_weights]
    return points, []
