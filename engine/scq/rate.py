"""Rate-aware choice among lattice states: least D + rate_weight * bits under the true contexts.

Candidates come with their squared errors; what each takes in bits follows from the model's
entropy tables. Only the first symbol of a latent (its heaviest index, or its mode in a delta
frame) depends on its neighbours, so everything else is priced at once and one raster pass settles
the rest; further passes also weigh what a choice makes the neighbours to the right and below pay.
Costs are integers in 1/256 bit. Knows nothing of pictures, networks or bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from scq.bitstream.canonical import Grid, Latents, canonical
from scq.bitstream.changes import NEW, REWEIGHT, SKIP, SWAP1, compare
from scq.bitstream.frame import split_tiles
from scq.bitstream.tables import NUM_MODES, EntropyTables
from scq.bitstream.weights import key, partition_numbers
from scq.errors import InvalidLatents, ScqError
from scq.lattice import Candidates, LatticeAssignment

COST_UNITS = 256
DEFAULT_PASSES = 2

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def choose(
    candidates: Candidates,
    grid: Grid,
    tables: EntropyTables,
    rate_weight: float,
    reference: LatticeAssignment | None = None,
    *,
    tile: int | None = None,
    passes: int = DEFAULT_PASSES,
) -> LatticeAssignment:
    """One of the candidates for every latent of a (rows, columns) grid.

    rate_weight: squared latent error that one bit is worth, >= 0. reference: the assignment that
    a delta frame would change; the candidates should then hold states near it (see
    `scq.lattice.search_candidates`). tile: side of independent tiles, as the frame will be coded.

    Raises:
        InvalidLatents: candidates that do not fill the grid, or a reference of another size.
        ScqError: a negative rate_weight or no pass.
    """
    _check(candidates, grid, rate_weight, reference, passes)
    if reference is None:
        problem, states = _key_problem(candidates, tables, rate_weight)
    else:
        problem, states = _delta_problem(candidates, tables, rate_weight, reference)
    picked = np.empty(len(candidates), np.int64)
    for part in split_tiles(grid, tile):
        picked[part.rows] = settle(problem.take(part.rows), part.grid, passes)
    chosen = torch.from_numpy(states[np.arange(len(states)), picked])
    rows = torch.arange(len(candidates))
    return LatticeAssignment(
        candidates.indices.cpu()[rows, chosen], candidates.numerators.cpu()[rows, chosen]
    )


@dataclass(frozen=True)
class Problem:
    """N latents with M forms each, whose first symbols are priced by what stands around them.

    fixed: (N, M) float64 what a form takes whatever its neighbours, +inf where there is none.
    symbols: (N, M) its first symbol. clusters: (A,) the context that a symbol gives its
    neighbours, below `outside`. prices: ((outside + 1)^2, A) by row left * (outside + 1) + above.
    """

    fixed: Floats
    symbols: Ints
    clusters: Ints
    outside: int
    prices: Floats

    def take(self, rows: Ints) -> Problem:
        """The problem of some latents."""
        return Problem(
            self.fixed[rows], self.symbols[rows], self.clusters, self.outside, self.prices
        )


def settle(problem: Problem, grid: Grid, passes: int) -> Ints:
    """(N,) the form of each latent. The first pass in raster order sees the neighbours to the left
    and above; later ones also the price of the neighbours to the right and below as they stand."""
    picked = np.zeros(len(problem.fixed), np.int64)
    around = np.full((grid[0] + 1, grid[1] + 1), problem.outside, np.int64)
    first = np.full((grid[0] + 1, grid[1] + 1), -1, np.int64)
    for number in range(passes):
        for position in range(len(picked)):
            y, x = divmod(position, grid[1])
            totals = _totals(problem, position, around, y, x)
            if number:
                totals = totals + _outlook(problem, position, around, first, y, x)
            form = int(totals.argmin())
            picked[position] = form
            symbol = problem.symbols[position, form]
            around[y, x], first[y, x] = problem.clusters[symbol], symbol
    return picked


# Index -1 of both arrays is the border that `settle` leaves outside.
def _totals(problem: Problem, position: int, around: Ints, y: int, x: int) -> Floats:
    row = around[y, x - 1] * (problem.outside + 1) + around[y - 1, x]
    totals: Floats = problem.fixed[position] + problem.prices[row, problem.symbols[position]]
    return totals


def _outlook(
    problem: Problem, position: int, around: Ints, first: Ints, y: int, x: int
) -> Floats | float:
    """(M,) what the neighbours to the right and below would pay after each form."""
    own = problem.clusters[problem.symbols[position]]
    width = problem.outside + 1
    total: Floats | float = 0.0
    if first[y, x + 1] >= 0:
        total = problem.prices[own * width + around[y - 1, x + 1], first[y, x + 1]]
    if first[y + 1, x] >= 0:
        total = total + problem.prices[around[y + 1, x - 1] * width + own, first[y + 1, x]]
    return total


def _key_problem(
    candidates: Candidates, tables: EntropyTables, rate_weight: float
) -> tuple[Problem, Ints]:
    """Forms: every candidate led by every code of its largest weight."""
    unit = rate_weight / COST_UNITS
    costs, leads = _solo_costs(candidates, tables)
    size = candidates.indices.shape[2]
    fixed = np.repeat(_errors(candidates), size, axis=1) + _priced(unit, costs)
    states = np.broadcast_to(np.arange(fixed.shape[1]) // size, fixed.shape)
    problem = Problem(
        fixed,
        leads.reshape(len(leads), -1),
        tables.base_cluster.astype(np.int64),
        tables.num_base_clusters,
        (unit * tables.costs["base"]).astype(np.float64),
    )
    return problem, states


def _delta_problem(
    candidates: Candidates,
    tables: EntropyTables,
    rate_weight: float,
    reference: LatticeAssignment,
) -> tuple[Problem, Ints]:
    """Forms: the best candidate of every mode."""
    before = canonical(reference, tables.code)
    unit, errors = rate_weight / COST_UNITS, _errors(candidates)
    count, width = errors.shape
    by_mode = np.full((NUM_MODES, count, width), np.inf)
    solo, leads = _solo_costs(candidates, tables)
    rows = tables.other_cluster[before.heaviest].astype(np.int64)
    solo = solo + tables.costs["new"][rows[:, None, None], leads]
    by_mode[NEW] = errors + _priced(unit, solo.min(axis=2))
    modes, changed = _change_costs(candidates, before, tables)
    for mode in (SKIP, REWEIGHT, SWAP1):
        by_mode[mode] = np.where(modes == mode, errors + unit * changed, np.inf)
    states = by_mode.argmin(axis=2).T
    return Problem(
        by_mode.min(axis=2).T,
        np.broadcast_to(np.arange(NUM_MODES), (count, NUM_MODES)),
        np.arange(NUM_MODES),
        NUM_MODES,
        (unit * tables.costs["mode"]).astype(np.float64),
    ), states


def _priced(unit: float, costs: Floats) -> Floats:
    """(N, ...) costs in latent error, (N, M); what cannot be had stays infinite at a unit of 0."""
    flat = costs.reshape(len(costs), -1)
    priced: Floats = np.where(np.isinf(flat), np.inf, unit * np.where(np.isinf(flat), 0, flat))
    return priced


def _solo_costs(candidates: Candidates, tables: EntropyTables) -> tuple[Floats, Ints]:
    """(N, B, s) cost of a latent coded by itself, led by the code of each slot, without that
    lead; +inf for slots that may not lead. And the leads."""
    indices, numerators = candidates.indices.cpu().numpy(), candidates.numerators.cpu().numpy()
    used = numerators > 0
    sizes = used.sum(axis=2)
    costs = np.where(numerators == numerators[:, :, :1], 0.0, np.inf)
    if tables.has("support"):
        costs += tables.costs["support"][tables.base_cluster[indices], sizes[:, :, None] - 1]
    keys = key(numerators.reshape(-1, numerators.shape[2]), tables.code.denominator)
    for size in range(2, tables.code.max_support + 1):
        if tables.has(f"partition{size}"):
            numbers = partition_numbers(tables.code.denominator, size)
            rows = sizes == size
            chosen = numbers[keys.reshape(sizes.shape)[rows]]
            costs[rows] += tables.costs[f"partition{size}"][0][chosen][:, None]
    if tables.has("other"):
        clusters = tables.other_cluster[indices].astype(np.int64)
        other = tables.costs["other"][clusters[:, :, :, None], indices[:, :, None, :]]
        apart = used[:, :, None, :] & ~np.eye(indices.shape[2], dtype=bool)
        costs += np.where(apart, other, 0).sum(axis=3)
    return costs, indices


def _change_costs(
    candidates: Candidates, before: Latents, tables: EntropyTables
) -> tuple[Ints, Ints]:
    """(N, B) simplest mode against the reference, and what its enhancement takes."""
    count, width = candidates.errors.shape
    slots = candidates.indices.shape[2]
    repeated = before.take(np.repeat(np.arange(count), width))
    now = Latents(
        candidates.indices.cpu().numpy().reshape(-1, slots),
        candidates.numerators.cpu().numpy().reshape(-1, slots),
    )
    changes = compare(repeated, now, tables.code.denominator)
    modes = changes.simplest
    costs = np.zeros(count * width, np.int64)
    for size in range(1, slots + 1):
        for mode, name in ((REWEIGHT, "reweight"), (SWAP1, "swap_weights")):
            rows = np.flatnonzero((changes.sizes == size) & (modes == mode))
            if tables.has(f"{name}{size}"):
                table = tables.costs[f"{name}{size}"]
                costs[rows] += table[changes.partitions[rows], changes.compositions[rows]]
            if mode == SWAP1:
                slot = changes.slots[rows]
                if tables.has(f"slot{size}"):
                    costs[rows] += tables.costs[f"slot{size}"][0][slot]
                removed = tables.other_cluster[repeated.indices[rows, slot]]
                costs[rows] += tables.costs["swap"][removed, changes.inserted[rows]]
    return modes.reshape(count, width), costs.reshape(count, width)


def _errors(candidates: Candidates) -> Floats:
    errors: Floats = candidates.errors.cpu().double().numpy()
    return errors


def _check(
    candidates: Candidates,
    grid: Grid,
    rate_weight: float,
    reference: LatticeAssignment | None,
    passes: int,
) -> None:
    if len(candidates) != grid[0] * grid[1]:
        raise InvalidLatents(f"{len(candidates)} latents do not fill a {grid[0]}x{grid[1]} grid")
    if reference is not None and len(reference) != len(candidates):
        raise InvalidLatents(
            f"the reference has {len(reference)} latents, the frame {len(candidates)}"
        )
    if not 0 <= rate_weight < np.inf:
        raise ScqError(f"rate_weight is {rate_weight}, must be finite and >= 0")
    if passes < 1:
        raise ScqError(f"passes is {passes}, at least one is needed")
