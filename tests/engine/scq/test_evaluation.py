"""Figures of an evaluation are those of the bytes: counted by hand on a tiny model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from scq.codec import FrameCodec
from scq.data import ImageSet
from scq.errors import ScqError
from scq.evaluation import evaluate, side_by_side
from scq.metrics import psnr_db
from scq.model import ModelConfig, ScqAutoencoder


def tiny_codec(classes: tuple[str, ...] = ()) -> FrameCodec:
    torch.manual_seed(0)
    config = ModelConfig(
        "tiny",
        "frame",
        stride=8,
        max_width=64,
        max_height=64,
        code_dim=4,
        num_codes=16,
        classes=classes,
        encoder_widths=(8, 8),
        encoder_blocks=(1, 1),
        decoder_widths=(8, 8),
        decoder_blocks=(1, 1),
    )
    return FrameCodec(ScqAutoencoder(config))


def pictures(labels: tuple[int, ...] = (), classes: tuple[str, ...] = ()) -> ImageSet:
    rng = np.random.default_rng(0)
    images = tuple(rng.integers(0, 255, size, np.uint8) for size in ((24, 40, 3), (17, 9, 3)))
    return ImageSet(images, ("large", "small"), labels, classes)


def test_bytes_and_quality_are_those_of_the_codec() -> None:
    codec, images = tiny_codec(), pictures()
    heard: list[tuple[int, int]] = []
    result = evaluate(codec, images, lambda done, total: heard.append((done, total)))
    frames = [codec.encode(image).codes for image in images.images]
    assert [report.coded_bytes for report in result.images] == [len(codes) for codes in frames]
    assert result.coded_bytes == sum(map(len, frames))
    assert result.mean_coded_bytes == result.coded_bytes / 2
    assert result.bpp == pytest.approx(8 * result.coded_bytes / (24 * 40 + 17 * 9))
    expected = [psnr_db(i, codec.decode(c)) for i, c in zip(images.images, frames, strict=True)]
    assert [report.psnr_db for report in result.images] == expected
    assert result.psnr_db == pytest.approx(sum(expected) / 2)
    assert heard == [(1, 2), (2, 2)]
    assert result.accuracy is None


def test_codebook_use_counts_every_latent() -> None:
    codec, images = tiny_codec(), pictures()
    result = evaluate(codec, images)
    indices = [codec.encode(image).stats.indices for image in images.images]
    first = np.concatenate(indices)[:, 0]
    assert len(first) == 3 * 5 + 3 * 2
    assert result.top1_usage == len(set(first.tolist())) / 16
    assert 1 <= result.perplexity <= len(set(first.tolist())) + 1e-9
    assert 1 <= result.mass_perplexity <= 16


def test_accuracy_is_the_share_of_right_first_labels() -> None:
    codec = tiny_codec(("a", "b"))
    images = pictures((0, 1), ("a", "b"))
    result = evaluate(codec, images)
    firsts = [codec.recognize(codec.encode(i).codes)[0].class_index for i in images.images]
    assert [report.predicted for report in result.images] == firsts
    assert result.accuracy == ((firsts[0] == 0) + (firsts[1] == 1)) / 2


def test_unlabelled_pictures_have_predictions_but_no_accuracy() -> None:
    result = evaluate(tiny_codec(("a", "b")), pictures())
    assert result.accuracy is None
    assert all(report.predicted is not None for report in result.images)


def test_pictures_of_other_classes_are_refused() -> None:
    with pytest.raises(ScqError, match="3 class folders, model 'tiny' knows 2"):
        evaluate(tiny_codec(("a", "b")), pictures((0, 2), ("a", "b", "c")))


def test_side_by_side_shows_each_picture_above_its_reconstruction() -> None:
    codec, images = tiny_codec(), list(pictures().images)
    canvas = side_by_side(codec, images)
    assert canvas.shape == (48, 49, 3)
    assert np.array_equal(canvas[:24, :40], images[0])
    assert np.array_equal(canvas[17:34, 40:], codec.decode(codec.encode(images[1]).codes))
    assert bool((canvas[34:, 40:] == 255).all())
