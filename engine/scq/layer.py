"""SCQLayer: the quantizer as a torch module, soft and differentiable, exactly solved.

Used in training and analysis; the coded path goes through `lattice` instead. Must not know
about images, bytes or models.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scq.errors import InvalidCodebook, InvalidLatents
from scq.metrics import CodebookUsage
from scq.solver import SOLVERS, SolverConfig, SolveResult


@dataclass(frozen=True)
class SCQStats:
    """How one forward pass used the codebook and how well it was solved.

    max_kkt_residual: squared latent units (see `solver.kkt_residual`). top1_usage: share of codes
    that are the heaviest of some latent, 0..1. perplexity, mass_perplexity: 1..num_codes, of the
    heaviest codes and of the weights. fallback_count: latents that needed the slow solver.
    """

    mean_support_size: float
    max_kkt_residual: float
    mean_iterations: float
    top1_usage: float
    perplexity: float
    mass_perplexity: float
    fallback_count: int


class SCQLayer(nn.Module):
    """Soft convex quantization (Gautam et al., L4DC 2024), solved exactly.

    Every latent becomes the convex combination of codes that minimises
    |z - C^T p|^2 + lam |p - e_nearest|^2. `codebook` is a parameter (num_codes, codebook_dim).
    Gradients reach latents and codebook through the solution, without straight-through.
    """

    def __init__(
        self, codebook_dim: int, num_codes: int, lam: float = 0.1, *, solver: str = "exact"
    ) -> None:
        super().__init__()
        if codebook_dim < 1 or num_codes < 1:
            raise InvalidCodebook(
                f"codebook_dim={codebook_dim} and num_codes={num_codes} must both be >= 1"
            )
        if solver not in SOLVERS:
            raise InvalidCodebook(f"unknown solver {solver!r}; available: {sorted(SOLVERS)}")
        self.config = SolverConfig(lam=lam)
        self.solver = solver
        self.codebook = nn.Parameter(torch.randn(num_codes, codebook_dim))

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor, SCQStats]:
        """(B, D) or (B, H, W, D) -> (z_q of the same shape, assignment (..., K), stats).

        The codebook is used in the latents' dtype (float32 or float64).
        Raises InvalidLatents for other shapes, dtypes, NaN or infinity.
        """
        if latents.ndim not in (2, 4):
            raise InvalidLatents(
                f"latents have shape {tuple(latents.shape)}, they must be (B, D) or (B, H, W, D)"
            )
        codebook = self.codebook.to(latents.dtype)
        flat = latents.reshape(-1, latents.shape[-1])
        result = SOLVERS[self.solver](flat, codebook, self.config)
        quantized = (result.assignment @ codebook).reshape(latents.shape)
        assignment = result.assignment.reshape(*latents.shape[:-1], -1)
        return quantized, assignment, _stats(result)

    def extra_repr(self) -> str:
        num_codes, codebook_dim = self.codebook.shape
        return f"{codebook_dim}, {num_codes}, lam={self.config.lam}, solver={self.solver!r}"


def _stats(result: SolveResult) -> SCQStats:
    usage = CodebookUsage(result.assignment.shape[1])
    usage.add_assignment(result.assignment.detach())
    return SCQStats(
        mean_support_size=float(result.support_size.double().mean()),
        max_kkt_residual=float(result.kkt_residual.amax()),
        mean_iterations=float(result.iterations.double().mean()),
        top1_usage=usage.top1_usage,
        perplexity=usage.perplexity,
        mass_perplexity=usage.mass_perplexity,
        fallback_count=result.fallback_count,
    )
