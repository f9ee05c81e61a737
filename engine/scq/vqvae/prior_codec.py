"""Code grids to bytes under a prior's own probabilities. EXPERIMENTAL AND NOT PORTABLE.

This is not the normative SCQ1 format and not for the wire: it is for archives and experiments on
ONE platform. The probabilities come from float convolutions, whose last bits differ between
library versions, processors and thread counts, and one differing bit makes everything after it
unreadable. So the network always runs on the CPU in float32, its probabilities are rounded to
16-bit integer frequencies, the encoder walks the very same sequence of calls as the decoder (one
position after the other, never the whole grid at once), and a stream names its platform
(`platform_fingerprint`: torch version, processor, CPU capability, thread count) and its prior;
another platform or prior is refused. A checksum of the symbols catches what is left.

Stream, little-endian: "SP", version 1, S; rows, columns (2 bytes each); platform digest (8);
prior digest (4); CRC-32 of the symbols as int32 (4); one rANS stream.
"""

from __future__ import annotations

import copy
import hashlib
import platform
import struct
import zlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from scq.bitstream import rans
from scq.errors import CorruptCodes, InvalidLatents, UnsupportedOperation
from scq.vqvae.prior import NO_CONDITIONS, Allowed, CodePrior, Conditions, allow_all

_HEADER = struct.Struct("<2sBBHH8s4sI")
HEADER_BYTES = _HEADER.size
_MAGIC, _VERSION = b"SP", 1
# One network call per position: a bound on the work of a hostile header.
_MAX_POSITIONS = 1 << 16


def platform_fingerprint() -> str:
    """What the prior's float results depend on, as far as this process can tell."""
    capability = torch.backends.cpu.get_cpu_capability()
    onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return (
        f"torch {torch.__version__}, {platform.machine()} {capability}, "
        f"{torch.get_num_threads()} threads, oneDNN {onednn}"
    )


class PriorCodec:
    """Codes single grids (1, h, w, S) with a copy of the prior; see the module's warning.

    allowed: what symbols may be, see `Quantizer.allowed`; the same for both directions.
    """

    def __init__(self, prior: CodePrior, allowed: Allowed = allow_all) -> None:
        self._prior = copy.deepcopy(prior).cpu().float().eval().requires_grad_(False)
        self._allowed = allowed
        self._digest = _prior_digest(self._prior)

    def encode(self, grid: Tensor, conditions: Conditions = NO_CONDITIONS) -> bytes:
        """(1, h, w, S) int64 -> bytes. Raises InvalidLatents."""
        symbols = grid.cpu()
        self._check(symbols)
        rows, columns = symbols.shape[1:3]
        seen = torch.zeros_like(symbols)
        intervals = []
        for (row, column, position), cumulative in self._walk(seen, conditions):
            symbol = int(symbols[0, row, column, position])
            seen[0, row, column, position] = symbol
            if len(cumulative) > 2:
                start = cumulative[symbol]
                intervals.append((start, cumulative[symbol + 1] - start))
        header = _HEADER.pack(
            _MAGIC, _VERSION, symbols.shape[3], rows, columns, _platform_digest(), self._digest,
            _checksum(symbols),
        )  # fmt: skip
        return header + rans.encode_intervals(intervals)

    def decode(self, data: bytes, conditions: Conditions = NO_CONDITIONS) -> Tensor:
        """Inverse of `encode`: (1, h, w, S) int64.

        Raises:
            UnsupportedOperation: coded on another platform, or with another prior.
            CorruptCodes: anything else that is not such a stream.
        """
        rows, columns, checksum = self._read_header(data)
        grid = torch.zeros(1, rows, columns, len(self._prior.config.alphabets), dtype=torch.int64)
        decoder = rans.Decoder(data[HEADER_BYTES:])
        for (row, column, position), cumulative in self._walk(grid, conditions):
            grid[0, row, column, position] = decoder.read(cumulative)
        decoder.close()
        if _checksum(grid) != checksum:
            raise CorruptCodes("symbols differ from those coded; the bytes or the platform changed")
        return grid

    def _walk(
        self, grid: Tensor, conditions: Conditions
    ) -> Iterator[tuple[tuple[int, int, int], list[int]]]:
        """Every symbol's place with its cumulative frequencies, told by `grid` as filled so far."""
        conditions = Conditions(_on_cpu(conditions.grid), _on_cpu(conditions.labels))
        for row in range(grid.shape[1]):
            for column in range(grid.shape[2]):
                features = self._prior.features_at(grid, row, column, conditions)
                for position in range(grid.shape[3]):
                    before = grid[:, row, column, :position]
                    logits = self._prior.head(features, before, self._allowed)
                    yield (row, column, position), _cumulative(logits[0])

    def _read_header(self, data: bytes) -> tuple[int, int, int]:
        """rows, columns, checksum."""
        if len(data) < HEADER_BYTES:
            raise CorruptCodes(f"codes have {len(data)} bytes, their header has {HEADER_BYTES}")
        magic, version, symbols, rows, columns, machine, prior, checksum = _HEADER.unpack_from(data)
        if (magic, version) != (_MAGIC, _VERSION):
            raise CorruptCodes(f"codes start with {magic!r}, {version}: not a prior's stream")
        if machine != _platform_digest():
            raise UnsupportedOperation(
                f"coded on another platform; this one is {platform_fingerprint()}. Decode where it "
                "was coded, with as many threads, or code with static tables"
            )
        if prior != self._digest or symbols != len(self._prior.config.alphabets):
            raise UnsupportedOperation(
                f"coded with prior {prior.hex()}, this is {self._digest.hex()}; load that one"
            )
        if not 0 < rows * columns <= _MAX_POSITIONS:
            raise CorruptCodes(f"a grid of {rows}x{columns}, not 1..{_MAX_POSITIONS} positions")
        return rows, columns, checksum

    def _check(self, symbols: Tensor) -> None:
        sizes = torch.tensor(self._prior.config.alphabets)
        if symbols.ndim != 4 or len(symbols) != 1 or symbols.shape[3] != len(sizes):
            raise InvalidLatents(
                f"grid must be (1, h, w, {len(sizes)}), got {tuple(symbols.shape)}"
            )
        if not 0 < symbols.shape[1] * symbols.shape[2] <= _MAX_POSITIONS:
            raise InvalidLatents(f"a grid has 1..{_MAX_POSITIONS} positions, got {symbols.shape}")
        if bool(((symbols < 0) | (symbols >= sizes)).any()):
            raise InvalidLatents(f"a symbol is outside its alphabet, sizes {sizes.tolist()}")


def _cumulative(logits: Tensor) -> list[int]:
    """Cumulative 16-bit frequencies; [0, 65536] alone where only symbol 0 is possible."""
    if bool(torch.isneginf(logits[1:]).all()):
        return [0, rans.TOTAL]
    shares = torch.softmax(logits.double(), dim=0).numpy()
    frequencies = rans.quantize_frequencies(shares[None])[0]
    return [0, *np.cumsum(frequencies).tolist()]


def _on_cpu(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.cpu()


def _checksum(grid: Tensor) -> int:
    return zlib.crc32(grid.numpy().astype("<i4").tobytes())


def _platform_digest() -> bytes:
    return hashlib.sha256(platform_fingerprint().encode()).digest()[:8]


def _prior_digest(prior: CodePrior) -> bytes:
    digest = hashlib.sha256(repr(prior.config).encode())
    for name, tensor in sorted(prior.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.digest()[:4]
