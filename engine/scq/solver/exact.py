"""Exact SCQ: a batched, screened primal active set with a closed-form backward.

All latents advance together. Each keeps a feasible point on its own small support; one pass
solves the equality-constrained problem on every support (masked Cholesky, float64), then either
moves there and lets the most violated codes in ("pricing"), or moves to the first weight that
reaches zero and drops it. The objective falls at every move, so the method ends, and it ends
with a certificate: a full scan of the gradient finds no code worth adding.

With many codes, passes price only each latent's own candidates, kept from the last full scan; a
scan follows when they are exhausted, and what it finds starts another round (rarely a third).

Letting several violators in at once is safe: if p is optimal on its support and q optimal on the
enlarged one, then sum over new k of (g_k - mu) q_k < 0 with every g_k < mu, so at least one new
weight is positive; the others sit at zero and are dropped together without moving.

Must not know about images, lattices or bytes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from scq.solver import pricing
from scq.solver.assignment import SparseAssignment
from scq.solver.base import SolverConfig, SolveResult, check_problem, gradient_scale
from scq.solver.fallback import solve_one
from scq.solver.pricing import Candidates, Gradient, Scan
from scq.solver.problem import (
    Problem,
    Supports,
    combine,
    linear_term,
    prepare,
    project,
    solve_bordered,
)

# Latents solved together: bounds the memory of the small systems, a few hundred bytes per
# support pair and latent, and was the fastest of 256..4096 on one core.
CHUNK_LATENTS = 2048
# Numbers in the largest temporary of a chunk, (n, K) scores or (n, M, F) candidates: 64 MiB.
CHUNK_BUDGET = 1 << 24
# A pass lets in at most this share of the support, so that wide supports (ridge) grow quickly.
ENTERING_SHARE = 4


def solve(
    latents: Tensor, codebook: Tensor, config: SolverConfig, initial: Tensor | None = None
) -> SolveResult:
    """Solve (N, F) latents over a (K, F) codebook, both float32 or both float64.

    Differentiable in latents and codebook; the one-hot target is a constant. No (N, K) array is
    made beyond one chunk's. Raises InvalidLatents or InvalidCodebook.
    """
    check_problem(latents, codebook, initial)
    weights, quantized, *solved = _ExactAssignment.apply(  # type: ignore[no-untyped-call]
        latents, codebook, config, initial
    )
    indices, size, iterations, residual, fallbacks = solved
    return SolveResult(
        quantized=quantized,
        sparse=SparseAssignment(indices, weights, len(codebook)),
        support_size=size,
        iterations=iterations,
        kkt_residual=residual,
        fallback_count=int(fallbacks),
    )


class _ExactAssignment(torch.autograd.Function):
    """Forward: the active set. Backward: implicit differentiation on the support."""

    @staticmethod
    def forward(
        ctx: Any, latents: Tensor, codebook: Tensor, config: SolverConfig, initial: Tensor | None
    ) -> tuple[Tensor, ...]:
        problem, centre = prepare(codebook, config)
        shifted = latents.detach().double() - centre
        with torch.autocast(latents.device.type, enabled=False):
            solved = _solve_chunks(problem, shifted, config, initial)
        ctx.save_for_backward(latents, codebook, solved.indices, solved.weights)
        ctx.problem, ctx.centre = problem, centre
        ctx.set_materialize_grads(False)
        unused = solved.indices == problem.pad
        indices = solved.indices.where(~unused, solved.indices[:, :1])
        size = (solved.weights > 0).sum(1)
        outputs = (indices, size, solved.iterations, solved.residual, solved.exhausted.sum())
        ctx.mark_non_differentiable(*outputs)
        quantized = solved.quantized + centre
        return solved.weights.to(latents.dtype), quantized.to(latents.dtype), *outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        latents, codebook, indices, weights = ctx.saved_tensors
        grad_weights, grad_quantized = grads[0], grads[1]
        grad_codebook = torch.zeros_like(ctx.problem.codebook)
        parts = []
        everyone = torch.arange(len(latents), device=latents.device)
        for rows in torch.split(everyone, _chunk_latents(ctx.problem)):
            slope = _Slope(
                None if grad_weights is None else grad_weights[rows].double(),
                None if grad_quantized is None else grad_quantized[rows].double(),
            )
            supports = indices[rows], weights[rows]
            shifted = latents[rows].double() - ctx.centre
            parts.append(_backward_chunk(ctx.problem, shifted, supports, slope, grad_codebook))
        grad_latents = torch.cat(parts).to(latents.dtype)
        return grad_latents, grad_codebook[:-1].to(codebook.dtype), None, None


class _Slope(NamedTuple):
    """What arrives from above: dL/dp (n, W) and dL/dz_q (n, F), either may be missing."""

    weights: Tensor | None
    quantized: Tensor | None


def _backward_chunk(
    problem: Problem,
    latents: Tensor,
    supports: tuple[Tensor, Tensor],
    slope: _Slope,
    grad_codebook: Tensor,
) -> Tensor:
    """Adds to grad_codebook (K + 1, F) and returns dL/dz (n, F).

    With u = dL/dz_q, g = dL/dp + C_S u on the support S, and M the projected inverse of
    C_S C_S^T + lam I:  v = M g,  dL/dz = C_S^T v,
    dL/dC_S = v (z - C^T p)^T + p (u - C_S^T v)^T.
    """
    indices, weights = supports
    codes = problem.codebook[indices]
    direct = latents.new_zeros(()) if slope.quantized is None else slope.quantized
    grad = torch.zeros_like(weights) if slope.weights is None else slope.weights
    if slope.quantized is not None:
        grad = grad + project(codes, slope.quantized)
    v = solve_bordered(problem, indices, grad, total=0.0)
    grad_latents = combine(v, codes)
    residual = latents - combine(weights, codes)
    straight = (direct - grad_latents)[:, None]
    grad_codes = v[:, :, None] * residual[:, None] + weights[:, :, None] * straight
    grad_codebook.index_add_(0, indices.flatten(), grad_codes.flatten(0, 1))
    return grad_latents


class _Solved(NamedTuple):
    """A solved batch: supports padded with the pad code, the rest per latent.

    exhausted (n,) bool: latents that `fallback` had to solve.
    """

    indices: Tensor
    weights: Tensor
    quantized: Tensor
    iterations: Tensor
    residual: Tensor
    exhausted: Tensor


def _chunk_latents(problem: Problem) -> int:
    codes, dim = problem.codebook.shape
    per_latent = max(codes, pricing.CANDIDATES * dim)
    return max(1, min(CHUNK_LATENTS, CHUNK_BUDGET // per_latent))


def _solve_chunks(
    problem: Problem, latents: Tensor, config: SolverConfig, initial: Tensor | None
) -> _Solved:
    scan = pricing.make_scan(problem)
    size = _chunk_latents(problem)
    starts = [None] * len(latents) if initial is None else torch.split(initial, size)
    chunks = [
        _Chunk(problem, scan, config, part).solve(start)
        for part, start in zip(torch.split(latents, size), starts, strict=False)
    ]
    width = max(chunk.indices.shape[1] for chunk in chunks)
    padded = [
        chunk._replace(
            indices=_widen(chunk.indices, width, problem.pad),
            weights=_widen(chunk.weights, width, 0),
        )
        for chunk in chunks
    ]
    fields = [torch.cat(field) for field in zip(*padded, strict=True)]
    return _Solved(*fields)


def _widen(slots: Tensor, width: int, value: int) -> Tensor:
    return torch.nn.functional.pad(slots, (0, max(0, width - slots.shape[1])), value=value)


class _Batch(NamedTuple):
    """The latents still being solved; `rows` are their places in the chunk."""

    rows: Tensor
    latents: Tensor
    nearest: Tensor
    threshold: Tensor

    def take(self, rows: Tensor) -> _Batch:
        return _Batch(*(field[rows] for field in self))


class _Chunk:
    """One chunk on its way: the problem, and in the chunk's order what is known so far."""

    def __init__(
        self, problem: Problem, scan: Scan | None, config: SolverConfig, latents: Tensor
    ) -> None:
        self.problem, self.scan, self.config, self.latents = problem, scan, config, latents
        rows = torch.arange(len(latents), device=latents.device)
        self.supports = Supports(
            rows.new_full((len(rows), 1), problem.pad),
            latents.new_zeros(len(rows), 1),
            torch.zeros_like(rows),
        )
        self.iterations = torch.zeros_like(rows)
        self.residual = latents.new_zeros(len(rows))
        self.exhausted = torch.zeros_like(rows, dtype=torch.bool)

    def solve(self, initial: Tensor | None) -> _Solved:
        batch, candidates = self._batch()
        supports = _start(self.problem, batch, initial)
        left = self.config.max_iterations
        while batch.rows.numel():
            left -= self._descend(batch, supports, candidates, left)
            gradient, candidates = self._certify(batch)
            self.residual[batch.rows] = gradient.residual
            failed = self.exhausted[batch.rows]
            rest = (~failed & ~(gradient.slack[:, 0] >= -batch.threshold)).nonzero().squeeze(1)
            gradient = Gradient(*(field[rest] for field in gradient))
            batch = batch.take(rest)
            candidates = None if candidates is None else candidates.take(rest)
            supports = self._let_in(batch, self.supports.take(batch.rows), gradient)
        self._finish_slowly()
        codes = self.problem.codebook[self.supports.indices]
        return _Solved(
            self.supports.indices,
            self.supports.weights,
            combine(self.supports.weights, codes),
            self.iterations,
            self.residual,
            self.exhausted,
        )

    def _batch(self) -> tuple[_Batch, Candidates | None]:
        candidates = None
        if self.scan is None:
            nearest = pricing.nearest(self.problem, self.latents)
        else:
            nearest, indices = pricing.nearest_candidates(self.problem, self.scan, self.latents)
            candidates = pricing.gather_candidates(self.scan, indices)
        scale = gradient_scale(self.latents, self.problem.codes, self.config.lam)
        # A zero scale means that all codes coincide and lam = 0: every point is optimal.
        threshold = self.config.tolerance * scale.clamp(min=torch.finfo(torch.float64).tiny)
        rows = torch.arange(len(nearest), device=nearest.device)
        self.nearest, self.threshold = nearest, threshold
        return _Batch(rows, self.latents, nearest, threshold), candidates

    def _descend(
        self, batch: _Batch, supports: Supports, candidates: Candidates | None, passes: int
    ) -> int:
        """To every latent's optimum over its candidates (None: all codes); passes made."""
        made = 0
        while made < passes and batch.rows.numel():
            made += 1
            target = self._target(batch, supports)
            failed = target.isnan().any(1)
            self.exhausted[batch.rows[failed]] = True
            blocking = (target <= 0) & (supports.indices != self.problem.pad)
            inside = ~blocking.any(1) & ~failed
            supports = _move(self.problem, supports, target.nan_to_num(0.0), blocking)
            supports, optimal = self._enter(batch, supports, candidates, inside)
            ended = optimal | failed
            if bool(ended.any()):
                self._store(batch.rows[ended], supports.take(ended), made)
                rest = (~ended).nonzero().squeeze(1)
                batch, supports = batch.take(rest), supports.take(rest)
                candidates = None if candidates is None else candidates.take(rest)
        self._store(batch.rows, supports, made)
        self.exhausted[batch.rows] = True
        return made

    def _target(self, batch: _Batch, supports: Supports) -> Tensor:
        linear = linear_term(self.problem, supports.indices, batch.latents, batch.nearest)
        return solve_bordered(self.problem, supports.indices, linear, total=1.0)

    def _enter(
        self, batch: _Batch, supports: Supports, candidates: Candidates | None, inside: Tensor
    ) -> tuple[Supports, Tensor]:
        """Price the rows at their support's optimum: let violators in, or call them optimal."""
        optimal = torch.zeros_like(inside)
        at = inside.nonzero().squeeze(1)
        if not at.numel():
            return supports, optimal
        here, where = batch.take(at), supports.take(at)
        if candidates is None:
            count = max(pricing.ENTERING, where.indices.shape[1] // ENTERING_SHARE)
            gradient = pricing.price(self.problem, here.latents, here.nearest, where, count)
        else:
            gradient = pricing.price_candidates(
                self.problem, candidates.take(at), here.latents, here.nearest, where
            )
        violated = gradient.slack < -here.threshold[:, None]
        optimal[at] = ~violated[:, 0]
        return _append(
            self.problem, supports, at, gradient.codes.where(violated, self.problem.pad)
        ), optimal

    def _certify(self, batch: _Batch) -> tuple[Gradient, Candidates | None]:
        """Price all codes at the stored supports; with a scan, also the candidates it kept."""
        supports = self.supports.take(batch.rows)
        if self.scan is None:
            return pricing.price(
                self.problem, batch.latents, batch.nearest, supports, pricing.ENTERING
            ), None
        gradient, indices = pricing.price_screened(
            self.problem, self.scan, batch.latents, batch.nearest, supports
        )
        return gradient, pricing.gather_candidates(self.scan, indices)

    def _let_in(self, batch: _Batch, supports: Supports, gradient: Gradient) -> Supports:
        if not batch.rows.numel():
            return supports
        entering = gradient.codes[:, : pricing.ENTERING]
        violated = gradient.slack[:, : pricing.ENTERING] < -batch.threshold[:, None]
        everyone = torch.arange(len(entering), device=entering.device)
        return _append(self.problem, supports, everyone, entering.where(violated, self.problem.pad))

    def _store(self, rows: Tensor, supports: Supports, passes: int) -> None:
        width = max(supports.indices.shape[1], self.supports.indices.shape[1])
        indices = _widen(self.supports.indices, width, self.problem.pad)
        weights = _widen(self.supports.weights, width, 0)
        indices[rows] = _widen(supports.indices, width, self.problem.pad)
        weights[rows] = _widen(supports.weights, width, 0)
        self.supports.size[rows] = supports.size
        self.supports = Supports(indices, weights, self.supports.size)
        self.iterations[rows] += passes

    def _finish_slowly(self) -> None:
        """Latents that the passes did not finish: one at a time, by `fallback.solve_one`."""
        for row in self.exhausted.nonzero().flatten().tolist():
            weights = solve_one(
                self.problem, self.latents[row], int(self.nearest[row]), float(self.threshold[row])
            )
            indices = weights.nonzero().T
            size = torch.tensor([indices.shape[1]], device=weights.device)
            rows = torch.tensor([row], device=weights.device)
            self._store(rows, Supports(indices, weights[indices], size), 0)
            batch = _Batch(rows, self.latents[rows], self.nearest[rows], self.threshold[rows])
            self.residual[rows] = self._certify(batch)[0].residual


def _start(problem: Problem, batch: _Batch, initial: Tensor | None) -> Supports:
    """The nearest code, or the given codes that keep a positive weight when solved together."""
    if initial is None or initial.shape[1] == 0:
        ones = torch.ones_like(batch.threshold)[:, None]
        return Supports(batch.nearest[:, None], ones, torch.ones_like(batch.nearest))
    indices = _distinct(initial.masked_fill(initial < 0, problem.pad), problem.pad)
    empty = indices[:, 0] == problem.pad
    indices[:, 0] = batch.nearest.where(empty, indices[:, 0])
    while True:
        linear = linear_term(problem, indices, batch.latents, batch.nearest)
        target = solve_bordered(problem, indices, linear, total=1.0)
        unsolved = target.isnan().any(1)
        dropped = (target <= 0) & (indices != problem.pad)
        # A dependent set is no start: fall back to the nearest code alone.
        dropped[unsolved] = True
        if not bool(dropped.any()):
            size = (indices != problem.pad).sum(1)
            return Supports(indices, target, size)
        indices = indices.masked_fill(dropped, problem.pad).sort(1).values
        indices[:, 0] = batch.nearest.where(unsolved, indices[:, 0])


def _distinct(indices: Tensor, pad: int) -> Tensor:
    indices = indices.sort(1).values
    repeated = torch.zeros_like(indices, dtype=torch.bool)
    repeated[:, 1:] = indices[:, 1:] == indices[:, :-1]
    return indices.masked_fill(repeated, pad).sort(1).values


def _move(problem: Problem, supports: Supports, target: Tensor, blocking: Tensor) -> Supports:
    """Go to the target, or as far towards it as all weights stay >= 0, dropping what reaches 0."""
    indices, weights, _ = supports
    room = torch.where(blocking, weights / (weights - target).clamp(min=1e-300), torch.inf)
    step = room.amin(1, keepdim=True)
    dropped = blocking & (room <= step)
    moved = torch.where(step < 1, weights + step * (target - weights), target)
    moved = moved.masked_fill(dropped, 0.0).clamp_(min=0.0)
    indices, order = indices.masked_fill(dropped, problem.pad).sort(1)
    return Supports(indices, moved.gather(1, order), (indices != problem.pad).sum(1))


def _append(problem: Problem, supports: Supports, at: Tensor, entering: Tensor) -> Supports:
    """Give rows `at` new slots of weight 0 for the codes `entering` (n, m), pads last."""
    size = supports.size.clone()
    first = size[at]
    size[at] += (entering != problem.pad).sum(1)
    width = int(size.max())
    grow = max(0, int(first.max()) + entering.shape[1] - supports.indices.shape[1])
    indices = torch.nn.functional.pad(supports.indices, (0, grow), value=problem.pad)
    weights = torch.nn.functional.pad(supports.weights, (0, grow))
    slots = first[:, None] + torch.arange(entering.shape[1], device=at.device)
    indices[at[:, None], slots] = entering
    return Supports(indices[:, :width], weights[:, :width], size)
