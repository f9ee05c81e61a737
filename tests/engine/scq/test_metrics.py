"""PSNR, SSIM and codebook use against known values."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from scq.errors import InvalidImage, ScqError
from scq.metrics import (
    CodebookUsage,
    ms_ssim,
    psnr_db,
    scale_count,
    similarities,
    similarity,
    ssim,
    wilson_interval,
)

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
    expected = (2 * 50 * 80 + c1) / (50**2 + 80**2 + c1)
    assert ssim(dark, light) == pytest.approx(expected, abs=1e-5)


def test_ssim_takes_pictures_smaller_than_its_window() -> None:
    single = np.full((1, 1, 3), 7, np.uint8)
    assert ssim(single, single) == pytest.approx(1.0)


def ssim_by_hand(reference: Pixels, image: Pixels) -> NDArray[np.float64]:
    """SSIM of every valid window, straight from its definition: (rows, columns, 3)."""
    offsets = np.arange(11) - 5
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / 4.5)[..., None]
    window /= window.sum()
    c1, c2 = 2.55**2, 7.65**2
    rows, columns = reference.shape[0] - 10, reference.shape[1] - 10
    values = np.zeros((rows, columns, 3))
    for top in range(rows):
        for left in range(columns):
            place = slice(top, top + 11), slice(left, left + 11)
            x, y = (p[place].astype(np.float64) for p in (reference, image))
            mean_x, mean_y = ((window * v).sum((0, 1)) for v in (x, y))
            covariance = (window * (x - mean_x) * (y - mean_y)).sum((0, 1))
            variance = sum((window * (v - v_mean) ** 2).sum((0, 1))
                           for v, v_mean in ((x, mean_x), (y, mean_y)))  # fmt: skip
            luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
            values[top, left] = luminance * (2 * covariance + c2) / (variance + c2)
    return values


def test_ssim_is_that_of_the_definition(photograph: Pixels) -> None:
    crop = np.ascontiguousarray(photograph[:16, :15])
    noise = np.random.default_rng(1).integers(-30, 30, crop.shape)
    noisy = (crop + noise).clip(0, 255).astype(np.uint8)
    assert ssim(crop, noisy) == pytest.approx(float(ssim_by_hand(crop, noisy).mean()), abs=1e-5)
    flat = np.full_like(crop, 250)
    assert ssim(flat, flat - 1) == pytest.approx(ssim_by_hand(flat, flat - 1).mean(), abs=1e-5)


@pytest.mark.parametrize(
    ("side", "scales"), [(1, 1), (21, 1), (22, 2), (32, 2), (175, 4), (176, 5)]
)
def test_small_pictures_have_fewer_scales(side: int, scales: int) -> None:
    assert scale_count(side, 500) == scale_count(500, side) == scales


def test_ms_ssim_of_two_constants_is_the_luminance_of_the_last_scale() -> None:
    dark, light = np.full((48, 48, 3), 50, np.uint8), np.full((48, 48, 3), 80, np.uint8)
    c1 = 2.55**2
    luminance = (2 * 50 * 80 + c1) / (50**2 + 80**2 + c1)
    exponent = 0.3001 / (0.0448 + 0.2856 + 0.3001)
    assert ms_ssim(dark, light) == pytest.approx(luminance**exponent, abs=1e-5)


def test_ms_ssim_of_one_scale_is_ssim(photograph: Pixels) -> None:
    crop = np.ascontiguousarray(photograph[:20, :20])
    noisy = crop + np.random.default_rng(0).integers(0, 20, crop.shape, np.uint8)
    both = similarity(crop, noisy)
    assert both.scales == 1
    assert both.ms_ssim == pytest.approx(both.ssim)


def test_ms_ssim_forgives_fine_noise_that_ssim_does_not(photograph: Pixels) -> None:
    noise = np.random.default_rng(0).integers(0, 40, photograph.shape, np.uint8)
    noisy = np.minimum(photograph, 215) + noise
    both = similarity(photograph, noisy)
    assert both.scales == 2
    assert both.ssim < both.ms_ssim < 1
    assert both.ssim == pytest.approx(ssim(photograph, noisy))
    assert ms_ssim(photograph, photograph) == pytest.approx(1.0)


def test_pairs_together_are_pairs_one_by_one(photograph: Pixels) -> None:
    pairs = [(photograph, photograph // step) for step in (1, 2, 3)]
    together, alone = similarities(pairs), [similarity(*pair) for pair in pairs]
    assert [pair.scales for pair in together] == [2, 2, 2]
    for field in ("ssim", "ms_ssim"):
        values = [getattr(pair, field) for pair in together]
        assert values == pytest.approx([getattr(pair, field) for pair in alone], abs=1e-6)
    with pytest.raises(InvalidImage, match="shapes"):
        similarities([*pairs, (photograph[1:], photograph[1:])])


def test_wilson_interval_of_known_shares() -> None:
    low, high = wilson_interval(8, 10)
    assert low == pytest.approx(0.4902, abs=1e-4)
    assert high == pytest.approx(0.9433, abs=1e-4)
    assert wilson_interval(0, 20)[0] == 0
    assert wilson_interval(20, 20)[1] == 1
    with pytest.raises(ScqError, match="3 of 2"):
        wilson_interval(3, 2)


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
