"""The bitshift trellis code: its codebooks, and the definition in numpy of encoding and decoding.

A column of weights is one stream of bits, least significant first. Symbol r is the bits
[r * bits, (r + 1) * bits); the state after row r is the `trellis_bits` bits that end there, zeros
before the stream. State s means the level `table[(s * multiplier mod 2**trellis_bits) >>
(trellis_bits - 8)]`, an int8.

Trellis-coded quantization: Marcellin and Fischer (1990); bitshift trellises with computed codes for
weights: Tseng et al., "QTIP" (2024). One multiply hashes the state; the table behind it is trained
on Gaussian samples by Lloyd's iteration (`trellis_search.py`).

Knows nothing of layers, scales or files.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from vqkernels import NativeUnavailableError
from vqkernels.trellis import MAX_BITS, MAX_STATE_BITS, MIN_STATE_BITS, Trellis, decode_trellis
from vqllm.errors import InvalidConfig

TABLE_SIZE: Final = 256
DEVIATION: Final = 32.0  # of the Gaussian that the shipped tables are trained on
_CODEBOOKS: Final = "trellis_codebooks.json"
_UNREACHABLE: Final = np.float32(1e30)
_RENORMALIZE_ROWS: Final = 32

Codes = NDArray[np.uint8]
Levels = NDArray[np.int8]
Floats = NDArray[np.float32]
States = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class TrellisCodebook:
    """The levels of every state; one per (bits, trellis_bits) serves a whole model.

    Attributes:
        bits: per weight, 1..5.
        trellis_bits: of a state, 10..16.
        multiplier: odd, below 2**trellis_bits.
        table: int8 (256,).

    Raises:
        InvalidConfig: a value is out of range.
    """

    bits: int
    trellis_bits: int
    multiplier: int
    table: Levels

    def __post_init__(self) -> None:
        check_size(self.bits, self.trellis_bits)
        if self.multiplier % 2 == 0 or not 0 < self.multiplier < 1 << self.trellis_bits:
            allowed = f"odd and below {1 << self.trellis_bits}"
            raise InvalidConfig("multiplier", self.multiplier, allowed)
        if self.table.shape != (TABLE_SIZE,) or self.table.dtype != np.int8:
            described = f"{self.table.dtype} {self.table.shape}"
            raise InvalidConfig("table", described, f"int8 ({TABLE_SIZE},)")

    @property
    def key(self) -> str:
        """Name of this size in a file: "2x12"."""
        return codebook_key(self.bits, self.trellis_bits)

    @property
    def rms(self) -> float:
        """Root mean square of the levels."""
        return float(np.sqrt(np.square(self.table.astype(np.float64)).mean()))

    def stream_bytes(self, num_rows: int) -> int:
        """Bytes of a column of `num_rows` weights."""
        return -(-num_rows * self.bits // 8)

    def native(self) -> Trellis:
        """The same code as the native library takes it."""
        return Trellis(self.bits, self.trellis_bits, self.multiplier, self.table)

    def level_of(self, states: States) -> Levels:
        """Levels of states, any shape."""
        hashed = (states * self.multiplier) & ((1 << self.trellis_bits) - 1)
        levels: Levels = self.table[hashed >> (self.trellis_bits - 8)]
        return levels

    def to_dict(self) -> dict[str, Any]:
        """Fit for JSON, as it is stored beside a model under `key`."""
        return {"multiplier": self.multiplier, "table": self.table.tolist()}

    @classmethod
    def from_dict(cls, key: str, fields: Mapping[str, Any]) -> TrellisCodebook:
        """Inverse of `to_dict`.

        Raises:
            InvalidConfig: the key or a field is malformed.
        """
        bits, _, trellis_bits = key.partition("x")
        levels = np.asarray(fields.get("table", ()))
        if not (bits.isdecimal() and trellis_bits.isdecimal()):
            raise InvalidConfig("codebook", key, 'bits and trellis bits, as "2x12"')
        if levels.dtype.kind != "i" or levels.size == 0 or np.abs(levels).max() > 128:
            raise InvalidConfig("table", levels.dtype, f"{TABLE_SIZE} integers of 8 bits")
        multiplier = int(fields.get("multiplier", 0))
        return cls(int(bits), int(trellis_bits), multiplier, levels.astype(np.int8))


def codebook_key(bits: int, trellis_bits: int) -> str:
    """Name of a codebook of this size in a file."""
    return f"{bits}x{trellis_bits}"


def check_size(bits: int, trellis_bits: int) -> None:
    """Raise InvalidConfig unless a trellis of this size exists."""
    if not 1 <= bits <= MAX_BITS:
        raise InvalidConfig("bits", bits, f"1 to {MAX_BITS}")
    if not MIN_STATE_BITS <= trellis_bits <= MAX_STATE_BITS:
        raise InvalidConfig("trellis_bits", trellis_bits, f"{MIN_STATE_BITS} to {MAX_STATE_BITS}")


@functools.cache
def shipped_codebooks() -> Mapping[str, TrellisCodebook]:
    """The codebooks that come with this package, by key."""
    text = importlib.resources.files(__package__).joinpath(_CODEBOOKS).read_text(encoding="utf-8")
    fields = json.loads(text)
    return {key: TrellisCodebook.from_dict(key, value) for key, value in fields.items()}


def codebook_of(bits: int, trellis_bits: int) -> TrellisCodebook:
    """The shipped codebook of this size.

    Raises:
        InvalidConfig: none is shipped.
    """
    check_size(bits, trellis_bits)
    key = codebook_key(bits, trellis_bits)
    books = shipped_codebooks()
    if key not in books:
        raise InvalidConfig("bits x trellis_bits", key, f"one of {', '.join(sorted(books))}")
    return books[key]


def decode(codebook: TrellisCodebook, codes: Codes, num_rows: int) -> Levels:
    """Levels int8 (columns, num_rows) of codes uint8 (columns, stream bytes).

    Uses the native library where there is one; the result is the same without.
    """
    try:
        return decode_trellis(codebook.native(), np.ascontiguousarray(codes), num_rows)
    except NativeUnavailableError:
        return decode_reference(codebook, codes, num_rows)


def decode_reference(codebook: TrellisCodebook, codes: Codes, num_rows: int) -> Levels:
    """`decode` in numpy."""
    return codebook.level_of(states_of(codebook, codes, num_rows))


def states_of(codebook: TrellisCodebook, codes: Codes, num_rows: int) -> States:
    """State after every row, (columns, num_rows), of codes (columns, stream bytes)."""
    before = 2  # zero bytes in front: a state reaches at most 15 bits back
    padded = np.pad(codes, ((0, 0), (before, 2))).astype(np.uint32)
    first_bit = (np.arange(num_rows) + 1) * codebook.bits - codebook.trellis_bits + 8 * before
    first_byte = first_bit >> 3
    window = (
        padded[:, first_byte]
        | padded[:, first_byte + 1] << np.uint32(8)
        | padded[:, first_byte + 2] << np.uint32(16)
    )
    states = window >> (first_bit & 7).astype(np.uint32)
    masked: States = (states & np.uint32((1 << codebook.trellis_bits) - 1)).astype(np.int64)
    return masked


def codes_of(codebook: TrellisCodebook, states: States) -> Codes:
    """The streams, uint8 (..., stream bytes), of paths of states (..., rows)."""
    symbols = states >> (codebook.trellis_bits - codebook.bits)
    planes = ((symbols[..., None] >> np.arange(codebook.bits)) & 1).astype(np.uint8)
    streams = planes.reshape(*states.shape[:-1], -1)
    return np.packbits(streams, axis=-1, bitorder="little")


def encode_reference(codebook: TrellisCodebook, targets: Floats, scales: Floats) -> States:
    """The path (rows,) of least sum of (target - scale * level)^2: Viterbi, in float32.

    targets, scales: float32 (rows,). Among equal predecessors and equal last states the one whose
    bits read backwards are the smallest number wins. The native encoder gives the same path.
    """
    reverse = _reversed_bits(codebook.trellis_bits)
    levels = codebook.level_of(reverse).astype(np.float32)
    branches, groups = 1 << codebook.bits, len(levels) >> codebook.bits
    costs = np.full(len(levels), _UNREACHABLE, np.float32)
    costs[0] = 0
    winners = np.empty((len(targets), groups), np.int64)
    for row, (target, scale) in enumerate(zip(targets, scales, strict=True)):
        predecessors = costs.reshape(branches, groups)
        winners[row] = predecessors.argmin(axis=0)
        error = target - scale * levels
        costs = np.repeat(predecessors.min(axis=0), branches) + error * error
        if (row + 1) % _RENORMALIZE_ROWS == 0:
            costs = costs - costs.min()
    path: States = reverse[_trace_back(winners, int(costs.argmin()), codebook.bits)]
    return path


def _trace_back(winners: States, state: int, bits: int) -> States:
    path = np.empty(len(winners), np.int64)
    for row in range(len(winners) - 1, -1, -1):
        path[row] = state
        group = state >> bits
        state = int(winners[row, group]) * winners.shape[1] + group
    return path


def _reversed_bits(num_bits: int) -> States:
    numbers = np.arange(1 << num_bits)
    planes = (numbers[:, None] >> np.arange(num_bits)) & 1
    reverse: States = planes @ (1 << np.arange(num_bits)[::-1])
    return reverse
