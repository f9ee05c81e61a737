"""Entropy tables: the static integer frequencies that rANS frames are coded with.

Every table is (rows, alphabet) of frequencies in 1/65536; a context picks the row. C base
clusters and D other clusters group the K codes, so that contexts stay few. With s = max_support,
n = denominator, t the number of codes of a latent, P(n, t) partitions and C(n-1, t-1)
compositions of n into t parts:

    name             rows             alphabet     codes
    base             (C + 1)^2        K            heaviest index | clusters to the left and above
    support          C                s            t - 1          | cluster of the heaviest index
    partition{t}     1                P(n, t)      weights, heaviest first
    other            D                K            another index  | cluster of the heaviest index
    mode             25               4            SKIP, REWEIGHT, SWAP1, NEW | modes left, above
    new              D                K            heaviest index | cluster of the reference's
    reweight{t}      P(n, t)          C(n-1, t-1)  weights        | partition of the reference
    slot{t}          1                t            slot that is replaced
    swap             D                K            index put in   | cluster of the index taken out
    swap_weights{t}  P(n, t)          C(n-1, t-1)  weights        | partition of the reference

t runs over 2..s. A table whose alphabet would have one symbol does not exist; nor do `support`
and `other` with s = 1. Row of two neighbours: left * (C + 1) + above, where C (for modes: 4)
stands for outside the tile. Knows nothing of frames, files or how the counts were made.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scq.bitstream.rans import TOTAL
from scq.bitstream.weights import check_profile, partitions
from scq.errors import ScqError, UnsupportedOperation
from scq.lattice import LatticeCode

MAX_TABLE_CODES = 8192
NUM_MODES = 4
MODE_ROWS = (NUM_MODES + 1) ** 2
_CLUSTERS = ("base_cluster", "other_cluster")

Frequencies = NDArray[np.uint16]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
CumulativeRows = tuple[tuple[int, ...], ...]


def table_shapes(code: LatticeCode, num_base: int, num_other: int) -> dict[str, tuple[int, int]]:
    """(rows, alphabet) of every table that exists for `code` with C and D clusters."""
    num_codes, size = code.num_codes, code.max_support
    shapes = {
        "base": ((num_base + 1) ** 2, num_codes),
        "support": (num_base, size),
        "mode": (MODE_ROWS, NUM_MODES),
        "new": (num_other, num_codes),
        "swap": (num_other, num_codes),
    }
    if size > 1:
        shapes["other"] = (num_other, num_codes)
    for t in range(2, size + 1):
        weights = (len(partitions(code.denominator, t)), math.comb(code.denominator - 1, t - 1))
        shapes[f"partition{t}"] = (1, weights[0])
        shapes[f"slot{t}"] = (1, t)
        shapes[f"reweight{t}"] = weights
        shapes[f"swap_weights{t}"] = weights
    return {name: shape for name, shape in shapes.items() if shape[1] > 1}


@functools.cache
def symbol_costs() -> Ints:
    """(65537,) int64: cost in 1/256 bit of a symbol by its frequency; integers, so that encoders
    choose alike everywhere. A frequency of 0 stands for no symbol and costs nothing."""
    frequencies = np.arange(TOTAL + 1, dtype=np.float64)
    frequencies[0] = TOTAL
    costs: Ints = np.rint(256 * (16 - np.log2(frequencies))).astype(np.int64)
    costs.setflags(write=False)
    return costs


@dataclass(frozen=True, eq=False)
class EntropyTables:
    """Cluster maps (K,) uint16 and frequency tables (rows, alphabet) uint16 by name.

    Raises:
        UnsupportedOperation: a code without a profile or with more than 8192 codes.
        ScqError: a map or table missing, unknown, of a wrong shape or out of range, naming it.
    """

    code: LatticeCode
    base_cluster: Frequencies
    other_cluster: Frequencies
    frequencies: Mapping[str, Frequencies]

    def __post_init__(self) -> None:
        check_profile(self.code)
        if self.code.num_codes > MAX_TABLE_CODES:
            raise UnsupportedOperation(
                f"{self.code.num_codes} codes are too many for entropy tables, the limit is "
                f"{MAX_TABLE_CODES}; use RAW frames"
            )
        for name in _CLUSTERS:
            _check_clusters(name, getattr(self, name), self.code.num_codes)
        shapes = table_shapes(self.code, self.num_base_clusters, self.num_other_clusters)
        if shapes.keys() != self.frequencies.keys():
            odd = ", ".join(sorted(shapes.keys() ^ self.frequencies.keys()))
            raise ScqError(f"entropy tables missing or unknown for {self.code}: {odd}")
        for name, shape in shapes.items():
            _check_table(name, self.frequencies[name], shape)

    @functools.cached_property
    def num_base_clusters(self) -> int:
        """C: base clusters, one more than the highest number in the map."""
        return int(self.base_cluster.max()) + 1

    @functools.cached_property
    def num_other_clusters(self) -> int:
        """D: other clusters, one more than the highest number in the map."""
        return int(self.other_cluster.max()) + 1

    @functools.cached_property
    def cumulative(self) -> dict[str, CumulativeRows]:
        """Per table, per row: alphabet + 1 cumulative frequencies from 0 to 65536."""
        return {
            name: tuple(map(tuple, np.pad(table.cumsum(1, np.int64), ((0, 0), (1, 0))).tolist()))
            for name, table in self.frequencies.items()
        }

    @functools.cached_property
    def costs(self) -> dict[str, Ints]:
        """Per table (rows, alphabet) int64: what each symbol takes, in 1/256 bit."""
        return {name: symbol_costs()[table] for name, table in self.frequencies.items()}

    @functools.cached_property
    def bits(self) -> dict[str, Floats]:
        """`costs` in bits, float64."""
        return {name: costs / 256 for name, costs in self.costs.items()}

    @functools.cached_property
    def base_clusters(self) -> tuple[int, ...]:
        """`base_cluster` as Python integers."""
        return tuple(self.base_cluster.tolist())

    @functools.cached_property
    def other_clusters(self) -> tuple[int, ...]:
        """`other_cluster` as Python integers."""
        return tuple(self.other_cluster.tolist())

    def has(self, name: str) -> bool:
        """Whether the table exists; the symbol of a table that does not is 0 and takes no bits."""
        return name in self.frequencies

    def row(self, name: str, row: int) -> tuple[int, ...]:
        """One row's cumulative frequencies, for a decoder."""
        return self.cumulative[name][row]

    def interval(self, name: str, row: int, symbol: int) -> tuple[int, int]:
        """Start and frequency of a symbol, for an encoder."""
        cumulative = self.cumulative[name][row]
        return cumulative[symbol], cumulative[symbol + 1] - cumulative[symbol]

    @property
    def num_bytes(self) -> int:
        """What the maps and tables take in a model file."""
        arrays = (self.base_cluster, self.other_cluster, *self.frequencies.values())
        return sum(array.nbytes for array in arrays)

    def to_tensors(self) -> dict[str, Tensor]:
        """uint16 tensors by name, for a safetensors file."""
        arrays = {name: getattr(self, name) for name in _CLUSTERS} | dict(self.frequencies)
        return {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}

    @classmethod
    def from_tensors(cls, mapping: Mapping[str, Tensor], code: LatticeCode) -> EntropyTables:
        """Inverse of `to_tensors`; any integer dtype will do. Raises as the class, checked."""
        arrays = {name: _to_uint16(name, tensor) for name, tensor in mapping.items()}
        missing = [name for name in _CLUSTERS if name not in arrays]
        if missing:
            raise ScqError(f"entropy tables lack {', '.join(missing)}")
        base, other = (arrays.pop(name) for name in _CLUSTERS)
        return cls(code, base, other, arrays)


def _to_uint16(name: str, tensor: Tensor) -> Frequencies:
    if tensor.is_floating_point() or tensor.is_complex():
        raise ScqError(f"entropy tensor {name} is {tensor.dtype}, it must hold integers")
    values = tensor.detach().cpu().numpy()
    if values.size and not 0 <= int(values.min()) <= int(values.max()) < TOTAL:
        raise ScqError(f"entropy tensor {name} holds values outside 0..{TOTAL - 1}")
    return values.astype(np.uint16)


def _check_clusters(name: str, clusters: Frequencies, num_codes: int) -> None:
    if clusters.dtype != np.uint16 or clusters.shape != (num_codes,):
        raise ScqError(
            f"{name} is {clusters.dtype} {clusters.shape}, it must be uint16 ({num_codes},)"
        )
    if int(clusters.max()) >= num_codes:
        raise ScqError(f"{name} names cluster {int(clusters.max())} of {num_codes} codes")


def _check_table(name: str, table: Frequencies, shape: tuple[int, int]) -> None:
    if table.dtype != np.uint16 or table.shape != shape:
        raise ScqError(f"table {name} is {table.dtype} {table.shape}, it must be uint16 {shape}")
    if int(table.min()) < 1:
        raise ScqError(f"table {name} holds a frequency of 0; each must be >= 1")
    sums = table.sum(1, dtype=np.int64)
    wrong = np.flatnonzero(sums != TOTAL)
    if wrong.size:
        raise ScqError(
            f"row {wrong[0]} of table {name} sums to {sums[wrong[0]]} instead of {TOTAL}"
        )
