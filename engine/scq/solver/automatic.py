"""The fastest exact solver that can take the tensors: `native` in CPU memory, else `exact`.

Both return the same optimum, certified to the same tolerance. Must not know either's method.
"""

from __future__ import annotations

from torch import Tensor

from scq.solver import exact, native
from scq.solver.base import SolverConfig, SolveResult


def solve(
    latents: Tensor, codebook: Tensor, config: SolverConfig, initial: Tensor | None = None
) -> SolveResult:
    """Same contract as `exact.solve`; the library's solver runs wherever it is there and fits."""
    chosen = exact if native.obstacle(latents) else native
    result: SolveResult = chosen.solve(latents, codebook, config, initial)
    return result
