"""Measures of pictures (PSNR, SSIM, MS-SSIM), shares and codebook use. Knows no models or files.

Pictures are numpy uint8 (H, W, 3); codebook use counts torch or numpy indices and weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from scq.errors import InvalidImage, ScqError

Image = NDArray[np.uint8]

# Of MS-SSIM's scales, finest first.
_SCALE_EXPONENTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
_OFFSET = 127.5
# Samples of planes worked on at a time, so that they stay in a core's cache.
_CHUNK = 1 << 17


def psnr_db(reference: Image, image: Image) -> float:
    """Peak signal-to-noise ratio over all samples, in dB; infinity for equal pictures.

    Raises InvalidImage when the shapes differ.
    """
    _check_pair(reference, image)
    difference = reference.astype(np.float64) - image.astype(np.float64)
    mse = float(np.mean(difference**2))
    return math.inf if mse == 0 else 10 * math.log10(255.0**2 / mse)


def ssim(reference: Image, image: Image) -> float:
    """Structural similarity (Wang et al., IEEE TIP 2004), mean over pixels and channels.

    11x11 Gaussian window of sigma 1.5, K1 = 0.01, K2 = 0.03, valid positions only; pictures
    smaller than 11 pixels are padded by reflection of their edge. float32, good to about 1e-5.
    Raises InvalidImage.
    """
    return similarity(reference, image, max_scales=1).ssim


def ms_ssim(reference: Image, image: Image) -> float:
    """Multi-scale structural similarity; see `similarity` for its scales. Raises InvalidImage."""
    return similarity(reference, image).ms_ssim


@dataclass(frozen=True)
class Similarity:
    """SSIM and MS-SSIM of one pair; `scales` is how many scales the latter had room for."""

    ssim: float
    ms_ssim: float
    scales: int


def similarity(reference: Image, image: Image, *, max_scales: int = 5) -> Similarity:
    """Both structural similarities in one pass over two pictures; see `similarities`."""
    return similarities([(reference, image)], max_scales=max_scales)[0]


@torch.inference_mode()
def similarities(pairs: Sequence[tuple[Image, Image]], *, max_scales: int = 5) -> list[Similarity]:
    """SSIM and MS-SSIM of pairs of pictures, all of one size.

    MS-SSIM (Wang, Simoncelli and Bovik, Asilomar 2003) is made per channel and averaged: the
    contrast-structure term of every scale and the luminance of the last, to the paper's five
    exponents. A scale halves the picture by 2x2 means. Pictures whose shorter side is below 176
    have no fifth scale of 11 pixels: they get as many scales as fit, the exponents divided by
    their sum, so compare them only with pictures of the same size.

    Raises:
        InvalidImage: shapes that differ.
    """
    for reference, image in pairs:
        _check_pair(pairs[0][0], reference)
        _check_pair(reference, image)
    x, y = (torch.cat([_planes(pair[side]) for pair in pairs]) for side in (0, 1))
    scales = scale_count(x.shape[1], x.shape[2], max_scales)
    chunk = max(1, _CHUNK // (x.shape[1] * x.shape[2]))
    parts = zip(torch.split(x, chunk), torch.split(y, chunk), strict=True)
    planes = [_plane_similarity(*part, scales) for part in parts]
    single, multiple = (
        torch.cat(values).view(-1, 3).mean(1).tolist() for values in zip(*planes, strict=True)
    )
    return [Similarity(*values, scales) for values in zip(single, multiple, strict=True)]


def _plane_similarity(x: Tensor, y: Tensor, scales: int) -> tuple[Tensor, Tensor]:
    """SSIM and MS-SSIM of every pair of planes (P, H, W): two vectors (P,)."""
    total = sum(_SCALE_EXPONENTS[:scales])
    for scale in range(scales):
        if scale > 0:
            x, y = functional.avg_pool2d(x, 2), functional.avg_pool2d(y, 2)
        luminance, structure = _ssim_terms(x, y)
        full = (luminance * structure).mean((1, 2))
        if scale == 0:
            first, product = full, torch.ones_like(full)
        term = full if scale == scales - 1 else structure.mean((1, 2))
        product *= term.clamp_min(0) ** (_SCALE_EXPONENTS[scale] / total)
    return first, product


def scale_count(height: int, width: int, limit: int = 5) -> int:
    """How many of MS-SSIM's scales a picture of this size has room for: 1 to `limit`."""
    return max(1, min(limit, (min(height, width) // 11).bit_length()))


def _check_pair(reference: Image, image: Image) -> None:
    if reference.shape != image.shape or reference.ndim != 3 or reference.shape[2] != 3:
        raise InvalidImage(
            f"pictures have shapes {reference.shape} and {image.shape}, "
            "both must be the same (H, W, 3)"
        )


def _planes(picture: Image) -> Tensor:
    """(3, H, W) float32 around 0, which keeps the variances' float32 rounding small."""
    height, width, _ = picture.shape
    short = (max(0, 11 - height), max(0, 11 - width))
    padded = np.pad(picture, ((0, short[0]), (0, short[1]), (0, 0)), mode="symmetric")
    return torch.from_numpy(padded).permute(2, 0, 1).contiguous().float() - _OFFSET


def _ssim_terms(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Luminance and contrast-structure maps of planes (P, H, W).

    Both are written as 1 minus a ratio, (2ab + c) / (a^2 + b^2 + c) = 1 - (a - b)^2 / (...), and
    the variances from the pictures' difference: exact where float32 would cancel, and one blur
    fewer.
    """
    difference = x - y
    mean_x, mean_error = _blur(x), _blur(difference)
    squares, error = _blur(x * x + y * y), _blur(difference * difference)
    mean_y = mean_x - mean_error
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    variances = (squares - mean_x**2 - mean_y**2).clamp_min(0)
    structure = 1 - (error - mean_error**2).clamp_min(0) / (variances + c2)
    powers = (mean_x + _OFFSET) ** 2 + (mean_y + _OFFSET) ** 2
    return 1 - mean_error**2 / (powers + c1), structure


def _blur(planes: Tensor) -> Tensor:
    """Gaussian window over (P, H, W), valid positions: (P, H - 10, W - 10).

    Sums of shifted planes: a third of the time of torch's convolution of one channel.
    """
    offsets = torch.arange(11, dtype=torch.float64) - 5
    window = torch.exp(-(offsets**2) / (2 * 1.5**2))
    weights: list[float] = (window / window.sum()).tolist()
    height, width = planes.shape[1] - 10, planes.shape[2] - 10
    rows = planes[:, 5 : 5 + height] * weights[5]
    for i in (0, 1, 2, 3, 4, 6, 7, 8, 9, 10):
        rows.add_(planes[:, i : i + height], alpha=weights[i])
    columns = rows[:, :, 5 : 5 + width] * weights[5]
    for i in (0, 1, 2, 3, 4, 6, 7, 8, 9, 10):
        columns.add_(rows[:, :, i : i + width], alpha=weights[i])
    return columns


def wilson_interval(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson score interval of a share (E. B. Wilson, JASA 1927); 95 % at the default z.

    Raises ScqError unless 0 <= successes <= trials and trials >= 1.
    """
    if not 0 <= successes <= trials or trials < 1:
        raise ScqError(f"need 0 <= successes <= trials and a trial, got {successes} of {trials}")
    share, spread = successes / trials, z * z / trials
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt((share * (1 - share) + spread / 4) / trials)
    low = 0.0 if successes == 0 else centre - half
    return low, 1.0 if successes == trials else centre + half


def perplexity(mass: Tensor) -> float:
    """exp(entropy) of non-negative `mass` (K,) after normalising it: between 1 and K."""
    share = mass.double() / mass.double().sum()
    return float(torch.exp(-torch.special.xlogy(share, share).sum()))


class CodebookUsage:
    """Accumulates how a stream of latents uses the codes.

    top1_usage: share of codes that were the heaviest of some latent. perplexity: of the
    heaviest codes' histogram. mass_perplexity: of the summed weights. All are 0 before data.
    """

    def __init__(self, num_codes: int) -> None:
        self._top1 = torch.zeros(num_codes, dtype=torch.float64)
        self._mass = torch.zeros(num_codes, dtype=torch.float64)

    def add(self, indices: Tensor, weights: Tensor) -> None:
        """Add (N, s) code indices, heaviest first, with their (N, s) weights."""
        ones = torch.ones(len(indices), dtype=torch.float64)
        self._top1.index_add_(0, indices[:, 0].cpu(), ones)
        self._mass.index_add_(0, indices.flatten().cpu(), weights.flatten().double().cpu())

    def add_assignment(self, assignment: Tensor) -> None:
        """Add dense (N, K) soft assignments."""
        top1 = assignment.argmax(1)
        self._top1 += torch.bincount(top1, minlength=len(self._top1)).cpu()
        self._mass += assignment.double().sum(0).cpu()

    @property
    def top1_usage(self) -> float:
        return float((self._top1 > 0).double().mean())

    @property
    def perplexity(self) -> float:
        return perplexity(self._top1) if self._top1.any() else 0.0

    @property
    def mass_perplexity(self) -> float:
        return perplexity(self._mass) if self._mass.any() else 0.0
