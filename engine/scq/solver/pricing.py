"""Finding codes: the nearest one, and those whose gradient says that they should enter.

Few codes are priced in float64 altogether. Many are scanned in float32 on unit vectors, where
every score is known to be off by at most `scan_error`; only codes that could matter within that
bound are looked at in float64, so the outcome is as if everything had been float64.

Must not know how supports are solved.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from scq.solver.problem import Problem, Supports, combine, project

# Up to here float64 pricing of all codes costs no more than screening.
DIRECT_CODES = 512
# Codes kept per latent by a scan, to be priced in its small solves.
CANDIDATES = 48
# Of those, how many are re-examined in float64 before a latent may be called solved.
RECHECKED = 8
# Candidates let in per pricing pass: best of 1..12 at K=256, F=16 (93 ms for 2000 latents).
ENTERING = 2


class Scan(NamedTuple):
    """The codebook for scanning: codes (K, F) divided by the largest norm, `radius`.

    float32 unless torch was allowed to use fewer mantissa bits than that in matrix products.
    half_norms (K,) float64: |c_k|^2 / 2.
    """

    codes: Tensor
    half_norms: Tensor
    radius: float

    @property
    def error(self) -> float:
        """Bound on the error of one score: rounding of both factors and of F products and sums."""
        unit = torch.finfo(self.codes.dtype).eps / 2
        return (self.codes.shape[1] + 4) * unit


class Gradient(NamedTuple):
    """At a point with multiplier mu = p.g: slack (n, m) = g_k - mu of the m codes outside the
    support that lie lowest, ascending, and their `codes` (n, m). residual (n,): p.g - min g."""

    slack: Tensor
    codes: Tensor
    residual: Tensor


class Candidates(NamedTuple):
    """What a scan kept for each latent: indices (n, M) and the scan's codes (n, M, F)."""

    indices: Tensor
    codes: Tensor

    def take(self, rows: Tensor) -> Candidates:
        return Candidates(self.indices[rows], self.codes[rows])


def gather_candidates(scan: Scan, indices: Tensor) -> Candidates:
    """The candidates' codes, copied next to each other."""
    return Candidates(indices, scan.codes[indices])


def make_scan(problem: Problem) -> Scan | None:
    """None where pricing is direct."""
    if problem.pad <= DIRECT_CODES:
        return None
    radius = problem.tau**0.5
    exact = torch.get_float32_matmul_precision() == "highest"
    codes = (problem.codes / radius).to(torch.float32 if exact else torch.float64)
    return Scan(codes, 0.5 * problem.codes.square().sum(1), radius)


def nearest_candidates(problem: Problem, scan: Scan, latents: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest code (n,), lower index in a tie, and the CANDIDATES nearest ones (n, M)."""
    unit = latents.square().sum(1, keepdim=True).sqrt().clamp(min=scan.radius)
    directions = (latents / unit).to(scan.codes.dtype)
    # |c|^2 / 2 - z.c over (unit * radius), <= 1.5: one more rounding than a plain score.
    norms = (scan.half_norms / scan.radius).to(scan.codes.dtype)
    distance = torch.addmm(norms / unit.to(scan.codes.dtype), directions, scan.codes.T, alpha=-1)
    best, codes = torch.topk(distance, min(CANDIDATES, problem.pad), dim=1, largest=False)
    few = codes[:, :RECHECKED].sort(1).values
    exact = scan.half_norms[few] - project(problem.codebook[few], latents)
    lowest, place = exact.min(1)
    nearest = few.gather(1, place[:, None]).squeeze(1)
    # Codes beyond the re-examined ones, should any come as close.
    unseen = best[:, RECHECKED : RECHECKED + 1].double() - 2 * scan.error
    doubtful = (unseen * unit * scan.radius <= lowest[:, None]).any(1).nonzero().squeeze(1)
    if doubtful.numel():
        nearest[doubtful] = _nearest_directly(problem, latents[doubtful])
    return nearest, codes


def nearest(problem: Problem, latents: Tensor) -> Tensor:
    """The nearest code (n,) by float64 over all codes, lower index in a tie."""
    return _nearest_directly(problem, latents)


def _nearest_directly(problem: Problem, latents: Tensor) -> Tensor:
    half_norms = 0.5 * problem.codes.square().sum(1)
    return (half_norms - latents @ problem.codes.T).argmin(1)


class _Point(NamedTuple):
    """Where a latent stands: error = C^T p - z, its multiplier mu = p.g, the lowest support g."""

    error: Tensor
    mu: Tensor
    lowest: Tensor


def _point(problem: Problem, latents: Tensor, nearest: Tensor, supports: Supports) -> _Point:
    indices, weights, _ = supports
    codes = problem.codebook[indices]
    error = combine(weights, codes) - latents
    bonus = problem.bonus * (indices == nearest[:, None]).double()
    gradient = project(codes, error) + problem.lam * weights - bonus
    mu = (weights * gradient).sum(1)
    lowest = gradient.masked_fill(indices == problem.pad, torch.inf).amin(1)
    return _Point(error, mu, lowest)


def price(
    problem: Problem, latents: Tensor, nearest: Tensor, supports: Supports, count: int
) -> Gradient:
    """The `count` lowest codes outside the support, in float64 over all codes."""
    point = _point(problem, latents, nearest, supports)
    gradient = point.error @ problem.codebook.T
    rows = torch.arange(len(gradient), device=gradient.device)
    gradient[rows, nearest] -= problem.bonus
    gradient[:, problem.pad] = torch.inf
    gradient.scatter_(1, supports.indices, torch.inf)
    lowest, codes = torch.topk(gradient, min(count, problem.pad), dim=1, largest=False)
    return _finish(point, lowest, codes)


def price_screened(
    problem: Problem, scan: Scan, latents: Tensor, nearest: Tensor, supports: Supports
) -> tuple[Gradient, Tensor]:
    """As `price` for RECHECKED codes by one float32 scan, and the CANDIDATES lowest codes (n, M).

    A row without negative slack is certified: no code of the whole codebook lies below mu.
    """
    point = _point(problem, latents, nearest, supports)
    length = point.error.square().sum(1, keepdim=True).sqrt().clamp(min=1e-300)
    scores = (point.error / length).to(scan.codes.dtype) @ scan.codes.T
    rows = torch.arange(len(scores), device=scores.device)
    unit = length.squeeze(1) * scan.radius
    scores[rows, nearest] -= (problem.bonus / unit).clamp(max=1e30).to(scores.dtype)
    used = supports.indices.where(supports.indices != problem.pad, supports.indices[:, :1])
    scores.scatter_(1, used, torch.inf)
    best, codes = torch.topk(scores, min(CANDIDATES, problem.pad), dim=1, largest=False)
    lowest, few = _recheck(problem, point.error, nearest, codes[:, :RECHECKED])
    lowest = lowest.masked_fill(torch.isinf(best[:, :RECHECKED]), torch.inf)
    outcome = _finish(point, *_sorted(lowest, few))
    unseen = (best[:, RECHECKED : RECHECKED + 1].double() - scan.error) * unit[:, None]
    doubtful = (unseen < point.mu[:, None]).any(1) & (outcome.slack[:, 0] >= 0)
    _price_again(problem, latents, nearest, supports, outcome, doubtful)
    return outcome, codes


def _price_again(
    problem: Problem,
    latents: Tensor,
    nearest: Tensor,
    supports: Supports,
    outcome: Gradient,
    doubtful: Tensor,
) -> None:
    rows = doubtful.nonzero().squeeze(1)
    if rows.numel():
        again = price(problem, latents[rows], nearest[rows], supports.take(rows), RECHECKED)
        for field, new in zip(outcome, again, strict=True):
            field[rows] = new


def price_candidates(
    problem: Problem, candidates: Candidates, latents: Tensor, nearest: Tensor, supports: Supports
) -> Gradient:
    """The ENTERING lowest of each latent's own candidates, chosen in float32, priced in float64."""
    point = _point(problem, latents, nearest, supports)
    length = point.error.square().sum(1, keepdim=True).sqrt().clamp(min=1e-300)
    scores = project(candidates.codes, (point.error / length).to(candidates.codes.dtype))
    taken = (candidates.indices[:, :, None] == supports.indices[:, None]).any(2)
    bonus = (problem.bonus / (length * problem.tau**0.5)).clamp(max=1e30).to(scores.dtype)
    scores = scores - bonus * (candidates.indices == nearest[:, None]).to(scores.dtype)
    scores.masked_fill_(taken, torch.inf)
    best, places = torch.topk(scores, min(ENTERING, scores.shape[1]), dim=1, largest=False)
    codes = candidates.indices.gather(1, places)
    lowest, codes = _recheck(problem, point.error, nearest, codes)
    return _finish(point, *_sorted(lowest.masked_fill(torch.isinf(best), torch.inf), codes))


def _recheck(
    problem: Problem, error: Tensor, nearest: Tensor, codes: Tensor
) -> tuple[Tensor, Tensor]:
    gradient = project(problem.codebook[codes], error)
    return gradient - problem.bonus * (codes == nearest[:, None]).double(), codes


def _sorted(lowest: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    lowest, order = lowest.sort(1)
    return lowest, codes.gather(1, order)


def _finish(point: _Point, lowest: Tensor, codes: Tensor) -> Gradient:
    floor = torch.minimum(point.lowest, lowest[:, 0]) if lowest.shape[1] else point.lowest
    residual = (point.mu - floor).clamp(min=0)
    return Gradient(lowest - point.mu[:, None], codes, residual)
