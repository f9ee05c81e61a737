"""Entropy tables from coded frames: counts, clusters of codes, and smoothing.

Contexts of two clusters see few samples each, so every row is drawn towards a guess made from
simpler contexts, as strongly as held-out frames (every fifth) ask for. Floats are fine here: only
the integer tables that come out are part of a model. Knows nothing of bytes.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from scq.bitstream.canonical import Grid, Latents, canonical
from scq.bitstream.changes import NEW, REWEIGHT, SWAP1, Changes, compare, partition_rows
from scq.bitstream.rans import quantize_frequencies
from scq.bitstream.tables import NUM_MODES, EntropyTables, table_shapes
from scq.bitstream.weights import check_profile
from scq.errors import CorruptCodes, ScqError
from scq.lattice import LatticeAssignment, LatticeCode

HELD_OUT_EVERY = 5
_STRENGTHS = tuple(4.0**k for k in range(-1, 9))
_EM_STEPS = 30
_KMEANS_STEPS = 20
_MAX_FEATURES = 512
# Before any video was seen: still parts are common, a single changed code less so.
_MODE_GUESS = (0.4, 0.1, 0.15, 0.35)

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class CodedGrid:
    """The codes of one picture, raster order, on a grid of (rows, columns)."""

    assignment: LatticeAssignment
    grid: Grid

    def __post_init__(self) -> None:
        if len(self.assignment) != self.grid[0] * self.grid[1]:
            raise CorruptCodes(
                f"{len(self.assignment)} latents do not fill a {self.grid[0]}x{self.grid[1]} grid"
            )


def fit_tables(
    stills: Sequence[CodedGrid],
    code: LatticeCode,
    *,
    videos: Sequence[Sequence[CodedGrid]] = (),
    base_clusters: int = 16,
    other_clusters: int = 64,
) -> EntropyTables:
    """Tables for key frames like `stills` and delta frames like neighbours in `videos`.

    Without videos the delta tables are guesses that work but save little. Cluster counts are
    upper limits. Deterministic. Raises ScqError without stills, CorruptCodes for assignments that
    are not of `code`, UnsupportedOperation for a code that tables cannot serve.
    """
    check_profile(code)
    if not stills:
        raise ScqError("fit_tables needs at least one coded picture")
    pictures = [_Picture(canonical(s.assignment, code), s.grid) for s in stills]
    films = [[_Picture(canonical(f.assignment, code), f.grid) for f in v] for v in videos]
    return _Fit(code, pictures, films, base_clusters, other_clusters).tables()


@dataclass(frozen=True)
class _Picture:
    latents: Latents
    grid: Grid

    @property
    def heaviest(self) -> Ints:
        return self.latents.heaviest.reshape(self.grid)


@dataclass
class _Counts:
    """Symbols counted per table, fit part and held-out part apart."""

    shapes: dict[str, tuple[int, int]]
    fit: dict[str, Floats] = field(init=False)
    held: dict[str, Floats] = field(init=False)

    def __post_init__(self) -> None:
        self.fit = {name: np.zeros(shape) for name, shape in self.shapes.items()}
        self.held = {name: np.zeros(shape) for name, shape in self.shapes.items()}

    def add(self, name: str, rows: Ints, symbols: Ints, *, held: bool) -> None:
        if name in self.shapes:
            shape = self.shapes[name]
            flat = np.bincount((rows * shape[1] + symbols).ravel(), minlength=shape[0] * shape[1])
            (self.held if held else self.fit)[name] += flat.reshape(shape)


class _Fit:
    """One run of `fit_tables`: clusters first, then counts in their contexts, then smoothing."""

    def __init__(
        self,
        code: LatticeCode,
        pictures: list[_Picture],
        films: list[list[_Picture]],
        base_clusters: int,
        other_clusters: int,
    ) -> None:
        self.code = code
        self.pictures = pictures
        self.films = films
        neighbours, others = _cooccurrence(pictures, films, code.num_codes)
        self.base_cluster = cluster_rows(neighbours, base_clusters)
        self.other_cluster = cluster_rows(others, other_clusters)
        self.outside = int(self.base_cluster.max()) + 1
        self.counts = _Counts(table_shapes(code, self.outside, int(self.other_cluster.max()) + 1))

    def tables(self) -> EntropyTables:
        for number, picture in enumerate(self.pictures):
            self._count_still(picture, held=number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1)
        for film in self.films:
            for number, (before, now) in enumerate(itertools.pairwise(film)):
                self._count_pair(before, now, held=number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1)
        weights = {name: self._smoothed(name) for name in self.counts.shapes}
        return EntropyTables(
            self.code,
            self.base_cluster.astype(np.uint16),
            self.other_cluster.astype(np.uint16),
            {name: quantize_frequencies(w).astype(np.uint16) for name, w in weights.items()},
        )

    def _count_still(self, picture: _Picture, *, held: bool) -> None:
        rows = neighbour_rows(self.base_cluster[picture.heaviest], self.outside)
        self.counts.add("base", rows, picture.heaviest, held=held)
        self._count_enhancement(picture.latents, held=held)

    def _count_enhancement(self, latents: Latents, *, held: bool) -> None:
        heaviest, sizes = latents.heaviest, latents.sizes
        self.counts.add("support", self.base_cluster[heaviest], sizes - 1, held=held)
        partitions = partition_rows(latents, self.code.denominator)
        for t in range(2, self.code.max_support + 1):
            numbers = partitions[sizes == t]
            self.counts.add(f"partition{t}", np.zeros_like(numbers), numbers, held=held)
            extra = latents.take(np.flatnonzero(sizes >= t))
            rows = self.other_cluster[extra.heaviest]
            self.counts.add("other", rows, extra.indices[:, t - 1], held=held)

    def _count_pair(self, before: _Picture, now: _Picture, *, held: bool) -> None:
        if before.grid != now.grid:
            raise ScqError(f"a video changes its grid from {before.grid} to {now.grid}")
        changes = compare(before.latents, now.latents, self.code.denominator)
        modes = changes.simplest
        self.counts.add(
            "mode",
            neighbour_rows(modes.reshape(now.grid), NUM_MODES),
            modes.reshape(now.grid),
            held=held,
        )
        new = np.flatnonzero(modes == NEW)
        rows = self.other_cluster[before.latents.heaviest[new]]
        self.counts.add("new", rows, now.latents.heaviest[new], held=held)
        self._count_enhancement(now.latents.take(new), held=held)
        self._count_changes(before.latents, changes, modes, held=held)

    def _count_changes(self, before: Latents, changes: Changes, modes: Ints, *, held: bool) -> None:
        swaps = np.flatnonzero(modes == SWAP1)
        removed = before.indices[swaps, changes.slots[swaps]]
        self.counts.add("swap", self.other_cluster[removed], changes.inserted[swaps], held=held)
        for t in range(2, self.code.max_support + 1):
            for mode, name in ((REWEIGHT, "reweight"), (SWAP1, "swap_weights")):
                at = np.flatnonzero((modes == mode) & (changes.sizes == t))
                numbers, rows = changes.compositions[at], changes.partitions[at]
                self.counts.add(f"{name}{t}", rows, numbers, held=held)
                if mode == SWAP1:
                    slots = changes.slots[at]
                    self.counts.add(f"slot{t}", np.zeros_like(slots), slots, held=held)

    def _smoothed(self, name: str) -> Floats:
        fit, held = self.counts.fit[name], self.counts.held[name]
        if name == "base":
            return _smooth_base(fit, held, self.outside + 1)
        if name == "mode":
            return smooth(fit, held, _marginal(fit + held, np.array(_MODE_GUESS), 4.0))
        guess = np.full(fit.shape[1], 1 / fit.shape[1])
        if name in ("new", "swap"):
            stills = self.counts.fit["base"] + self.counts.held["base"]
            guess = _marginal(stills, guess, 0.5 * len(guess))
        return smooth(fit, held, _marginal(fit, guess, 0.5 * len(guess)))


def neighbour_rows(values: Ints, outside: int) -> Ints:
    """(h, w) context rows of a grid: value to the left * (outside + 1) + value above.

    `outside` stands for a neighbour beyond the grid's edge.
    """
    padded = np.pad(values, ((1, 0), (1, 0)), constant_values=outside)
    rows: Ints = padded[1:, :-1] * (outside + 1) + padded[:-1, 1:]
    return rows


def smooth(fit: Floats, held: Floats, prior: Floats) -> Floats:
    """Rows (R, A) of (counts + strength * prior) / (total + strength).

    prior: (A,) or (R, A) distributions. The strength is the one under which the counts `fit`
    predict `held` best; all counts are used afterwards.
    """
    prior = np.broadcast_to(prior, fit.shape)
    strength = min(_STRENGTHS, key=lambda s: -_log_likelihood(held, _drawn(fit, prior, s)))
    return _drawn(fit + held, prior, strength)


def _drawn(counts: Floats, prior: Floats, strength: float) -> Floats:
    rows: Floats = (counts + strength * prior) / (counts.sum(1, keepdims=True) + strength)
    return rows


def _log_likelihood(counts: Floats, rows: Floats) -> float:
    seen = counts > 0
    return float((counts[seen] * np.log(rows[seen])).sum())


def _marginal(counts: Floats, guess: Floats, strength: float) -> Floats:
    row: Floats = _drawn(counts.sum(0, keepdims=True), guess[None], strength)[0]
    return row


def _smooth_base(fit: Floats, held: Floats, clusters: int) -> Floats:
    """p(i | left, up) drawn towards a mixture of p(i), p(i | left), p(i | up), their product."""
    guess = np.full(fit.shape[1], 1 / fit.shape[1])
    prior = _base_mixture(fit, held, _marginal(fit, guess, 0.5 * len(guess)), clusters)
    return smooth(fit, held, prior)


def _base_mixture(fit: Floats, held: Floats, marginal: Floats, clusters: int) -> Floats:
    shape = (clusters, clusters, fit.shape[1])
    fit3, held3 = fit.reshape(shape), held.reshape(shape)
    left, up = (smooth(fit3.sum(axis), held3.sum(axis), marginal) for axis in (1, 0))
    product: Floats = left[:, None] * up[None] / marginal
    product /= product.sum(2, keepdims=True)
    parts = [np.broadcast_to(part, shape) for part in (marginal, left[:, None], up[None], product)]
    shares = np.full(len(parts), 1 / len(parts))
    seen = held3 > 0
    if seen.any():
        chances = np.stack([part[seen] for part in parts])
        for _ in range(_EM_STEPS):
            joint = shares[:, None] * chances
            shares = (joint / joint.sum(0) * held3[seen]).sum(1) / held3.sum()
    mixture: Floats = np.einsum("p,prca->rca", shares, np.stack(parts))
    return mixture.reshape(fit.shape)


def _cooccurrence(
    pictures: list[_Picture], films: list[list[_Picture]], num_codes: int
) -> tuple[Floats, Floats]:
    """(K, H) counts: what follows a code in the raster, and what stands with or replaces it.

    H is K, or 512 buckets of indices for larger codebooks.
    """
    buckets = min(num_codes, _MAX_FEATURES)
    neighbours, others = np.zeros((2, num_codes, buckets))
    for picture in pictures:
        grid = picture.heaviest
        np.add.at(neighbours, (grid[:, :-1], grid[:, 1:] % buckets), 1)
        np.add.at(neighbours, (grid[:-1], grid[1:] % buckets), 1)
        for slot in range(1, picture.latents.indices.shape[1]):
            extra = picture.latents.take(np.flatnonzero(picture.latents.sizes > slot))
            np.add.at(others, (extra.heaviest, extra.indices[:, slot] % buckets), 1)
    for film in films:
        for before, now in itertools.pairwise(film):
            old, new = before.latents.heaviest, now.latents.heaviest
            moved = old != new
            np.add.at(others, (old[moved], new[moved] % buckets), 1)
    return neighbours, others if others.any() else neighbours


def cluster_rows(counts: Floats, limit: int) -> Ints:
    """(K, H) counts -> (K,) cluster numbers 0..C-1, C <= limit, by like distributions.

    k-means on square roots of smoothed frequencies (Hellinger distance), each row weighing its
    count; deterministic. With K <= limit every row is its own cluster.
    """
    if len(counts) <= limit:
        return np.arange(len(counts))
    marginal = _marginal(counts, np.full(counts.shape[1], 1 / counts.shape[1]), 1.0)
    features = np.sqrt(_drawn(counts, marginal[None], 8.0))
    weights = counts.sum(1) + 1
    centers = features[_spread_seeds(features, weights, limit)]
    for _ in range(_KMEANS_STEPS):
        nearest = (features @ centers.T * 2 - (centers**2).sum(1)).argmax(1)
        for cluster in range(limit):
            members = nearest == cluster
            if members.any():
                centers[cluster] = np.average(features[members], 0, weights[members])
    numbers: Ints = np.unique(nearest, return_inverse=True)[1].astype(np.int64)
    return numbers


def _spread_seeds(features: Floats, weights: Floats, count: int) -> list[int]:
    """Rows to start from: the heaviest, then each the one of largest weight * distance^2."""
    seeds = [int(weights.argmax())]
    distance = np.full(len(features), np.inf)
    while len(seeds) < count:
        distance = np.minimum(distance, ((features - features[seeds[-1]]) ** 2).sum(1))
        seeds.append(int((weights * distance).argmax()))
    return seeds
