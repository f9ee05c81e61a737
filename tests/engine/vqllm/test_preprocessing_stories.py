"""Rotation and smoothing of a trained model keep its logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from numpy.typing import NDArray

from vqllm.checkpoint import Checkpoint
from vqllm.outlier.quarot import QuarotOptions, RotatedSource
from vqllm.outlier.smoothquant import SmoothedSource
from vqllm.sources import PlainSource, WeightSource, source_logits

FOLDER = Path(__file__).parents[4] / "shared" / "data" / "models" / "stories260k"

pytestmark = [
    pytest.mark.shared_data,
    pytest.mark.skipif(not FOLDER.is_dir(), reason="../shared/data/models/stories260k is absent"),
]


@pytest.fixture
def source() -> PlainSource:
    return PlainSource(Checkpoint(FOLDER))


@pytest.fixture
def windows(source: PlainSource) -> NDArray[Any]:
    """Texts of the model's own, (4, 48), at temperature 1."""
    generator = torch.Generator().manual_seed(0)
    texts = torch.ones(4, 1, dtype=torch.int64)
    for _ in range(47):
        odds = source_logits(source, texts)[:, -1].softmax(-1)
        texts = torch.cat([texts, odds.multinomial(1, generator=generator)], dim=1)
    return texts.numpy()


def assert_same_function(
    found: WeightSource, expected: WeightSource, windows: NDArray[Any]
) -> None:
    tokens = torch.from_numpy(windows)
    torch.testing.assert_close(
        source_logits(found, tokens), source_logits(expected, tokens), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("is_portable", [False, True])
def test_rotation_keeps_the_logits(
    source: PlainSource, windows: NDArray[Any], is_portable: bool
) -> None:
    rotated = RotatedSource(source, QuarotOptions(seed=1, portable=is_portable))
    assert_same_function(rotated, source, windows)


def test_smoothing_keeps_the_logits(source: PlainSource, windows: NDArray[Any]) -> None:
    assert_same_function(SmoothedSource.calibrated(source, windows), source, windows)
