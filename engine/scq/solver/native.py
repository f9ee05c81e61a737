"""Exact SCQ on the native library: the same problem, answer and derivative as `exact`.

Tensors in CPU memory only. Rows the library leaves unsolved (dependent codes at lam = 0, supports
beyond its tables) are solved by `exact` and counted. Must not know how the library works.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from scq.errors import UnsupportedOperation
from scq.solver import exact
from scq.solver.assignment import SparseAssignment
from scq.solver.base import SolverConfig, SolveResult, check_problem
from vqkernels import ThreadPool, native_status, scq_solve
from vqkernels.scq_solve import ScqProblem, ScqSlopes, ScqSolution


def solve(
    latents: Tensor, codebook: Tensor, config: SolverConfig, initial: Tensor | None = None
) -> SolveResult:
    """Same contract as `exact.solve`, for CPU tensors.

    Raises UnsupportedOperation for tensors elsewhere, for more than 1024 features, and where the
    library is missing.
    """
    check_problem(latents, codebook, initial)
    _check_place(latents)
    weights, quantized, *solved = _NativeAssignment.apply(  # type: ignore[no-untyped-call]
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


def obstacle(latents: Tensor) -> str | None:
    """Why the library cannot solve these latents (N, F); None where it can."""
    if latents.device.type != "cpu":
        return f"got {latents.device} tensors"
    if latents.shape[1] > scq_solve.MAX_FEATURES:
        return f"takes up to {scq_solve.MAX_FEATURES} features, the latents have {latents.shape[1]}"
    status = native_status()
    return None if status.available else f"cannot run: {status.reason}"


def _check_place(latents: Tensor) -> None:
    if reason := obstacle(latents):
        raise UnsupportedOperation(
            f"solver 'native' {reason}; use solver 'exact', which runs anywhere"
        )


@functools.lru_cache(maxsize=4)
def _pool_of_process(num_threads: int, process: int) -> ThreadPool:
    return ThreadPool(num_threads)


def _pool(config: SolverConfig) -> ThreadPool | None:
    # By process: a pool does not survive a fork.
    return _pool_of_process(config.num_threads, os.getpid()) if config.num_threads > 1 else None


class _NativeAssignment(torch.autograd.Function):
    """Forward and backward are one native call each."""

    @staticmethod
    def forward(
        ctx: Any, latents: Tensor, codebook: Tensor, config: SolverConfig, initial: Tensor | None
    ) -> tuple[Tensor, ...]:
        problem = _problem(latents, codebook, config, initial)
        solution = scq_solve.solve(problem, pool=_pool(config))
        width = max(1, int(solution.sizes.max()))
        indices = torch.from_numpy(solution.indices[:, :width].copy())
        weights = torch.from_numpy(solution.weights[:, :width].copy())
        solved = _Numbers(indices, weights, solution)
        solved.complete(latents.detach(), codebook.detach(), config)
        ctx.save_for_backward(latents, codebook, solved.indices, solved.weights, solved.sizes)
        ctx.config = config
        ctx.set_materialize_grads(False)
        fallbacks = torch.tensor(int(solution.unsolved.sum()))
        outputs = (solved.indices, solved.sizes, solved.iterations, solved.residual, fallbacks)
        ctx.mark_non_differentiable(*outputs)
        dtype = latents.dtype
        return solved.weights.to(dtype), solved.quantized.to(dtype), *outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        latents, codebook, indices, weights, sizes = ctx.saved_tensors
        grad_latents, grad_codebook = scq_solve.differentiate(
            _problem(latents, codebook, ctx.config, None),
            _supports(indices, weights, sizes),
            ScqSlopes(*(None if g is None else _doubles(g) for g in grads[:2])),
            pool=_pool(ctx.config),
        )
        return (
            torch.from_numpy(grad_latents).to(latents.dtype),
            torch.from_numpy(grad_codebook).to(codebook.dtype),
            None,
            None,
        )


class _Numbers:
    """A native solution as tensors, completed by `exact` where the library gave no answer."""

    def __init__(self, indices: Tensor, weights: Tensor, solution: ScqSolution) -> None:
        self.indices, self.weights = indices, weights
        self.sizes = torch.from_numpy(solution.sizes)
        self.iterations = torch.from_numpy(solution.iterations)
        self.residual = torch.from_numpy(solution.kkt_residual)
        self.quantized = torch.from_numpy(solution.quantized)
        self.unsolved = torch.from_numpy(solution.unsolved)

    def complete(self, latents: Tensor, codebook: Tensor, config: SolverConfig) -> None:
        rows = self.unsolved.nonzero().squeeze(1)
        if not rows.numel():
            return
        # In float64, so that both kinds of rows are as exact.
        other = exact.solve(latents[rows].double(), codebook.double(), config)
        grow = max(0, other.sparse.weights.shape[1] - self.weights.shape[1])
        self.indices = torch.nn.functional.pad(self.indices, (0, grow))
        self.weights = torch.nn.functional.pad(self.weights, (0, grow))
        # The used slots first: `exact` may leave zeros between.
        weights, order = other.sparse.weights.sort(1, descending=True)
        width = weights.shape[1]
        self.indices[rows] = 0
        self.weights[rows] = 0.0
        self.indices[rows[:, None], torch.arange(width)] = other.sparse.indices.gather(1, order)
        self.weights[rows[:, None], torch.arange(width)] = weights
        self.sizes[rows] = other.support_size
        self.iterations[rows] += other.iterations
        self.residual[rows] = other.kkt_residual
        self.quantized[rows] = other.quantized


def _doubles(values: Tensor) -> Any:
    return np.ascontiguousarray(values.detach().double().numpy())


def _problem(
    latents: Tensor, codebook: Tensor, config: SolverConfig, initial: Tensor | None
) -> ScqProblem:
    return ScqProblem(
        latents.detach().contiguous().numpy(),
        codebook.detach().contiguous().numpy(),
        config.lam,
        config.objective,
        config.tolerance,
        config.max_iterations,
        None if initial is None else initial.cpu().contiguous().numpy(),
    )


def _supports(indices: Tensor, weights: Tensor, sizes: Tensor) -> ScqSolution:
    """The part of a solution that the derivative needs."""
    return ScqSolution(
        indices=indices.numpy(),
        weights=weights.numpy(),
        sizes=sizes.numpy(),
        nearest=np.empty(0, np.int64),
        iterations=np.empty(0, np.int64),
        kkt_residual=np.empty(0),
        quantized=np.empty((0, 0)),
        unsolved=np.empty(0, np.bool_),
    )
