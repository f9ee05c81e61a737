"""The one form of an assignment that the bitstream numbers, and the checksum that names it.

Canonical: the heaviest code in slot 0, then descending weights, ties by lower index; an unused
slot has numerator 0 and repeats slot 0's index. Knows nothing of frames or entropy coding.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from scq.errors import CorruptCodes
from scq.lattice import LatticeAssignment, LatticeCode

Ints = NDArray[np.int64]
Grid = tuple[int, int]

_RECORD = np.dtype([("index", "<u2"), ("numerator", "u1")])


@dataclass(frozen=True)
class Latents:
    """Canonical (N, s) int64 indices and numerators of N latents."""

    indices: Ints
    numerators: Ints

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def heaviest(self) -> Ints:
        """(N,) the index in slot 0."""
        return self.indices[:, 0]

    @property
    def sizes(self) -> Ints:
        """(N,) how many codes each latent uses."""
        sizes: Ints = (self.numerators > 0).sum(1)
        return sizes

    def take(self, rows: Ints) -> Latents:
        """The latents of the given rows."""
        return Latents(self.indices[rows], self.numerators[rows])

    def to_assignment(self) -> LatticeAssignment:
        """The same as int64 tensors on the CPU."""
        return LatticeAssignment(torch.from_numpy(self.indices), torch.from_numpy(self.numerators))


def canonical(assignment: LatticeAssignment, code: LatticeCode) -> Latents:
    """The canonical form. Raises CorruptCodes for what `code` cannot hold."""
    indices = assignment.indices.cpu().numpy().astype(np.int64, copy=False)
    numerators = assignment.numerators.cpu().numpy().astype(np.int64, copy=False)
    _check_shapes(indices, numerators, code)
    latents = sort_slots(indices, numerators, code.num_codes)
    names = np.where(latents.numerators > 0, latents.indices, -1 - np.arange(code.max_support))
    names.sort(axis=1)
    if (np.diff(names, axis=1) == 0).any():
        raise CorruptCodes("an assignment names the same code twice")
    return latents


def sort_slots(indices: Ints, numerators: Ints, num_codes: int) -> Latents:
    """(N, s) slots in any order, unused ones anywhere, to canonical order; nothing is checked."""
    order = np.argsort(indices - num_codes * numerators, axis=1, kind="stable")
    indices = np.take_along_axis(indices, order, 1)
    numerators = np.take_along_axis(numerators, order, 1)
    return Latents(np.where(numerators > 0, indices, indices[:, :1]), numerators)


def single_codes(heaviest: Ints, code: LatticeCode) -> Latents:
    """Latents (N,) of one code each, with the whole weight: the base layer's picture."""
    indices = np.repeat(heaviest[:, None], code.max_support, axis=1)
    numerators = np.zeros_like(indices)
    numerators[:, 0] = code.denominator
    return Latents(indices, numerators)


def fingerprint(latents: Latents, grid: Grid) -> int:
    """CRC-32 (zlib) that names an assignment: what a delta frame says about its reference.

    Taken over rows and columns (2 bytes each), then every latent in raster order, every slot in
    canonical order: index (2 bytes), numerator (1 byte). Little-endian.
    """
    records = np.empty(latents.indices.shape, _RECORD)
    records["index"] = latents.indices
    records["numerator"] = latents.numerators
    return zlib.crc32(records.tobytes(), zlib.crc32(np.array(grid, "<u2").tobytes()))


def _check_shapes(indices: Ints, numerators: Ints, code: LatticeCode) -> None:
    shape = (len(indices), code.max_support)
    if indices.shape != shape or numerators.shape != shape:
        raise CorruptCodes(
            f"assignment has shapes {indices.shape} and {numerators.shape}, "
            f"the code needs (N, {code.max_support})"
        )
    if indices.size and not (indices.min() >= 0 and indices.max() < code.num_codes):
        raise CorruptCodes(
            f"index {int(indices.min())} or {int(indices.max())} is not in [0, {code.num_codes})"
        )
    if (numerators < 0).any() or (numerators.sum(1) != code.denominator).any():
        raise CorruptCodes(f"numerators must be >= 0 and sum to {code.denominator}")
