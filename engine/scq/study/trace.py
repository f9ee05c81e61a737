"""KKT residual and support of soft quantizers while they train."""

from __future__ import annotations

import torch
from torch import Tensor

from scq.metrics import CodebookUsage
from scq.quantizers import Quantizer
from scq.quantizers.scq_soft import SoftConvexQuantizer
from scq.solver import solve
from scq.study.results import TraceRow
from scq.study.spec import Run

_INTERVAL = 25


class Trace:
    """Collects a row every 25 steps of a run; of a quantizer that solves nothing, none."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.rows: list[TraceRow] = []

    @torch.no_grad()
    def record(self, step: int, quantizer: Quantizer, latents: Tensor) -> None:
        """Solve the batch's latents (B, h, w, F) once more and keep how well that went."""
        if step % _INTERVAL or not isinstance(quantizer, SoftConvexQuantizer):
            return
        flat = latents.detach().flatten(0, 2)
        codebook = quantizer.codebook.detach().to(flat.dtype)
        solution = solve(flat, codebook, quantizer.solver_config, solver=quantizer.solver)
        usage = CodebookUsage(len(codebook))
        heaviest = solution.sparse.indices.gather(
            1, solution.sparse.weights.argmax(dim=1, keepdim=True)
        )
        usage.add(heaviest, torch.ones(heaviest.shape))
        self.rows.append(
            TraceRow(
                study=self.run.study,
                pictures=self.run.pictures,
                label=self.run.variant.label,
                seed=self.run.seed,
                step=step,
                kkt_residual=float(solution.kkt_residual.amax()),
                support=float(solution.support_size.double().mean()),
                iterations=float(solution.iterations.double().mean()),
                error=float((solution.quantized - flat).square().mean()),
                perplexity=usage.perplexity,
            )
        )
