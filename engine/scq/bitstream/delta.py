"""rANS segments of a delta frame's tile: each latent as a change of the reference's.

Base layer, raster order: mode, given the modes to the left and above; for NEW the heaviest index
too, given the cluster of the reference's. Enhancement, raster order:

    SKIP      nothing: the latent is the reference's
    REWEIGHT  new weights as a composition over the reference's codes in their canonical order
    SWAP1     slot of the code that goes, index of the code that comes, weights as for REWEIGHT
    NEW       as a key frame

A base layer alone keeps the reference where the mode is not NEW. Knows nothing of frames.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scq.bitstream.canonical import Grid, Latents, single_codes
from scq.bitstream.changes import (
    MODE_NAMES,
    NEW,
    REWEIGHT,
    SKIP,
    SWAP1,
    Changes,
    compare,
    partition_rows,
)
from scq.bitstream.keyframe import (
    Neighbours,
    Slots,
    cheapest,
    cost_of,
    from_slots,
    read_solo,
    solo_cost,
    solo_forms,
    solo_intervals,
)
from scq.bitstream.rans import Decoder, Interval, encode_intervals
from scq.bitstream.tables import NUM_MODES, EntropyTables
from scq.bitstream.weights import compositions
from scq.errors import CorruptCodes

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class DeltaBase:
    """What a base layer says: (N,) modes, and (N,) heaviest indices where the mode is NEW."""

    modes: Ints
    leads: Ints

    def partial(self, reference: Latents, tables: EntropyTables) -> Latents:
        """The picture of the base layer alone."""
        new = (self.modes == NEW)[:, None]
        singles = single_codes(self.leads, tables.code)
        return Latents(
            np.where(new, singles.indices, reference.indices),
            np.where(new, singles.numerators, reference.numerators),
        )


@dataclass(frozen=True)
class EncodedDelta:
    """Both layers of a tile and how many latents took each mode."""

    base: bytes
    enhancement: bytes
    modes: Counter[str]


def encode_tile(
    latents: Latents, reference: Latents, grid: Grid, tables: EntropyTables
) -> EncodedDelta:
    """Each latent in the cheapest mode that is exact; SKIP wherever nothing changed."""
    return _Encoder(latents, reference, grid, tables).run()


class _Encoder:
    """State of one tile's encoding: contexts, and the symbols of both layers so far."""

    def __init__(
        self, latents: Latents, reference: Latents, grid: Grid, tables: EntropyTables
    ) -> None:
        self.tables = tables
        self.leads = reference.heaviest.tolist()
        self.removable = reference.indices.tolist()
        self.changes = _Lists(compare(reference, latents, tables.code.denominator))
        self.forms = solo_forms(latents, tables)
        self.contexts = Neighbours(grid, NUM_MODES)
        self.base: list[Interval] = []
        self.enhancement: list[Interval] = []
        self.modes: Counter[str] = Counter(dict.fromkeys(MODE_NAMES, 0))

    def run(self) -> EncodedDelta:
        for position in range(len(self.forms)):
            self._encode(position)
        base, enhancement = encode_intervals(self.base), encode_intervals(self.enhancement)
        return EncodedDelta(base, enhancement, self.modes)

    def _encode(self, position: int) -> None:
        row = self.contexts.row(position)
        new_row = self.tables.other_clusters[self.leads[position]]
        solo = cheapest(self.forms[position], "new", new_row, self.tables)
        changed = self._changed_intervals(position)
        mode = self._choose(position, row, solo_cost(solo, "new", new_row, self.tables), changed)
        self.contexts.set(position, mode)
        self.modes[MODE_NAMES[mode]] += 1
        self.base.append(self.tables.interval("mode", row, mode))
        if mode == NEW:
            self.base.append(self.tables.interval("new", new_row, solo.lead))
            self.enhancement += solo_intervals(solo, self.tables)
        elif mode != SKIP:
            self.enhancement += changed

    def _choose(self, position: int, row: int, new_cost: int, changed: list[Interval]) -> int:
        if self.changes.same[position]:
            return SKIP
        mode = self.changes.mode[position]
        if mode == NEW:
            return NEW
        costs = self.tables.costs["mode"][row]
        return mode if costs[mode] + cost_of(changed) <= costs[NEW] + new_cost else NEW

    def _changed_intervals(self, position: int) -> list[Interval]:
        """The enhancement of REWEIGHT or SWAP1, whichever is exact."""
        changes, tables = self.changes, self.tables
        mode, size = changes.mode[position], changes.sizes[position]
        if mode not in (REWEIGHT, SWAP1):
            return []
        intervals = []
        name = f"reweight{size}"
        if mode == SWAP1:
            name = f"swap_weights{size}"
            slot = changes.slots[position]
            if tables.has(f"slot{size}"):
                intervals.append(tables.interval(f"slot{size}", 0, slot))
            row = tables.other_clusters[self.removable[position][slot]]
            intervals.append(tables.interval("swap", row, changes.inserted[position]))
        if tables.has(name):
            row = changes.partitions[position]
            intervals.append(tables.interval(name, row, changes.compositions[position]))
        return intervals


class _Lists:
    """Changes as Python lists, which a loop reads faster than arrays."""

    def __init__(self, changes: Changes) -> None:
        self.mode: list[int] = changes.simplest.tolist()
        self.same: list[bool] = changes.same.tolist()
        self.sizes: list[int] = changes.sizes.tolist()
        self.slots: list[int] = changes.slots.tolist()
        self.inserted: list[int] = changes.inserted.tolist()
        self.partitions: list[int] = changes.partitions.tolist()
        self.compositions: list[int] = changes.compositions.tolist()


def decode_base(stream: bytes, reference: Latents, grid: Grid, tables: EntropyTables) -> DeltaBase:
    """Modes and new heaviest indices. Raises CorruptCodes."""
    contexts = Neighbours(grid, NUM_MODES)
    decoder = Decoder(stream)
    modes, leads = [], reference.heaviest.tolist()
    for position in range(grid[0] * grid[1]):
        mode = decoder.read(tables.row("mode", contexts.row(position)))
        contexts.set(position, mode)
        modes.append(mode)
        if mode == NEW:
            row = tables.row("new", tables.other_clusters[leads[position]])
            leads[position] = decoder.read(row)
    decoder.close()
    return DeltaBase(np.array(modes, np.int64), np.array(leads, np.int64))


def decode_enhancement(
    stream: bytes, base: DeltaBase, reference: Latents, tables: EntropyTables
) -> Latents:
    """The canonical latents. Raises CorruptCodes."""
    decoder = Decoder(stream)
    rows = partition_rows(reference, tables.code.denominator).tolist()
    old = _slots_of(reference)
    slots = []
    for mode, lead, before, row in zip(
        base.modes.tolist(), base.leads.tolist(), old, rows, strict=True
    ):
        if mode == NEW:
            slots.append(read_solo(decoder, lead, tables))
        else:
            slots.append(_READERS[mode](decoder, before, row, tables))
    decoder.close()
    return from_slots(slots, tables)


def _slots_of(latents: Latents) -> list[Slots]:
    sizes = latents.sizes.tolist()
    indices, numerators = latents.indices.tolist(), latents.numerators.tolist()
    return [(i[:t], w[:t]) for i, w, t in zip(indices, numerators, sizes, strict=True)]


def _read_skip(decoder: Decoder, before: Slots, row: int, tables: EntropyTables) -> Slots:
    return before


def _read_reweight(decoder: Decoder, before: Slots, row: int, tables: EntropyTables) -> Slots:
    codes = before[0]
    if not tables.has(f"reweight{len(codes)}"):
        raise CorruptCodes(f"REWEIGHT of a latent of {len(codes)} codes, whose weights are fixed")
    return codes, _read_weights(decoder, f"reweight{len(codes)}", row, tables, len(codes))


def _read_swap(decoder: Decoder, before: Slots, row: int, tables: EntropyTables) -> Slots:
    codes = list(before[0])
    slot = 0
    if tables.has(f"slot{len(codes)}"):
        slot = decoder.read(tables.row(f"slot{len(codes)}", 0))
    code = decoder.read(tables.row("swap", tables.other_clusters[codes[slot]]))
    if code in codes:
        raise CorruptCodes(f"SWAP1 puts in code {code}, which the latent has already")
    codes[slot] = code
    name = f"swap_weights{len(codes)}"
    return codes, _read_weights(decoder, name, row, tables, len(codes))


def _read_weights(
    decoder: Decoder, name: str, row: int, tables: EntropyTables, size: int
) -> list[int]:
    number = decoder.read(tables.row(name, row)) if tables.has(name) else 0
    return list(compositions(tables.code.denominator, size)[number])


_Reader = Callable[[Decoder, Slots, int, EntropyTables], Slots]
_READERS: dict[int, _Reader] = {SKIP: _read_skip, REWEIGHT: _read_reweight, SWAP1: _read_swap}
