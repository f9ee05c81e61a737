"""SCQLayer: the quantizer as a torch module, soft and differentiable, exactly solved.

Used in training and analysis; the coded path goes through `lattice` instead. Must not know
about images, bytes or models.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from scq.errors import InvalidCodebook, InvalidLatents
from scq.metrics import CodebookUsage
from scq.solver import Objective, SolverConfig, SolveResult, SparseAssignment, get_solver


@dataclass(frozen=True)
class SCQStats:
    """How one forward pass used the codebook and how well it was solved.

    max_kkt_residual: squared latent units (see `solver.kkt_residual`). top1_usage: share of codes
    that are the heaviest of some latent, 0..1. perplexity, mass_perplexity: 1..num_codes, of the
    heaviest codes and of the weights. fallback_count: latents that needed the slow solver.
    """

    mean_support_size: float
    max_support_size: int
    max_kkt_residual: float
    mean_iterations: float
    max_iterations: int
    top1_usage: float
    perplexity: float
    mass_perplexity: float
    fallback_count: int


class SCQLayer(nn.Module):
    """Soft convex quantization (Gautam et al., L4DC 2024), solved exactly.

    Every latent becomes the convex combination of codes that minimises
    |z - C^T p|^2 + lam |p - e_nearest|^2. `codebook` is a parameter (num_codes, codebook_dim).
    Gradients reach latents and codebook through the solution, without straight-through.

    solver: a name in `solver.SOLVERS`, "auto" for the fastest exact one that can take the tensors;
    objective: "nearest" as above, or "ridge" for lam |p|^2.
    sparse: return assignments as `SparseAssignment`, without num_codes numbers per latent.
    `config` holds all solver settings and may be replaced between calls.
    """

    def __init__(
        self,
        codebook_dim: int,
        num_codes: int,
        lam: float = 0.1,
        *,
        solver: str = "auto",
        objective: Objective = "nearest",
        sparse: bool = False,
    ) -> None:
        super().__init__()
        if codebook_dim < 1 or num_codes < 1:
            raise InvalidCodebook(
                f"codebook_dim={codebook_dim} and num_codes={num_codes} must both be >= 1"
            )
        get_solver(solver)
        self.config = SolverConfig(lam=lam, objective=objective)
        self.solver = solver
        self.sparse = sparse
        self.codebook = nn.Parameter(torch.randn(num_codes, codebook_dim))

    def forward(
        self, latents: Tensor, *, lam: float | None = None, initial: Tensor | None = None
    ) -> tuple[Tensor, Tensor | SparseAssignment, SCQStats]:
        """(B, D) or (B, H, W, D) -> (z_q of the same shape, assignment (..., K), stats).

        The codebook is used in the latents' dtype (float32 or float64). lam replaces the
        layer's for this call, e.g. in a warm-up. initial (..., W) int64: supports to start from,
        such as `SparseAssignment.support()` of the previous frame, -1 in unused slots.
        Raises InvalidLatents for other shapes, dtypes, NaN or infinity.
        """
        if latents.ndim not in (2, 4):
            raise InvalidLatents(
                f"latents have shape {tuple(latents.shape)}, they must be (B, D) or (B, H, W, D)"
            )
        config = self.config if lam is None else replace(self.config, lam=lam)
        codebook = self.codebook.to(latents.dtype)
        flat = latents.reshape(-1, latents.shape[-1])
        start = None if initial is None else initial.reshape(-1, initial.shape[-1])
        result = get_solver(self.solver)(flat, codebook, config, start)
        sparse = result.sparse.reshape(*latents.shape[:-1])
        assignment = sparse if self.sparse else sparse.dense()
        return result.quantized.reshape(latents.shape), assignment, _stats(result)

    def extra_repr(self) -> str:
        num_codes, codebook_dim = self.codebook.shape
        return (
            f"{codebook_dim}, {num_codes}, lam={self.config.lam}, solver={self.solver!r}, "
            f"objective={self.config.objective!r}"
        )


def _stats(result: SolveResult) -> SCQStats:
    usage = CodebookUsage(result.sparse.num_codes)
    sparse = result.sparse.detach()
    weights, order = sparse.weights.clamp(min=0).sort(-1, descending=True)
    usage.add(sparse.indices.gather(-1, order), weights)
    return SCQStats(
        mean_support_size=float(result.support_size.double().mean()),
        max_support_size=int(result.support_size.amax()),
        max_kkt_residual=float(result.kkt_residual.amax()),
        mean_iterations=float(result.iterations.double().mean()),
        max_iterations=int(result.iterations.amax()),
        top1_usage=usage.top1_usage,
        perplexity=usage.perplexity,
        mass_perplexity=usage.mass_perplexity,
        fallback_count=result.fallback_count,
    )
