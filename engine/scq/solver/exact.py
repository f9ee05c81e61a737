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
    SolveResult,
    SolverConfig,
    check_problem,
    gradient_scale,
    kkt_residual,
    nearest_code,
)
from scq.solver.fallback import solve_one

# Keeps the small systems definite at lam = 0; relative to the largest squared code norm.
RIDGE = 1e-11
# Violators let in per pricing pass (see _enter): measured best of 1..8 at K=256, F=16.
MAX_ENTERING = 4


class _Problem(NamedTuple):
    """Shared data in float64, moved so that the mean of the codes is the origin.

    gram (K, K) is C C^T + (lam + ridge) I + tau 1 1^T: on the simplex the tau term is a constant,
    but it makes any affinely independent support positive definite without help from lam.
    """

    codebook: Tensor
    gram: Tensor
    lam: float


class _Batch(NamedTuple):
    """The latents still being solved; `rows` are their places in the caller's batch."""

    rows: Tensor
    latents: Tensor
    nearest: Tensor
    threshold: Tensor

    def take(self, rows: Tensor) -> _Batch:
        return _Batch(*(field[rows] for field in self))


class _Supports(NamedTuple):
    """Padded supports: the first size[i] slots of row i are in use, the rest weigh 0."""

    indices: Tensor
    weights: Tensor
    size: Tensor

    def mask(self) -> Tensor:
        slots = torch.arange(self.indices.shape[1], device=self.indices.device)
        return slots < self.size[:, None]

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
    assignment, iterations, residual, fallbacks = _ExactAssignment.apply(latents, codebook, config)
    return SolveResult(
        assignment=assignment,
        support_size=(assignment.detach() > 0).sum(1),
        iterations=iterations,
        kkt_residual=residual,
        fallback_count=int(fallbacks),
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
        assignment = _densify(supports, codebook.shape[0])
        residual = kkt_residual(shifted, problem.codebook, assignment, config.lam)
        assignment = assignment.to(latents.dtype)
        ctx.save_for_backward(latents, codebook, supports.indices, supports.weights, supports.size)
        ctx.lam = config.lam
        ctx.mark_non_differentiable(iterations, residual, fallbacks)
        return assignment, iterations, residual, fallbacks

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        """With g = dL/dp on the support S and M the projected inverse of C_S C_S^T + lam I:

        v = M g,  dL/dz = C_S^T v,  dL/dC_S = v (z - C^T p)^T - p (C_S^T v)^T.
        """
        latents, codebook, indices, weights, size = ctx.saved_tensors
        supports = _Supports(indices, weights, size)
        problem, _ = _prepare(codebook, ctx.lam)
        grad = torch.gather(grads[0].double(), 1, indices) * supports.mask()
        v, _ = _solve_bordered(problem, supports, grad, total=0.0)
        codes = codebook.double()[indices]
        grad_latents = torch.einsum("nw,nwf->nf", v, codes)
        residual = latents.double() - torch.einsum("nw,nwf->nf", weights, codes)
        grad_codes = v[:, :, None] * residual[:, None] - weights[:, :, None] * grad_latents[:, None]
        grad_codebook = torch.zeros_like(codebook, dtype=torch.float64)
        grad_codebook.index_add_(0, indices.flatten(), grad_codes.flatten(0, 1))
        return grad_latents.to(latents.dtype), grad_codebook.to(codebook.dtype), None


def _prepare(codebook: Tensor, lam: float) -> tuple[_Problem, Tensor]:
    codes = codebook.detach().double()
    centre = codes.mean(0)
    codes = codes - centre
    scale = float(codes.square().sum(1).amax())
    gram = codes @ codes.T + (scale if scale > 0 else 1.0)
    gram.diagonal().add_(lam + RIDGE * (scale if scale > 0 else 1.0))
    return _Problem(codes, gram, lam), centre


def _run(
    problem: _Problem, latents: Tensor, config: SolverConfig
) -> tuple[_Supports, Tensor, Tensor]:
    batch, supports = _start(problem, latents, config)
    done = _Finished(batch.nearest)
    for iteration in range(1, config.max_iterations + 1):
        target, _ = _solve_bordered(problem, supports, _linear_term(problem, batch, supports), 1.0)
        inside = ((target > 0) | ~supports.mask()).all(1)
        supports = _move(supports, target, inside)
        supports, optimal = _enter(problem, batch, supports, inside)
        if bool(optimal.any()):
            done.store(batch.rows[optimal], supports.take(optimal), iteration)
            rest = ~optimal
            batch, supports = batch.take(rest), supports.take(rest)
        if not batch.rows.numel():
            break
    fallbacks = latents.new_tensor(batch.rows.numel(), dtype=torch.int64)
    _finish_slowly(problem, batch, config, done)
    return done.supports(), done.iterations, fallbacks


def _start(problem: _Problem, latents: Tensor, config: SolverConfig) -> tuple[_Batch, _Supports]:
    nearest = nearest_code(latents, problem.codebook)
    scale = gradient_scale(latents, problem.codebook, config.lam)
    # A zero scale means K identical codes met by the latent and lam = 0: nothing to improve.
    threshold = config.tolerance * scale.clamp(min=torch.finfo(torch.float64).tiny)
    rows = torch.arange(latents.shape[0], device=latents.device)
    weights = torch.ones_like(threshold)[:, None]
    supports = _Supports(nearest[:, None], weights, torch.ones_like(nearest))
    return _Batch(rows, latents, nearest, threshold), supports


def _linear_term(problem: _Problem, batch: _Batch, supports: _Supports) -> Tensor:
    """(n, W) b = C_S z + lam e_j on the support, 0 in unused slots."""
    codes = problem.codebook[supports.indices]
    linear = torch.einsum("nwf,nf->nw", codes, batch.latents)
    linear += problem.lam * (supports.indices == batch.nearest[:, None])
    return linear * supports.mask()


def _solve_bordered(
    problem: _Problem, supports: _Supports, linear: Tensor, total: float
) -> tuple[Tensor, Tensor]:
    """Solve A q + nu 1 = linear, 1^T q = total on every support: q (n, W) and nu (n,).

    Unused slots become identity rows, so they come out as exact zeros.
    """
    mask = supports.mask()
    indices = supports.indices
    used = mask.double()
    system = problem.gram[indices[:, :, None], indices[:, None, :]]
    system = system * (used[:, :, None] * used[:, None, :]) + torch.diag_embed(1 - used)
    factor, _ = torch.linalg.cholesky_ex(system)
    both = torch.cholesky_solve(torch.stack((linear, used), 2), factor)
    free, ones = both.unbind(2)
    nu = (free.sum(1) - total) / ones.sum(1)
    return free - nu[:, None] * ones, nu


def _move(supports: _Supports, target: Tensor, inside: Tensor) -> _Supports:
    """Go to the target, or as far towards it as the weights stay >= 0; drop what reaches 0."""
    indices, weights, _ = supports
    mask = supports.mask()
    blocking = mask & (target <= 0)
    room = torch.where(blocking, weights / (weights - target).clamp(min=1e-300), torch.inf)
    step = room.amin(1, keepdim=True).clamp(max=1.0)
    moved = torch.where(inside[:, None], target, weights + step * (target - weights))
    keep = mask & ~(blocking & (room <= step))
    moved = torch.where(keep, moved.clamp(min=0), 0.0)
    if bool(inside.all()):
        return _Supports(indices, moved, supports.size)
    order = torch.argsort((~keep).to(torch.int8), dim=1, stable=True)
    return _Supports(indices.gather(1, order), moved.gather(1, order), keep.sum(1))


def _enter(
    problem: _Problem, batch: _Batch, supports: _Supports, inside: Tensor
) -> tuple[_Supports, Tensor]:
    """Price all codes for the rows at their support's optimum: let violators in, or finish."""
    optimal = torch.zeros_like(inside)
    at = inside.nonzero().squeeze(1)
    if not at.numel():
        return supports, optimal
    count = min(MAX_ENTERING, problem.codebook.shape[0])
    slack, codes = _price(problem, batch.take(at), supports.take(at), count)
    violated = slack < -batch.threshold[at, None]
    optimal[at] = ~violated[:, 0]
    return _append(supports, at, codes, violated), optimal


def _price(
    problem: _Problem, batch: _Batch, supports: _Supports, count: int
) -> tuple[Tensor, Tensor]:
    """The `count` smallest g_k - mu over codes outside the support, ascending, and their k."""
    indices, weights, _ = supports
    point = torch.einsum("nw,nwf->nf", weights, problem.codebook[indices])
    error = batch.latents - point
    gradient = error @ -problem.codebook.T
    on_nearest = indices == batch.nearest[:, None]
    pull = problem.lam * (weights.square() - weights * on_nearest).sum(1)
    mu = pull - (error * point).sum(1)
    bonus = gradient.new_full((len(mu), 1), -problem.lam)
    gradient.scatter_add_(1, batch.nearest[:, None], bonus)
    used = torch.where(supports.mask(), indices, indices[:, :1])
    gradient.scatter_(1, used, torch.inf)
    smallest, codes = torch.topk(gradient, count, dim=1, largest=False)
    return smallest - mu[:, None], codes


def _append(supports: _Supports, at: Tensor, codes: Tensor, entering: Tensor) -> _Supports:
    """Give rows `at` new slots of weight 0 for those `codes` that are marked as entering."""
    added = entering.sum(1)
    size = supports.size.clone()
    size[at] += added
    width = int(size.max())
    grow = max(0, width - supports.indices.shape[1])
    indices = torch.nn.functional.pad(supports.indices, (0, grow))
    weights = torch.nn.functional.pad(supports.weights, (0, grow))
    row, slot = entering.nonzero(as_tuple=True)
    indices[at[row], supports.size[at][row] + slot] = codes[row, slot]
    weights[at[row], supports.size[at][row] + slot] = 0.0
    return _Supports(indices[:, :width], weights[:, :width], size)


class _Finished:
    """Collects the supports of solved latents in the caller's order."""

    def __init__(self, nearest: Tensor) -> None:
        self._indices = nearest[:, None]
        self._weights = torch.ones_like(self._indices, dtype=torch.float64)
        self._size = torch.ones_like(nearest)
        self.iterations = torch.zeros_like(nearest)

    def store(self, rows: Tensor, supports: _Supports, iteration: int) -> None:
        grow = max(0, supports.indices.shape[1] - self._indices.shape[1])
        self._indices = torch.nn.functional.pad(self._indices, (0, grow))
        self._weights = torch.nn.functional.pad(self._weights, (0, grow))
        width = supports.indices.shape[1]
        self._indices[rows, :width] = supports.indices
        self._weights[rows, :width] = supports.weights * supports.mask()
        self._size[rows] = supports.size
        self.iterations[rows] = iteration

    def supports(self) -> _Supports:
        return _Supports(self._indices, self._weights, self._size)


def _finish_slowly(problem: _Problem, batch: _Batch, config: SolverConfig, done: _Finished) -> None:
    """Latents that ran out of iterations: one at a time, dense, by `fallback.solve_one`."""
    for i in range(batch.rows.numel()):
        row = batch.take(torch.tensor([i], device=batch.rows.device))
        linear = problem.codebook @ row.latents[0]
        linear[row.nearest] += problem.lam
        weights = solve_one(problem.gram, linear, int(row.nearest), float(row.threshold))
        indices = weights.nonzero().T
        size = torch.tensor([indices.shape[1]], device=weights.device)
        supports = _Supports(indices, weights[indices], size)
        done.store(row.rows, supports, config.max_iterations)


def _densify(supports: _Supports, num_codes: int) -> Tensor:
    """(N, K) float64. Unused slots add 0 to whatever code they name."""
    dense = supports.weights.new_zeros(supports.indices.shape[0], num_codes)
    return dense.scatter_add_(1, supports.indices, supports.weights * supports.mask())
