"""Correctness of the GPU kernels: every format and every kernel against float64 references."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vqkernels.cuda.gpu import Gpu
from vqkernels.cuda.samples import Dense, Sample, odd_samples
from vqkernels.cuda.weights import Choice, CudaWeights

TOLERANCE = 3e-3
"""Relative error that half precision explains, with sums of up to 16 products in it (GEMV)."""

ROWS = (1, 2, 3, 4, 5, 8, 9, 16, 17, 33, 64, 65, 130, 256, 257)


@dataclass(frozen=True)
class Check:
    """Relative error (Frobenius) of one product."""

    format: str
    out_features: int
    in_features: int
    rows: int
    kernel: str
    relative_error: float

    @property
    def is_right(self) -> bool:
        """False also where the error is not a number."""
        return self.relative_error <= TOLERANCE


def check_all(
    gpu: Gpu, rows: Sequence[int] = ROWS, sizes: tuple[int, int] | None = None
) -> list[Check]:
    """Every format over odd shapes; `sizes` are (inputs, outputs) of `odd_samples`."""
    samples = odd_samples(*sizes) if sizes else odd_samples()
    return [
        check for name, sample in samples.items() for check in check_sample(gpu, name, sample, rows)
    ]


def check_sample(
    gpu: Gpu, name: str, sample: Sample, rows: Sequence[int] = ROWS
) -> Iterator[Check]:
    """One format with several numbers of rows, each by the kernel that it would choose."""
    weights, dense = sample.weights(gpu), sample.dense()
    for count in rows:
        choice = weights.choose(count)
        error = relative_error(weights, dense, count, choice)
        kernel = f"{choice.kind}{choice.rows or ''}"
        yield Check(name, weights.out_features, weights.in_features, count, kernel, error)


def relative_error(weights: CudaWeights, dense: Dense, rows: int, choice: Choice) -> float:
    """Frobenius norm of the error over that of the float64 product."""
    x = np.random.default_rng(rows).normal(size=(rows, weights.in_features)).astype(np.float16)
    expected = x.astype(np.float64) @ dense.T
    y = weights.product(torch.from_numpy(x).to(weights.gpu.device), choice)
    return float(np.linalg.norm(y.double().cpu().numpy() - expected) / np.linalg.norm(expected))
