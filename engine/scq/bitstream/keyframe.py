"""rANS segments of a key frame's tile, and the symbols of a latent coded by itself.

Base layer, raster order: the heaviest index, given the clusters of the indices to the left and
above. Enhancement, raster order: number of codes; their weights as a partition; the other
indices in the order of the partition. Where several codes share the largest weight the encoder
may put any of them into the base layer and takes the cheapest; contexts use what was coded, and
the decoder restores the canonical order. Knows nothing of frames and tiles beyond one grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scq.bitstream.canonical import Grid, Latents, sort_slots
from scq.bitstream.rans import Decoder, Interval, encode_intervals
from scq.bitstream.tables import EntropyTables, symbol_costs
from scq.bitstream.weights import partition_numbers, partitions
from scq.errors import CorruptCodes

Ints = NDArray[np.int64]
Slots = tuple[list[int], list[int]]


@dataclass(frozen=True)
class Solo:
    """One latent as coded by itself: indices in coding order, number of the partition."""

    indices: tuple[int, ...]
    partition: int

    @property
    def lead(self) -> int:
        """The index that goes into the base layer."""
        return self.indices[0]


def encode_tile(latents: Latents, grid: Grid, tables: EntropyTables) -> tuple[bytes, bytes]:
    """Base layer and enhancement of canonical latents, raster order."""
    contexts = Neighbours(grid, tables.num_base_clusters)
    base: list[Interval] = []
    enhancement: list[Interval] = []
    for position, solos in enumerate(solo_forms(latents, tables)):
        row = contexts.row(position)
        solo = cheapest(solos, "base", row, tables)
        contexts.set(position, tables.base_clusters[solo.lead])
        base.append(tables.interval("base", row, solo.lead))
        enhancement += solo_intervals(solo, tables)
    return encode_intervals(base), encode_intervals(enhancement)


def decode_base(stream: bytes, grid: Grid, tables: EntropyTables) -> Ints:
    """(N,) heaviest indices as coded. Raises CorruptCodes."""
    contexts = Neighbours(grid, tables.num_base_clusters)
    decoder = Decoder(stream)
    leads = []
    for position in range(grid[0] * grid[1]):
        lead = decoder.read(tables.row("base", contexts.row(position)))
        contexts.set(position, tables.base_clusters[lead])
        leads.append(lead)
    decoder.close()
    return np.array(leads, np.int64)


def decode_enhancement(stream: bytes, leads: Ints, tables: EntropyTables) -> Latents:
    """The canonical latents. Raises CorruptCodes."""
    decoder = Decoder(stream)
    slots = [read_solo(decoder, lead, tables) for lead in leads.tolist()]
    decoder.close()
    return from_slots(slots, tables)


class Neighbours:
    """Context rows of a raster scan: value to the left and above, `outside` beyond the edges."""

    def __init__(self, grid: Grid, outside: int) -> None:
        self._columns = grid[1]
        self._outside = outside
        self._values = [outside] * (grid[0] * grid[1])

    def row(self, position: int) -> int:
        """The table row of the latent at `position`, all before it being set."""
        columns = self._columns
        left = self._values[position - 1] if position % columns else self._outside
        up = self._values[position - columns] if position >= columns else self._outside
        return left * (self._outside + 1) + up

    def set(self, position: int, value: int) -> None:
        """What the latents to the right and below will see."""
        self._values[position] = value


def solo_forms(latents: Latents, tables: EntropyTables) -> list[list[Solo]]:
    """Per latent the forms it may be coded in: one for each code of the largest weight."""
    denominator = tables.code.denominator
    sizes = latents.sizes.tolist()
    ties = (latents.numerators == latents.numerators[:, :1]).sum(1).tolist()
    keys = latents.numerators @ ((denominator + 1) ** np.arange(latents.numerators.shape[1]))
    numbers = [partition_numbers(denominator, t)[k] for t, k in zip(sizes, keys, strict=True)]
    forms = []
    for row, size, tied, number in zip(
        latents.indices.tolist(), sizes, ties, map(int, numbers), strict=True
    ):
        codes = row[:size]
        forms.append([Solo((codes[i], *codes[:i], *codes[i + 1 :]), number) for i in range(tied)])
    return forms


def cheapest(solos: list[Solo], table: str, row: int, tables: EntropyTables) -> Solo:
    """The form of fewest bits when its lead is coded by that row; the first of equals."""
    if len(solos) == 1:
        return solos[0]
    return min(solos, key=lambda solo: solo_cost(solo, table, row, tables))


def solo_cost(solo: Solo, table: str, row: int, tables: EntropyTables) -> int:
    """Cost of one form in 1/256 bit, its lead coded by that row of `table`."""
    return int(tables.costs[table][row, solo.lead]) + cost_of(solo_intervals(solo, tables))


def cost_of(intervals: list[Interval]) -> int:
    """What the symbols take in 1/256 bit."""
    costs = symbol_costs()
    return sum(int(costs[frequency]) for _, frequency in intervals)


def solo_intervals(solo: Solo, tables: EntropyTables) -> list[Interval]:
    """The enhancement of one form."""
    lead, size = solo.lead, len(solo.indices)
    intervals = []
    if tables.has("support"):
        intervals.append(tables.interval("support", tables.base_clusters[lead], size - 1))
    if tables.has(f"partition{size}"):
        intervals.append(tables.interval(f"partition{size}", 0, solo.partition))
    row = tables.other_clusters[lead]
    return intervals + [tables.interval("other", row, code) for code in solo.indices[1:]]


def read_solo(decoder: Decoder, lead: int, tables: EntropyTables) -> Slots:
    """Indices and weights in coding order of a latent with that lead. Raises CorruptCodes."""
    size = 1
    if tables.has("support"):
        size += decoder.read(tables.row("support", tables.base_clusters[lead]))
    number = 0
    if tables.has(f"partition{size}"):
        number = decoder.read(tables.row(f"partition{size}", 0))
    codes = [lead]
    for _ in range(size - 1):
        code = decoder.read(tables.row("other", tables.other_clusters[lead]))
        if code in codes:
            raise CorruptCodes(f"a latent names code {code} twice")
        codes.append(code)
    return codes, list(partitions(tables.code.denominator, size)[number])


def from_slots(slots: list[Slots], tables: EntropyTables) -> Latents:
    """Latents of any slot order and up to s slots each, made canonical."""
    size = tables.code.max_support
    indices = np.array([codes + [0] * (size - len(codes)) for codes, _ in slots], np.int64)
    numerators = np.array([w + [0] * (size - len(w)) for _, w in slots], np.int64)
    shape = (len(slots), size)
    return sort_slots(indices.reshape(shape), numerators.reshape(shape), tables.code.num_codes)
