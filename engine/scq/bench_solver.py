"""`python -m scq.bench_solver [--json FILE]`: what the SCQ solvers cost and how exact they are.

Latents: N draws from a Gaussian with a 1/sqrt(rank) spectrum at unit variance, as principal
components of pictures have; codebook: k-means on 8,000 others; float32, lam = 0.1. Times are CPU
time of this process on one thread, per latent, medians over interleaved rounds: other work on the
machine does not count, its pressure on the caches does. cvxpylayers runs on a few latents of the
same batch, in its usual float64; its cost per latent does not depend on the batch.

Must not be imported by the product.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from scq.errors import UnsupportedOperation
from scq.solver import SolverConfig, oracle, solve
from scq.solver.base import SolveResult
from vqkernels import scq_solve

# (num_codes, code_dim, latents, latents for cvxpylayers or 0: above 512 codes it takes minutes)
SIZES = [
    (128, 16, 4096, 8),
    (512, 16, 4096, 2),
    (512, 64, 2048, 2),
    (1024, 32, 4096, 0),
    (4096, 64, 1024, 0),
]
LAM = 0.1
ROUNDS = 5
TRAINING_LATENTS = 8000

Run = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """One solver at one size. Times in microseconds per latent, None where it does not apply.

    objective_gap: largest excess over the best objective known. gradient_error: largest
    difference of dL/dlatents and dL/dcodebook to the dense float64 oracle, over its largest entry.
    """

    num_codes: int
    code_dim: int
    solver: str
    latents: int
    forward_us: float
    both_us: float | None = None
    objective_gap: float | None = None
    kkt_residual: float | None = None
    gradient_error: float | None = None
    mean_support: float | None = None
    mean_iterations: float | None = None


@dataclass(frozen=True)
class Problem:
    """Latents (N, F) and codebook (K, F), float32, and dL/dz_q (N, F)."""

    latents: Tensor
    codebook: Tensor
    slope: Tensor

    def few(self, count: int, dtype: torch.dtype) -> Problem:
        """The first `count` latents in another dtype."""
        return Problem(
            self.latents[:count].to(dtype), self.codebook.to(dtype), self.slope[:count].to(dtype)
        )


def make_problem(num_codes: int, code_dim: int, count: int, seed: int = 0) -> Problem:
    """The data of the module docstring."""
    generator = torch.Generator().manual_seed(seed)
    total = count + TRAINING_LATENTS
    scale = torch.arange(1, code_dim + 1).rsqrt()
    points = torch.randn(total, code_dim, generator=generator) * scale
    points /= points.std()
    train, latents = points[:TRAINING_LATENTS], points[TRAINING_LATENTS:].contiguous()
    codebook = train[:num_codes].clone()
    for _ in range(4):
        owner = torch.from_numpy(scq_solve.nearest(train.numpy(), codebook.numpy()))
        size = torch.bincount(owner, minlength=num_codes).clamp(min=1)
        codebook = torch.zeros_like(codebook).index_add_(0, owner, train) / size[:, None]
    return Problem(latents, codebook, torch.randn(latents.shape, generator=generator))


def median_us(runs: dict[str, Run], latents: int, rounds: int) -> dict[str, float]:
    """Median CPU microseconds per latent of every run, interleaved, after one warm-up each."""
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.process_time()
            run()
            times[name].append(time.process_time() - start)
    return {name: statistics.median(spent) / latents * 1e6 for name, spent in times.items()}


def solver_configs() -> dict[str, tuple[str, SolverConfig]]:
    """What is measured under which name: (name in SOLVERS, settings)."""
    return {
        "torch": ("exact", SolverConfig(lam=LAM)),
        "native": ("native", SolverConfig(lam=LAM)),
        "relaxed, 20 sweeps": ("relaxed", SolverConfig(lam=LAM)),
        "relaxed, sort": ("relaxed", SolverConfig(lam=LAM, projection="sort")),
    }


def forward(problem: Problem, name: str) -> SolveResult:
    """One solve without gradients."""
    solver, config = solver_configs()[name]
    with torch.no_grad():
        return solve(problem.latents, problem.codebook, config, solver=solver)


def gradients(problem: Problem, name: str) -> tuple[Tensor, Tensor]:
    """One solve and its derivative: dL/dlatents, dL/dcodebook."""
    solver, config = solver_configs()[name]
    z = problem.latents.clone().requires_grad_()
    c = problem.codebook.clone().requires_grad_()
    quantized = solve(z, c, config, solver=solver).quantized
    grad_z, grad_c = torch.autograd.grad(quantized, (z, c), problem.slope)
    return grad_z, grad_c


def oracle_gradients(problem: Problem) -> tuple[Tensor, Tensor]:
    """The same derivative by dense float64 linear algebra, one latent at a time.

    The support comes from a solve whose certificate is checked; on it the KKT system
    [2A 1; 1^T 0] is solved by LU, and differentiated by autograd through that solve.
    """
    z = problem.latents.clone().requires_grad_()
    c = problem.codebook.clone().requires_grad_()
    found = solve(problem.latents, problem.codebook, SolverConfig(lam=LAM))
    rows = []
    for i, weights in enumerate(found.assignment):
        support = weights.nonzero().squeeze(1)
        nearest = torch.cdist(problem.latents[i : i + 1], problem.codebook).argmin()
        size = len(support)
        identity = torch.eye(size, dtype=z.dtype)
        system = torch.nn.functional.pad(c[support] @ c[support].T + LAM * identity, (0, 1, 0, 1))
        border = torch.ones(size + 1, dtype=z.dtype)
        border[size] = 0.0
        system = system + torch.outer(1 - border, border) + torch.outer(border, 1 - border)
        linear = c[support] @ z[i] + LAM * (support == nearest).to(z.dtype)
        solution = torch.linalg.solve(system, torch.cat((linear, torch.ones(1, dtype=z.dtype))))
        rows.append(solution[:size] @ c[support])
    grad_z, grad_c = torch.autograd.grad(torch.stack(rows), (z, c), problem.slope)
    return grad_z, grad_c


def objectives(problem: Problem, assignment: Tensor) -> Tensor:
    """(N,) values of the objective, float64."""
    z, c, p = problem.latents.double(), problem.codebook.double(), assignment.double()
    nearest = torch.cdist(z, c).argmin(1, keepdim=True)
    error = (z - p @ c).square().sum(1)
    return error + LAM * p.scatter_add(1, nearest, -torch.ones_like(p[:, :1])).square().sum(1)


def _difference(ours: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]) -> float:
    return max(
        float((a.double() - b).abs().max() / b.abs().max())
        for a, b in zip(ours, exact, strict=True)
    )


def accuracy(problem: Problem, name: str, exact: tuple[Tensor, Tensor]) -> dict[str, float]:
    """The accuracy columns of one solver, on a float64 problem."""
    result = forward(problem, name)
    best = objectives(problem, forward(problem, "torch").assignment)
    gap = objectives(problem, result.assignment) - best
    return {
        "objective_gap": float(gap.max()),
        "kkt_residual": float(result.kkt_residual.max()),
        "gradient_error": _difference(gradients(problem, name), exact),
        "mean_support": float(result.support_size.double().mean()),
        "mean_iterations": float(result.iterations.double().mean()),
    }


def our_rows(problem: Problem) -> list[Row]:
    """Our solvers and plain vector quantization at one size."""
    count = len(problem.latents)
    z, c = problem.latents, problem.codebook
    runs: dict[str, Run] = {
        "VQ argmin, torch": lambda: (0.5 * c.square().sum(1) - z @ c.T).argmin(1),
        "VQ argmin, native": lambda: scq_solve.nearest(z.numpy(), c.numpy()),
    }
    plain = list(runs)
    for name in solver_configs():
        runs[name] = functools.partial(forward, problem, name)
        runs[f"{name} both"] = functools.partial(gradients, problem, name)
    times = median_us(runs, count, ROUNDS)
    rows = [Row(*_size(problem), name, count, times[name]) for name in plain]
    small = problem.few(24, torch.float64)
    exact = oracle_gradients(small)
    for name in solver_configs():
        row = Row(*_size(problem), name, count, times[name], times[f"{name} both"])
        rows.append(Row(**{**asdict(row), **accuracy(small, name, exact)}))
    return rows


def _size(problem: Problem) -> tuple[int, int]:
    return problem.codebook.shape[0], problem.codebook.shape[1]


def oracle_rows(problem: Problem) -> list[Row]:
    """cvxpylayers on every latent of `problem` (float64, few)."""
    exact = oracle_gradients(problem)
    best = objectives(problem, forward(problem, "torch").assignment)
    rows = []
    for name, settings in (
        ("cvxpylayers, SCS", {"mode": "dense"}),
        ("cvxpylayers, Clarabel", {"mode": "dense", "solve_method": "Clarabel"}),
    ):
        row = _oracle_row(problem, name, settings)
        z = problem.latents.clone().requires_grad_()
        c = problem.codebook.clone().requires_grad_()
        result = oracle.solve_with(z, c, SolverConfig(lam=LAM), settings)
        grad = torch.autograd.grad(result.quantized, (z, c), problem.slope)
        measured = {
            "objective_gap": float((objectives(problem, result.assignment.detach()) - best).max()),
            "kkt_residual": float(result.kkt_residual.max()),
            "gradient_error": _difference((grad[0], grad[1]), exact),
        }
        rows.append(Row(**{**asdict(row), **measured}))
    return rows


def _oracle_row(problem: Problem, name: str, settings: Mapping[str, str]) -> Row:
    config = SolverConfig(lam=LAM)
    z = problem.latents.clone().requires_grad_()
    c = problem.codebook.clone().requires_grad_()

    def only_forward() -> None:
        with torch.no_grad():
            oracle.solve_with(z.detach(), c.detach(), config, settings)

    def both() -> None:
        quantized = oracle.solve_with(z, c, config, settings).quantized
        torch.autograd.grad(quantized, (z, c), problem.slope)

    times = median_us({"forward": only_forward, "both": both}, len(z), ROUNDS)
    return Row(*_size(problem), name, len(z), times["forward"], times["both"])


def measure(size: tuple[int, int, int, int]) -> list[Row]:
    """All rows of one size. cvxpylayers is left out where it is not installed."""
    num_codes, code_dim, count, oracle_count = size
    problem = make_problem(num_codes, code_dim, count)
    rows = our_rows(problem)
    if not oracle_count:
        return rows
    try:
        return rows + oracle_rows(problem.few(oracle_count, torch.float64))
    except UnsupportedOperation:
        return rows


def header() -> str:
    """The table's first line."""
    return (
        f"{'K':>5} {'F':>4}  {'solver':<22}{'n':>6}{'fwd us':>11}{'fwd+bwd us':>12}{'x cvxpy':>9}"
        f"{'x argmin':>9}{'gap':>10}{'KKT':>10}{'grad':>10}{'supp':>6}{'iter':>6}"
    )


def table(rows: list[Row]) -> str:
    """One size as text, with ratios: to cvxpylayers (SCS, both) and to torch's argmin (forward)."""
    return "\n".join(_line(row, rows) for row in rows)


def _line(row: Row, rows: list[Row]) -> str:
    peers = {peer.solver: peer for peer in rows}
    conic, argmin = peers.get("cvxpylayers, SCS"), peers["VQ argmin, torch"]
    speed = conic.both_us / row.both_us if conic and conic.both_us and row.both_us else None
    cells = [
        f"{row.num_codes:>5} {row.code_dim:>4}  {row.solver:<22}{row.latents:>6}",
        f"{row.forward_us:>11.2f}",
        _cell(row.both_us, 12, ".2f"),
        _cell(speed, 9, ".0f"),
        _cell(row.forward_us / argmin.forward_us, 9, ".1f"),
        _cell(row.objective_gap, 10, ".1e"),
        _cell(row.kkt_residual, 10, ".1e"),
        _cell(row.gradient_error, 10, ".1e"),
        _cell(row.mean_support, 6, ".1f"),
        _cell(row.mean_iterations, 6, ".1f"),
    ]
    return "".join(cells)


def _cell(value: float | None, width: int, form: str) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:>{width}{form}}"


def main() -> None:
    """Print the table; with --json, also write the rows."""
    parser = argparse.ArgumentParser(prog="python -m scq.bench_solver", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"lam={LAM}, one thread, CPU time, medians of {ROUNDS}, torch {torch.__version__}")
    print(header())
    rows = []
    for size in SIZES:
        found = measure(size)
        print(table(found), flush=True)
        rows += found
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
