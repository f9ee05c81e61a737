"""What a model is worth on real pictures, measured on the bytes it would send.

Every figure comes from packed and unpacked frames through `FrameCodec`, never from latents that
skipped the bitstream. This module knows nothing of training, tables or command lines.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from scq.codec import FrameCodec
from scq.data import ImageSet
from scq.errors import ScqError
from scq.images import Pixels
from scq.metrics import CodebookUsage, psnr_db, ssim

EvaluationProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class ImageReport:
    """One picture's figures. `label` and `predicted` are class indices, None where unknown."""

    name: str
    width: int
    height: int
    coded_bytes: int
    bpp: float
    psnr_db: float
    ssim: float
    label: int | None
    predicted: int | None


@dataclass(frozen=True)
class Evaluation:
    """Figures over a set of pictures.

    psnr_db and ssim are means over pictures. coded_bytes is the total of whole frames, header
    included; bpp is 8 * coded_bytes over the total of original pixels. Codebook use covers all
    latents together: top1_usage is a share of the codes, perplexities run from 1 to num_codes.
    accuracy is top-1, None without labels or head.
    """

    model: str
    model_hash: str
    images: tuple[ImageReport, ...]
    psnr_db: float
    ssim: float
    coded_bytes: int
    bpp: float
    top1_usage: float
    perplexity: float
    mass_perplexity: float
    accuracy: float | None

    @property
    def mean_coded_bytes(self) -> float:
        """Bytes of a frame, mean over pictures."""
        return self.coded_bytes / len(self.images)


def evaluate(
    codec: FrameCodec, images: ImageSet, progress: EvaluationProgress | None = None
) -> Evaluation:
    """Code and decode every picture; `progress` hears (pictures done, pictures in all).

    Raises:
        ScqError: labels that are not the model's classes.
    """
    _check_classes(codec, images)
    usage = CodebookUsage(codec.config.num_codes)
    reports = []
    for position in range(len(images)):
        reports.append(_evaluate_image(codec, images, position, usage))
        if progress is not None:
            progress(position + 1, len(images))
    return _summarise(codec, tuple(reports), usage)


def _check_classes(codec: FrameCodec, images: ImageSet) -> None:
    classes = len(codec.config.classes)
    if classes and images.labels and len(images.classes) != classes:
        raise ScqError(
            f"the pictures lie in {len(images.classes)} class folders, model {codec.name!r} "
            f"knows {classes} classes"
        )


def _evaluate_image(
    codec: FrameCodec, images: ImageSet, position: int, usage: CodebookUsage
) -> ImageReport:
    image = images.images[position]
    encoded = codec.encode(image)
    decoded = codec.decode(encoded.codes)
    stats = encoded.stats
    usage.add(torch.from_numpy(stats.indices), torch.from_numpy(stats.numerators))
    label = images.labels[position] if images.labels else None
    predicted = codec.recognize(encoded.codes)[0].class_index if codec.config.classes else None
    return ImageReport(
        name=images.names[position],
        width=image.shape[1],
        height=image.shape[0],
        coded_bytes=stats.coded_bytes,
        bpp=stats.bpp,
        psnr_db=psnr_db(image, decoded),
        ssim=ssim(image, decoded),
        label=label,
        predicted=predicted,
    )


def _summarise(
    codec: FrameCodec, reports: tuple[ImageReport, ...], usage: CodebookUsage
) -> Evaluation:
    coded_bytes = sum(report.coded_bytes for report in reports)
    return Evaluation(
        model=codec.name,
        model_hash=codec.model_hash,
        images=reports,
        psnr_db=float(np.mean([report.psnr_db for report in reports])),
        ssim=float(np.mean([report.ssim for report in reports])),
        coded_bytes=coded_bytes,
        bpp=8 * coded_bytes / sum(report.width * report.height for report in reports),
        top1_usage=usage.top1_usage,
        perplexity=usage.perplexity,
        mass_perplexity=usage.mass_perplexity,
        accuracy=_accuracy(reports),
    )


def _accuracy(reports: tuple[ImageReport, ...]) -> float | None:
    known = [r for r in reports if r.label is not None and r.predicted is not None]
    return sum(r.label == r.predicted for r in known) / len(known) if known else None


def side_by_side(codec: FrameCodec, images: list[Pixels]) -> Pixels:
    """Each picture above its reconstruction, in one row on white: for looking at."""
    columns = [np.concatenate((image, codec.decode(codec.encode(image).codes))) for image in images]
    height = max(column.shape[0] for column in columns)
    canvas = np.full((height, sum(c.shape[1] for c in columns), 3), 255, np.uint8)
    left = 0
    for column in columns:
        canvas[: column.shape[0], left : left + column.shape[1]] = column
        left += column.shape[1]
    return canvas
