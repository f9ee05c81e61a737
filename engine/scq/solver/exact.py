"""Exact SCQ: a batched primal active set with a closed-form backward.

All latents advance together. Each keeps a feasible point on its own small support; one pass
solves the equality-constrained problem on every support (masked Cholesky, float64), then either
moves there and lets the most violated codes in ("pricing"), or moves to the first weight that
reaches zero and drops it. The objective falls at every move, so the method ends, and it ends
with a certificate: a full scan of the gradient finds no code worth adding.

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

from scq.solver.base import (
    SolverConfig,
    SolveResult,
    check_problem,
    gradient_scale,
    kkt_residual,
    nearest_code,
)
from scq.solver.fallback import solve_one

# Keeps the small systems definite at lam = 0; relative to the largest squared code norm.
RIDGE = 1e-11
# Violators let in per pricing pass: best of 1..12 at K=256, F=16 (93 ms for 2000 latents).
MAX_ENTERING = 2
# Latents solved together: bounds the memory of the small systems, a few hundred bytes per
# support pair and latent, and was the fastest of 256..4096 on one core.
CHUNK_LATENTS = 2048


class _Problem(NamedTuple):
    """Shared data in float64, moved so that the mean of the codes is the origin.

    codebook (K + 1, F) ends with a row of zeros, the pad code that fills unused support slots.
    gram (K + 1, K + 1) is C C^T + (lam + ridge) I + tau 1 1^T with zeros for the pad: on the
    simplex the tau term is a constant, but it makes any affinely independent support positive
    definite without help from lam.
    """

    codebook: Tensor
    gram: Tensor
    lam: float

    @property
    def pad(self) -> int:
        return self.codebook.shape[0] - 1


class _Batch(NamedTuple):
    """The latents still being solved; `rows` are their places in the caller's batch."""

    rows: Tensor
    latents: Tensor
    nearest: Tensor
    threshold: Tensor

    def take(self, rows: Tensor) -> _Batch:
        return _Batch(*(field[rows] for field in self))


class _Supports(NamedTuple):
    """Padded supports: the first size[i] slots of row i name codes, the rest the pad, weight 0."""

    indices: Tensor
    weights: Tensor
    size: Tensor

    def take(self, rows: Tensor) -> _Supports:
        size = self.size[rows]
        width = int(size.max()) if size.numel() else 0
        return _Supports(self.indices[rows, :width], self.weights[rows, :width], size)


def solve(latents: Tensor, codebook: Tensor, config: SolverConfig) -> SolveResult:
    """Solve (N, F) latents over a (K, F) codebook, both float32 or both float64.

    Differentiable in latents and codebook; the one-hot target is a constant.
    Raises InvalidLatents or InvalidCodebook.
    """
    check_problem(latents, codebook)
    parts = [
        _ExactAssignment.apply(chunk, codebook, config)  # type: ignore[no-untyped-call]
        for chunk in torch.split(latents, CHUNK_LATENTS)
    ]
    assignment, iterations, residual, fallbacks = (
        torch.cat(part) for part in zip(*parts, strict=True)
    )
    return SolveResult(
        assignment=assignment,
        support_size=(assignment.detach() > 0).sum(1),
        iterations=iterations,
        kkt_residual=residual,
        fallback_count=int(fallbacks.sum()),
    )


class _ExactAssignment(torch.autograd.Function):
    """Forward: the active set. Backward: implicit differentiation on the support."""

    @staticmethod
    def forward(
        ctx: Any, latents: Tensor, codebook: Tensor, config: SolverConfig
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        problem, centre = _prepare(codebook, config.lam)
        shifted = latents.double() - centre
        supports, iterations, fallbacks = _run(problem, shifted, config)
        dense = supports.weights.new_zeros(len(latents), problem.pad + 1)
        dense = dense.scatter_(1, supports.indices, supports.weights)[:, :-1]
        residual = kkt_residual(shifted, problem.codebook[:-1], dense, config.lam)
        ctx.save_for_backward(latents, codebook, supports.indices, supports.weights)
        ctx.lam = config.lam
        ctx.mark_non_differentiable(iterations, residual, fallbacks)
        return dense.to(latents.dtype), iterations, residual, fallbacks

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        """With g = dL/dp on the support S and M the projected inverse of C_S C_S^T + lam I:

        v = M g,  dL/dz = C_S^T v,  dL/dC_S = v (z - C^T p)^T - p (C_S^T v)^T.
        """
        latents, codebook, indices, weights = ctx.saved_tensors
        problem, centre = _prepare(codebook, ctx.lam)
        grad = torch.nn.functional.pad(grads[0].double(), (0, 1)).gather(1, indices)
        v = _solve_bordered(problem, indices, grad, total=0.0)
        codes = problem.codebook[indices]
        grad_latents = _combine(v, codes)
        residual = latents.double() - centre - _combine(weights, codes)
        grad_codes = v[:, :, None] * residual[:, None] - weights[:, :, None] * grad_latents[:, None]
        grad_codebook = torch.zeros_like(problem.codebook)
        grad_codebook.index_add_(0, indices.flatten(), grad_codes.flatten(0, 1))
        return grad_latents.to(latents.dtype), grad_codebook[:-1].to(codebook.dtype), None


def _prepare(codebook: Tensor, lam: float) -> tuple[_Problem, Tensor]:
    codes = codebook.detach().double()
    centre = codes.mean(0)
    codes = codes - centre
    scale = float(codes.square().sum(1).amax()) or 1.0
    gram = codes @ codes.T + scale
    gram.diagonal().add_(lam + RIDGE * scale)
    padded = torch.nn.functional.pad(codes, (0, 0, 0, 1))
    return _Problem(padded, torch.nn.functional.pad(gram, (0, 1, 0, 1)), lam), centre


def _run(
    problem: _Problem, latents: Tensor, config: SolverConfig
) -> tuple[_Supports, Tensor, Tensor]:
    batch, supports = _start(problem, latents, config)
    done = _Finished(problem, batch.nearest)
    for iteration in range(1, config.max_iterations + 1):
        linear = _linear_term(problem, batch, supports.indices)
        target = _solve_bordered(problem, supports.indices, linear, total=1.0)
        blocking = (target <= 0) & (supports.indices != problem.pad)
        inside = ~blocking.any(1)
        supports = _move(problem, supports, target, blocking)
        supports, optimal = _enter(problem, batch, supports, inside)
        if bool(optimal.any()):
            done.store(batch.rows[optimal], supports.take(optimal), iteration)
            rest = ~optimal
            batch, supports = batch.take(rest), supports.take(rest)
        if not batch.rows.numel():
            break
    fallbacks = torch.tensor([batch.rows.numel()], device=latents.device)
    _finish_slowly(problem, batch, config, done)
    return done.supports, done.iterations, fallbacks


def _start(problem: _Problem, latents: Tensor, config: SolverConfig) -> tuple[_Batch, _Supports]:
    codes = problem.codebook[:-1]
    nearest = nearest_code(latents, codes)
    scale = gradient_scale(latents, codes, config.lam)
    # A zero scale means that all codes coincide and lam = 0: every point is optimal.
    threshold = config.tolerance * scale.clamp(min=torch.finfo(torch.float64).tiny)
    rows = torch.arange(len(latents), device=latents.device)
    supports = _Supports(
        nearest[:, None], torch.ones_like(threshold)[:, None], torch.ones_like(nearest)
    )
    return _Batch(rows, latents, nearest, threshold), supports


def _combine(weights: Tensor, codes: Tensor) -> Tensor:
    """(n, W), (n, W, F) -> (n, F) weighted sums."""
    return torch.bmm(weights[:, None], codes).squeeze(1)


def _linear_term(problem: _Problem, batch: _Batch, indices: Tensor) -> Tensor:
    """(n, W) b = C_S z + lam e_j on the support, 0 in pad slots."""
    linear = torch.bmm(problem.codebook[indices], batch.latents[:, :, None]).squeeze(2)
    # .double(): lam times a bool tensor would be rounded to float32.
    return linear + problem.lam * (indices == batch.nearest[:, None]).double()


def _solve_bordered(problem: _Problem, indices: Tensor, linear: Tensor, total: float) -> Tensor:
    """Solve A q + nu 1 = linear, 1^T q = total on every support: q (n, W).

    Pad slots get an identity row, so they come out as exact zeros. A common part of `linear`
    only moves nu; it is removed first because for latents far away it dwarfs the differences.
    """
    used = (indices != problem.pad).double()
    linear = (linear - linear.sum(1, keepdim=True) / used.sum(1, keepdim=True)) * used
    pairs = (indices * len(problem.gram))[:, :, None] + indices[:, None, :]
    system = problem.gram.take(pairs)
    system.diagonal(dim1=1, dim2=2).add_(1 - used)
    factor, _ = torch.linalg.cholesky_ex(system)
    both = torch.cholesky_solve(torch.stack((linear, used), 2), factor)
    free, ones = both.unbind(2)
    nu = (free.sum(1) - total) / ones.sum(1)
    return free - nu[:, None] * ones


def _move(problem: _Problem, supports: _Supports, target: Tensor, blocking: Tensor) -> _Supports:
    """Go to the target, or as far towards it as all weights stay >= 0, dropping what reaches 0."""
    indices, weights, _ = supports
    room = torch.where(blocking, weights / (weights - target).clamp(min=1e-300), torch.inf)
    step = room.amin(1, keepdim=True)
    dropped = blocking & (room <= step)
    moved = torch.where(step < 1, weights + step * (target - weights), target)
    moved = moved.masked_fill(dropped, 0.0).clamp_(min=0.0)
    indices, order = indices.masked_fill(dropped, problem.pad).sort(1)
    return _Supports(indices, moved.gather(1, order), (indices != problem.pad).sum(1))


def _enter(
    problem: _Problem, batch: _Batch, supports: _Supports, inside: Tensor
) -> tuple[_Supports, Tensor]:
    """Price all codes for the rows at their support's optimum: let violators in, or finish."""
    optimal = torch.zeros_like(inside)
    at = inside.nonzero().squeeze(1)
    if not at.numel():
        return supports, optimal
    slack, codes = _price(problem, batch.take(at), supports.take(at))
    violated = slack < -batch.threshold[at, None]
    optimal[at] = ~violated[:, 0]
    return _append(problem, supports, at, codes.where(violated, problem.pad)), optimal


def _price(problem: _Problem, batch: _Batch, supports: _Supports) -> tuple[Tensor, Tensor]:
    """The smallest g_k - mu over codes outside the support, ascending, and their k."""
    indices, weights, _ = supports
    point = _combine(weights, problem.codebook[indices])
    error = point - batch.latents
    gradient = error @ problem.codebook.T
    rows = torch.arange(len(gradient), device=gradient.device)
    gradient[rows, batch.nearest] -= problem.lam
    gradient[:, problem.pad] = torch.inf
    gradient.scatter_(1, indices, torch.inf)
    pull = problem.lam * (weights.square() - weights * (indices == batch.nearest[:, None])).sum(1)
    mu = (error * point).sum(1) + pull
    smallest, codes = torch.topk(gradient, min(MAX_ENTERING, problem.pad), dim=1, largest=False)
    return smallest - mu[:, None], codes


def _append(problem: _Problem, supports: _Supports, at: Tensor, entering: Tensor) -> _Supports:
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
    return _Supports(indices[:, :width], weights[:, :width], size)


class _Finished:
    """Collects the supports of solved latents in the caller's order."""

    def __init__(self, problem: _Problem, nearest: Tensor) -> None:
        self._pad = problem.pad
        ones = torch.ones_like(nearest)
        self.supports = _Supports(nearest[:, None], ones[:, None].double(), ones)
        self.iterations = torch.zeros_like(nearest)

    def store(self, rows: Tensor, supports: _Supports, iteration: int) -> None:
        width = supports.indices.shape[1]
        grow = max(0, width - self.supports.indices.shape[1])
        indices = torch.nn.functional.pad(self.supports.indices, (0, grow), value=self._pad)
        weights = torch.nn.functional.pad(self.supports.weights, (0, grow))
        indices[rows, :width] = supports.indices
        weights[rows, :width] = supports.weights
        self.supports.size[rows] = supports.size
        self.supports = _Supports(indices, weights, self.supports.size)
        self.iterations[rows] = iteration


def _finish_slowly(problem: _Problem, batch: _Batch, config: SolverConfig, done: _Finished) -> None:
    """Latents that ran out of iterations: one at a time, dense, by `fallback.solve_one`."""
    gram = problem.gram[:-1, :-1]
    for i in range(batch.rows.numel()):
        row = batch.take(torch.tensor([i], device=batch.rows.device))
        linear = problem.codebook[:-1] @ row.latents[0]
        linear[row.nearest] += problem.lam
        weights = solve_one(gram, linear, int(row.nearest), float(row.threshold))
        indices = weights.nonzero().T
        size = torch.tensor([indices.shape[1]], device=weights.device)
        done.store(row.rows, _Supports(indices, weights[indices], size), config.max_iterations)
