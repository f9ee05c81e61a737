"""How each latent of a frame differs from the same latent of its reference.

SKIP: equal. REWEIGHT: same codes, other weights. SWAP1: as many codes, one of them replaced.
NEW: anything. More than one mode may fit a change; an encoder takes the cheapest. Knows nothing
of costs or bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scq.bitstream.canonical import Latents
from scq.bitstream.weights import composition_numbers, key, partition_numbers

SKIP, REWEIGHT, SWAP1, NEW = range(4)
MODE_NAMES = ("skip", "reweight", "swap1", "new")

Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]
Numbering = Callable[[int, int], Ints]


@dataclass(frozen=True)
class Changes:
    """Arrays (N,). sizes, partitions: number of codes and partition number of the reference.

    same, reweights, swaps: which modes beside NEW would be exact. slots, inserted: for SWAP1, the
    slot of the reference that is replaced and the index put there. compositions: for REWEIGHT and
    SWAP1, the number of the new weights in the slot order of the reference.
    """

    sizes: Ints
    partitions: Ints
    same: Flags
    reweights: Flags
    swaps: Flags
    slots: Ints
    inserted: Ints
    compositions: Ints

    @property
    def simplest(self) -> Ints:
        """(N,) the first mode that is exact."""
        choices = [self.same, self.reweights, self.swaps]
        modes: Ints = np.select(choices, [SKIP, REWEIGHT, SWAP1], NEW).astype(np.int64)
        return modes


def compare(reference: Latents, current: Latents, denominator: int) -> Changes:
    """What changed between two canonical sets of N latents."""
    used, used_now = reference.numerators > 0, current.numerators > 0
    # matches[k, a, b]: slot a of the reference holds the code of slot b now.
    matches = reference.indices[:, :, None] == current.indices[:, None, :]
    matches &= used[:, :, None] & used_now[:, None, :]
    lost, gained = used & ~matches.any(2), used_now & ~matches.any(1)
    sizes = reference.sizes
    same_size = sizes == current.sizes
    same = same_size & (reference.indices == current.indices).all(1)
    same &= (reference.numerators == current.numerators).all(1)
    slots, gained_slots = lost.argmax(1), gained.argmax(1)
    rows = np.arange(len(reference))
    kept = np.take_along_axis(current.numerators, matches.argmax(2), 1)
    weights = np.where(lost, current.numerators[rows, gained_slots][:, None], kept)
    weights = np.where(used, weights, 0)
    return Changes(
        sizes=sizes,
        partitions=_numbers(reference.numerators, sizes, denominator, partition_numbers),
        same=same,
        reweights=same_size & ~lost.any(1) & ~same,
        swaps=same_size & (lost.sum(1) == 1),
        slots=slots,
        inserted=current.indices[rows, gained_slots],
        compositions=_numbers(weights, sizes, denominator, composition_numbers),
    )


def partition_rows(latents: Latents, denominator: int) -> Ints:
    """(N,) the partition number of each latent's weights."""
    return _numbers(latents.numerators, latents.sizes, denominator, partition_numbers)


def _numbers(weights: Ints, sizes: Ints, denominator: int, numbering: Numbering) -> Ints:
    numbers = np.zeros(len(weights), np.int64)
    for size in range(1, weights.shape[1] + 1):
        rows = np.flatnonzero(sizes == size)
        table = numbering(denominator, size)
        numbers[rows] = table[key(weights[rows, :size], denominator)]
    return numbers
