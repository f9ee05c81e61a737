"""PSNR, SSIM and codebook use against known values."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from scq.errors import InvalidImage
from scq.metrics import CodebookUsage, psnr_db, ssim

Pixels = NDArray[np.uint8]


def test_psnr_of_a_constant_error_is_exact(photograph: Pixels) -> None:
    grey = np.full_like(photograph, 100)
    assert psnr_db(grey, grey + 5) == pytest.approx(20 * math.log10(255 / 5))
    assert psnr_db(grey, grey) == math.inf


def test_ssim_is_one_for_equal_pictures_and_symmetric(photograph: Pixels) -> None:
    noisy = photograph + np.random.default_rng(0).integers(0, 20, photograph.shape, np.uint8)
    assert ssim(photograph, photograph) == pytest.approx(1.0)
    assert ssim(photograph, noisy) == pytest.approx(ssim(noisy, photograph))
    assert ssim(photograph, noisy) < 0.99


def test_ssim_of_two_constants_is_the_luminance_term() -> None:
    dark, light = np.full((16, 16, 3), 50, np.uint8), np.full((16, 16, 3), 80, np.uint8)
    c1 = (0.01 * 255) ** 2
    assert ssim(dark, light) == pytest.approx((2 * 50 * 80 + c1) / (50**2 + 80**2 + c1))


def test_ssim_takes_pictures_smaller_than_its_window() -> None:
    single = np.full((1, 1, 3), 7, np.uint8)
    assert ssim(single, single) == pytest.approx(1.0)


def test_pictures_of_different_shapes_are_refused(photograph: Pixels) -> None:
    for measure in (psnr_db, ssim):
        with pytest.raises(InvalidImage, match="shapes"):
            measure(photograph, photograph[1:])


def test_usage_counts_heaviest_codes_and_mass_apart() -> None:
    usage = CodebookUsage(4)
    assert usage.top1_usage == usage.perplexity == usage.mass_perplexity == 0
    usage.add(torch.tensor([[0, 1], [0, 2]]), torch.tensor([[2, 2], [2, 2]]))
    assert usage.top1_usage == 0.25
    assert usage.perplexity == pytest.approx(1.0)
    assert usage.mass_perplexity == pytest.approx(math.exp(1.5 * math.log(2)))
    usage.add(torch.tensor([[1, 1], [1, 1]]), torch.tensor([[4, 0], [4, 0]]))
    assert usage.top1_usage == 0.5
    assert usage.perplexity == pytest.approx(2.0)


def test_dense_and_sparse_counting_agree() -> None:
    dense, sparse = CodebookUsage(3), CodebookUsage(3)
    dense.add_assignment(torch.tensor([[0.75, 0.0, 0.25], [0.0, 1.0, 0.0]]))
    sparse.add(torch.tensor([[0, 2], [1, 1]]), torch.tensor([[0.75, 0.25], [1.0, 0.0]]))
    assert dense.perplexity == pytest.approx(sparse.perplexity)
    assert dense.mass_perplexity == pytest.approx(sparse.mass_perplexity)
    assert dense.top1_usage == sparse.top1_usage
