"""Measures of pictures (PSNR, SSIM) and of codebook use. Knows no models and no files.

Pictures are numpy uint8 (H, W, 3); codebook use counts torch or numpy indices and weights.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scq.errors import InvalidImage

Image = NDArray[np.uint8]


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
    smaller than 11 pixels are padded by reflection of their edge. Raises InvalidImage.
    """
    _check_pair(reference, image)
    x, y = (_planes(picture) for picture in (reference, image))
    mean_x, mean_y = _blur(x), _blur(y)
    var_x = _blur(x * x) - mean_x**2
    var_y = _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    return float((luminance * structure).mean())


def _check_pair(reference: Image, image: Image) -> None:
    if reference.shape != image.shape or reference.ndim != 3 or reference.shape[2] != 3:
        raise InvalidImage(
            f"pictures have shapes {reference.shape} and {image.shape}, "
            "both must be the same (H, W, 3)"
        )


def _planes(picture: Image) -> Tensor:
    height, width, _ = picture.shape
    short = (max(0, 11 - height), max(0, 11 - width))
    padded = np.pad(picture, ((0, short[0]), (0, short[1]), (0, 0)), mode="symmetric")
    return torch.from_numpy(padded).permute(2, 0, 1)[:, None].double()


def _blur(planes: Tensor) -> Tensor:
    offsets = torch.arange(11, dtype=torch.float64) - 5
    window = torch.exp(-(offsets**2) / (2 * 1.5**2))
    window /= window.sum()
    rows = torch.nn.functional.conv2d(planes, window.view(1, 1, 11, 1))
    return torch.nn.functional.conv2d(rows, window.view(1, 1, 1, 11))


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
