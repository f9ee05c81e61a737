"""The independent classifiers learn from originals, and their cache knows what they learnt from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from scq.compare import recognizers
from scq.compare.recognizers import (
    ConvRecognizer,
    FeatureRecognizer,
    same_shape_groups,
    train_convolutions,
    train_regression,
    trained_recognizer,
)
from scq.errors import ScqError
from scq.features import PictureFeatures


def test_regression_separates_what_is_separable() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    inputs = torch.randn(60, 8, generator=generator) * 0.2
    inputs[torch.arange(60), labels] += 3
    recognizer = FeatureRecognizer(train_regression(inputs, labels, 3))
    seen = [PictureFeatures((), row) for row in inputs]
    pictures = [np.zeros((1, 1, 3), np.uint8)] * 60
    assert recognizer.classify(pictures, seen) == labels.tolist()


def test_convolutions_learn_colours_and_repeat_themselves() -> None:
    rng = np.random.default_rng(0)
    crops = rng.integers(0, 60, (48, 32, 32, 3), np.uint8)
    labels = torch.arange(48) % 2
    crops[1::2, 8:24, 8:24, 0] += 150
    tensor = torch.from_numpy(crops).permute(0, 3, 1, 2).contiguous()
    heard: list[str] = []
    weights = train_convolutions(tensor, labels, 2, heard.append, epochs=12)
    again = train_convolutions(tensor, labels, 2, heard.append, epochs=12)
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert len(heard) == 24
    assert ConvRecognizer(weights).classify(list(crops), []) == labels.tolist()
    with pytest.raises(ScqError, match="32x32"):
        ConvRecognizer(weights).classify([np.zeros((16, 16, 3), np.uint8)], [])


def test_training_happens_once_per_training_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recognizers, "user_cache_path", lambda *_, **__: tmp_path / "cache")
    monkeypatch.setattr(recognizers, "_EPOCHS", 1)
    for label in ("a", "b"):
        (tmp_path / "train" / label).mkdir(parents=True)
        image = np.full((32, 32, 3), ord(label), np.uint8)
        Image.fromarray(image).save(tmp_path / "train" / label / "0.png")
    heard: list[str] = []
    for _ in range(2):
        trained_recognizer("convolutions", [tmp_path / "train"], None, heard.append)
    trained = len(heard)
    assert trained > 0
    Image.fromarray(image).save(tmp_path / "train" / "a" / "1.png")
    trained_recognizer("convolutions", [tmp_path / "train"], None, heard.append)
    assert len(heard) == 2 * trained
    assert len(list((tmp_path / "cache" / "compare").iterdir())) == 2


def test_unlabelled_originals_and_absent_features_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recognizers, "user_cache_path", lambda *_, **__: tmp_path / "cache")
    flat = tmp_path / "flat"
    (flat / "a").mkdir(parents=True)
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(flat / "a" / "0.png")
    with pytest.raises(ScqError, match="scq features fetch"):
        trained_recognizer("features", [flat], None, print)
    (flat / "a" / "0.png").rename(flat / "0.png")
    with pytest.raises(ScqError, match="no class folders"):
        trained_recognizer("convolutions", [flat], None, print)


def test_pictures_are_grouped_by_size() -> None:
    sizes = ((8, 8), (8, 9), (8, 8), (2000, 2000), (2000, 2000))
    groups = same_shape_groups([np.zeros((*size, 3), np.uint8) for size in sizes])
    assert groups == [[0, 2], [1], [3], [4]]
