"""One frame looked at closely: decoded and compared, some of its latents solved exactly.

Coding searches the lattice and never runs the exact solver; this shows what the solver would have
found. Knows the engine; knows no metrics, no protobuf and no transport.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from scq.codec import CodedPicture, EncodedFrame, FrameCodec
from scq.images import Pixels
from scq.lattice import LatticeAssignment
from scq.metrics import psnr_db
from scq.solver import SOLVERS, SolverConfig

# Latents that the exact solver sees, spread evenly over the picture.
PROBED_LATENTS = 16
# Equal pictures have an infinite PSNR; histograms want a number.
MAX_PSNR_DB = 100.0


@dataclass(frozen=True)
class HealthSample:
    """What a probe of one frame found.

    psnr_db: of the decoded picture. iterations, support_sizes, kkt_residuals (N,): of the exact
    solver, by latent. fallbacks: latents that its fast path gave up on. exact_error, coded_error:
    squared latent error of the exact solution and of the codes sent, over the latents' energy.
    """

    psnr_db: float
    iterations: NDArray[np.int64]
    support_sizes: NDArray[np.int64]
    kkt_residuals: NDArray[np.float64]
    fallbacks: int
    exact_error: float
    coded_error: float


@torch.inference_mode()
def probe(codec: FrameCodec, image: Pixels, encoded: EncodedFrame) -> HealthSample:
    """Look at one encoded picture, uint8 (H, W, 3); takes about as long as coding it did."""
    model, stats = codec.model, encoded.stats
    latents, placement, _ = codec.analyse(image)
    assignment = LatticeAssignment(
        torch.from_numpy(stats.indices), torch.from_numpy(stats.numerators)
    )
    decoded = codec.render(CodedPicture(assignment, placement))
    flat = latents.reshape(-1, model.config.code_dim)
    chosen = np.unique(np.linspace(0, len(flat) - 1, PROBED_LATENTS, dtype=np.int64))
    sample = flat[chosen]
    sent = model.dequantize(assignment, placement.grid).reshape(flat.shape)[chosen]
    codebook = model.quantizer.codebook
    solved = SOLVERS["exact"](sample, codebook, SolverConfig(model.config.lam))
    energy = float(sample.square().sum()) or 1.0
    return HealthSample(
        psnr_db=min(psnr_db(image, decoded), MAX_PSNR_DB),
        iterations=solved.iterations.numpy(),
        support_sizes=solved.support_size.numpy(),
        kkt_residuals=solved.kkt_residual.numpy(),
        fallbacks=solved.fallback_count,
        exact_error=float((sample - solved.assignment @ codebook).square().sum()) / energy,
        coded_error=float((sample - sent).square().sum()) / energy,
    )
