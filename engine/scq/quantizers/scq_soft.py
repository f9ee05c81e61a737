"""SCQ with real weights, as the paper has it: solved exactly, or by the paper's relaxation.

Gautam et al., L4DC 2024. Real weights are no code, so `encode` makes one of them for honest byte
counts: the heaviest codes (at most 32 or F + 1), weights rounded to multiples of 1/weight_steps.
That is many bits; scq_sparse is the method meant for coding. Decoded symbols therefore differ a
little from what `forward` returns.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from scq.errors import CorruptCodes
from scq.metrics import CodebookUsage
from scq.quantizers.base import CHUNK_LATENTS, QuantizerConfig
from scq.quantizers.codebook import CodebookQuantizer
from scq.quantizers.coding import Bools, Ints
from scq.solver import SolverConfig, SparseAssignment, solve

# An exact vertex needs F + 1 codes, lam > 0 spreads it over a few more.
_MIN_SLOTS = 32


class SoftConvexQuantizer(CodebookQuantizer):
    """Every latent becomes a convex combination of codes; gradients go through the solution."""

    def __init__(self, config: QuantizerConfig, solver: str) -> None:
        super().__init__(config)
        self.solver = solver
        self.solver_config = SolverConfig(lam=config.lam, sweeps=config.sweeps)
        self.max_codes = min(
            max(config.code_dim + 1, _MIN_SLOTS), config.num_codes, config.weight_steps
        )

    @property
    def alphabets(self) -> tuple[int, ...]:
        """Support size less one; indices, heaviest first; weight numerators less one, less one."""
        indices = (self.config.num_codes,) * self.max_codes
        weights = (self.config.weight_steps,) * (self.max_codes - 1)
        return (self.max_codes, *indices, *weights)

    def encode(self, latents: Tensor) -> Tensor:
        """(N, F) -> (N, 2 m) symbols, m = `max_codes`."""
        self.check_latents(latents)
        codebook = self.codebook.detach().to(latents.dtype)
        parts = []
        for chunk in torch.split(latents.detach(), CHUNK_LATENTS):
            solution = solve(chunk, codebook, self.solver_config, solver=self.solver)
            parts.append(self._symbols(solution.sparse))
        return torch.cat(parts)

    def decode(self, symbols: Tensor) -> Tensor:
        """(N, 2 m) -> (N, F), differentiable in the codebook. Raises CorruptCodes."""
        indices, numerators = self._codes(symbols)
        weights = numerators.to(self.codebook.dtype) / self.config.weight_steps
        return (weights.unsqueeze(2) * self.codebook[indices]).sum(dim=1)

    def usage(self, symbols: Tensor) -> CodebookUsage:
        """Uses of the codes, by heaviest code and by weight."""
        indices, numerators = self._codes(symbols)
        usage = CodebookUsage(self.config.num_codes)
        usage.add(indices, numerators / self.config.weight_steps)
        return usage

    def _quantize(self, latents: Tensor, pictures: int) -> tuple[Tensor, Tensor, Tensor]:
        self._begin_step(latents)
        codebook = self.codebook.to(latents.dtype)
        solution = solve(latents, codebook, self.solver_config, solver=self.solver)
        symbols = self._symbols(solution.sparse)
        used = solution.sparse.detach()
        # By weight: far codes take tiny weights of many latents and are dead all the same.
        self._count(used.indices, used.weights.clamp(min=0))
        # One term without stop-gradients: both sides get their true gradient here.
        loss = self.config.commitment * functional.mse_loss(solution.quantized, latents)
        return solution.quantized, loss, symbols

    def _symbols(self, sparse: SparseAssignment) -> Tensor:
        steps = self.config.weight_steps
        width = min(self.max_codes, sparse.weights.shape[1])
        weights, order = sparse.weights.detach().double().clamp(min=0).topk(width, dim=1)
        indices = sparse.indices.gather(1, order)
        numerators, order = _round_to(weights, steps).sort(dim=1, descending=True, stable=True)
        indices = torch.where(numerators > 0, indices.gather(1, order), 0)
        symbols = indices.new_zeros(len(indices), 2 * self.max_codes)
        symbols[:, 0] = (numerators > 0).sum(dim=1) - 1
        symbols[:, 1 : 1 + width] = indices
        first = 1 + self.max_codes
        coded = torch.arange(width - 1, device=symbols.device) < symbols[:, :1]
        symbols[:, first : first + width - 1] = torch.where(coded, numerators[:, :-1] - 1, 0)
        return symbols

    def _codes(self, symbols: Tensor) -> tuple[Tensor, Tensor]:
        """(N, m) indices and (N, m) numerators of the symbols."""
        self.check_symbols(symbols)
        first = 1 + self.max_codes
        position = torch.arange(self.max_codes, device=symbols.device)
        last = symbols[:, :1]
        numerators = functional.pad(symbols[:, first:] + 1, (0, 1))
        numerators = torch.where(position < last, numerators, 0)
        rest = self.config.weight_steps - numerators.sum(dim=1, keepdim=True)
        if bool((rest < 1).any()):
            raise CorruptCodes(
                f"weights of a latent exceed {self.config.weight_steps} steps without the last"
            )
        return symbols[:, 1:first], torch.where(position == last, rest, numerators)

    def _coded(self, position: int, symbols: Ints) -> Bools:
        if position == 0:
            return np.ones(len(symbols), np.bool_)
        if position <= self.max_codes:
            present: Bools = symbols[:, 0] >= position - 1
        else:
            present = symbols[:, 0] > position - self.max_codes - 1
        return present


class ExactConvexQuantizer(SoftConvexQuantizer):
    """The paper's problem, solved exactly."""

    def __init__(self, config: QuantizerConfig) -> None:
        super().__init__(config, "auto")


class RelaxedConvexQuantizer(SoftConvexQuantizer):
    """The paper's scalable relaxation: a ridge solution brought to the simplex in sweeps."""

    def __init__(self, config: QuantizerConfig) -> None:
        super().__init__(config, "relaxed")


def _round_to(weights: Tensor, steps: int) -> Tensor:
    """(N, m) weights >= 0 -> integers summing to `steps`, by largest remainder."""
    scaled = weights * (steps / weights.sum(dim=1, keepdim=True))
    whole = scaled.floor()
    missing = (steps - whole.sum(dim=1, keepdim=True)).long()
    places = (scaled - whole).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return whole.long() + (places < missing)
