"""A whole suite: every point of every codec on the same pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from scq.codec import FrameCodec
from scq.compare.measure import Judge, PointResult, measure
from scq.compare.points import FilePoint, OperatingPoint, available_formats
from scq.compare.recognizers import ModelRecognizer, Recognizer, trained_recognizer
from scq.compare.suites import DEFAULT_RATE_WEIGHTS, Suite, file_points, scq_points
from scq.data import ImageSet
from scq.errors import ScqError
from scq.features import FeatureExtractor, default_weights_path, load_extractor
from scq.metrics import CodebookUsage, wilson_interval
from scq.model import load_model

Report = Callable[[str], None]
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Options:
    """How a suite is run.

    limit: pictures, None for the suite's own; 0 for all. train: originals to train the
    recognizer on, empty to do without. recognizer: a reference classifier instead, a model file
    of `scq train --reference`. weights: EfficientNet-Lite0, None for the user's cache.
    """

    limit: int | None = None
    train: tuple[Path, ...] = ()
    rate_weights: tuple[float, ...] = DEFAULT_RATE_WEIGHTS
    weights: Path | None = None
    recognizer: Path | None = None


@dataclass(frozen=True)
class ModelFacts:
    """A model's name, id and codebook use over the suite's pictures; see `CodebookUsage`."""

    codec: FrameCodec
    top1_usage: float
    perplexity: float
    mass_perplexity: float


@dataclass(frozen=True)
class Comparison:
    """Everything measured in one suite.

    flat_bytes: a format's file for a flat grey picture of the median size, at its lowest quality:
    what its headers cost. notes: what could not be measured and why.
    """

    suite: Suite
    points: tuple[PointResult, ...]
    models: tuple[ModelFacts, ...]
    flat_bytes: dict[str, int]
    recognizer: str | None
    originals_right: int | None
    n: int
    sizes: str
    notes: tuple[str, ...]

    @property
    def originals_accuracy(self) -> tuple[float, float, float] | None:
        """The independent recognizer's share on the originals, and its 95 % interval."""
        if self.originals_right is None:
            return None
        return self.originals_right / self.n, *wilson_interval(self.originals_right, self.n)


def run_suite(
    suite: Suite,
    pictures: ImageSet,
    codecs: Sequence[FrameCodec],
    options: Options,
    report: Report,
    progress: Progress,
) -> Comparison:
    """Measure every point. Sets torch to one thread, so that times compare.

    Raises:
        ScqError: pictures or training pictures that do not fit the suite.
    """
    torch.set_num_threads(1)
    chosen = _evenly_spaced(pictures, suite.limit if options.limit is None else options.limit)
    extractor, notes = _extractor(options.weights)
    recognizer = _recognizer(suite, options, extractor, report, notes)
    formats, missing = available_formats()
    notes += missing
    points = file_points(suite, formats)
    for codec in codecs:
        ours, lacking = scq_points(codec, options.rate_weights)
        points, notes = ours + points, notes + lacking
    judge = Judge(chosen, extractor, recognizer)
    return Comparison(
        suite=suite,
        points=tuple(_measure_all(points, judge, progress)),
        models=tuple(_facts(codec, chosen) for codec in codecs),
        flat_bytes=_flat_bytes(formats, chosen),
        recognizer=None if recognizer is None else recognizer.description,
        originals_right=judge.originals_right(),
        n=len(chosen),
        sizes=_sizes(chosen),
        notes=tuple(notes),
    )


def _measure_all(
    points: Sequence[OperatingPoint], judge: Judge, progress: Progress
) -> list[PointResult]:
    results = []
    for done, point in enumerate(points):
        progress(done, len(points), f"{point.codec} {point.setting}")
        results.append(measure(point, judge))
    progress(len(points), len(points), "done")
    return results


def _evenly_spaced(pictures: ImageSet, limit: int | None) -> ImageSet:
    if not limit or limit >= len(pictures):
        return pictures
    return pictures.subset([i * len(pictures) // limit for i in range(limit)])


def _extractor(weights: Path | None) -> tuple[FeatureExtractor | None, list[str]]:
    if weights is None and not default_weights_path().is_file():
        return None, ["no feature distance: EfficientNet-Lite0 is not here, `scq features fetch`"]
    return load_extractor(weights), []


def _recognizer(
    suite: Suite,
    options: Options,
    extractor: FeatureExtractor | None,
    report: Report,
    notes: list[str],
) -> Recognizer | None:
    if options.recognizer is not None:
        path = options.recognizer
        return ModelRecognizer(load_model(path), f"{path.parent.name}/{path.name}")
    if suite.recognizer is None:
        return None
    if not options.train:
        notes.append("no accuracy on decoded pictures: give --train with labelled originals")
        return None
    if suite.recognizer == "features" and extractor is None:
        notes.append("no accuracy on decoded pictures: it needs EfficientNet-Lite0")
        return None
    return trained_recognizer(suite.recognizer, options.train, extractor, report)


def _facts(codec: FrameCodec, pictures: ImageSet) -> ModelFacts:
    classes = len(codec.config.classes)
    if classes and pictures.labels and len(pictures.classes) != classes:
        raise ScqError(
            f"the pictures lie in {len(pictures.classes)} class folders, model {codec.name!r} "
            f"knows {classes} classes; leave --limit out or choose another model"
        )
    usage = CodebookUsage(codec.config.num_codes)
    for image in pictures.images:
        stats = codec.encode(image).stats
        usage.add(torch.from_numpy(stats.indices), torch.from_numpy(stats.numerators))
    return ModelFacts(codec, usage.top1_usage, usage.perplexity, usage.mass_perplexity)


def _flat_bytes(formats: Sequence[str], pictures: ImageSet) -> dict[str, int]:
    shapes = sorted(picture.shape for picture in pictures.images)
    grey = np.full(shapes[len(shapes) // 2], 128, np.uint8)
    return {name: len(FilePoint(name, 0).encode(grey)) for name in formats}


def _sizes(pictures: ImageSet) -> str:
    shapes = {(image.shape[1], image.shape[0]) for image in pictures.images}
    widths, heights = ([shape[side] for shape in shapes] for side in (0, 1))
    smallest, largest = f"{min(widths)}x{min(heights)}", f"{max(widths)}x{max(heights)}"
    return smallest if smallest == largest else f"{smallest} to {largest}"
