"""One model's frames behind one interface: the reference in Python, or its native twin.

Both make the same bytes and read the same frames, the native one several times faster. What
it refuses the reference reads again, because its errors say what is wrong. Knows nothing of
pictures or networks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from scq.bitstream.canonical import Grid, Latents, canonical
from scq.bitstream.changes import MODE_NAMES
from scq.bitstream.frame import (
    EntropyChoice,
    PackedFrame,
    UnpackedFrame,
    pack_delta_frame,
    pack_key_frame,
    unpack,
)
from scq.bitstream.header import MAX_TILE, KeyHeader, parse_header
from scq.bitstream.tables import EntropyTables
from scq.errors import ScqError
from scq.lattice import LatticeAssignment, LatticeCode
from vqkernels.scq1 import Scq1Codes, Scq1Error, Scq1Model, Scq1Options, Scq1Reason, Scq1Tables
from vqkernels.status import native_status

Backend = Literal["auto", "native", "python"]


@dataclass(frozen=True)
class KeyOptions:
    """How a key frame is coded: entropy coder, side of independent tiles in latents or None."""

    entropy: EntropyChoice = "auto"
    tile: int | None = None


class Coder(Protocol):
    """Packs and unpacks the frames of one model; safe to share between threads.

    Errors are those of `scq.bitstream.pack_key`, `pack_delta` and `unpack`.
    """

    def pack_key(
        self, header: KeyHeader, assignment: LatticeAssignment, grid: Grid, options: KeyOptions
    ) -> PackedFrame:
        """A key frame of a (rows, columns) grid."""
        ...

    def pack_delta(
        self,
        model_hash: bytes,
        assignment: LatticeAssignment,
        grid: Grid,
        reference: LatticeAssignment,
        tile: int | None,
    ) -> PackedFrame:
        """A delta frame against `reference` on the same grid."""
        ...

    def unpack(
        self,
        codes: bytes,
        grid: Grid,
        *,
        reference: LatticeAssignment | None = None,
        allow_partial: bool = False,
    ) -> UnpackedFrame:
        """The codes of a frame."""
        ...


def make_coder(code: LatticeCode, tables: EntropyTables | None, backend: Backend = "auto") -> Coder:
    """The coder of a model. "auto" is native where the library is there, else Python.

    Raises ScqError for "native" without the library.
    """
    if backend == "python":
        return PythonCoder(code, tables)
    status = native_status()
    if status.available:
        return NativeCoder(code, tables)
    if backend == "native":
        raise ScqError(f"no native codec: {status.reason}; use backend 'python' or 'auto'")
    return PythonCoder(code, tables)


@dataclass(frozen=True)
class PythonCoder:
    """The reference."""

    code: LatticeCode
    tables: EntropyTables | None

    def pack_key(
        self, header: KeyHeader, assignment: LatticeAssignment, grid: Grid, options: KeyOptions
    ) -> PackedFrame:
        """See Coder."""
        return pack_key_frame(
            header,
            assignment,
            self.code,
            grid,
            tables=self.tables,
            tile=options.tile,
            entropy=options.entropy,
        )

    def pack_delta(
        self,
        model_hash: bytes,
        assignment: LatticeAssignment,
        grid: Grid,
        reference: LatticeAssignment,
        tile: int | None,
    ) -> PackedFrame:
        """See Coder."""
        return pack_delta_frame(
            model_hash,
            assignment,
            self.code,
            grid,
            reference=reference,
            tables=self.tables,
            tile=tile,
        )

    def unpack(
        self,
        codes: bytes,
        grid: Grid,
        *,
        reference: LatticeAssignment | None = None,
        allow_partial: bool = False,
    ) -> UnpackedFrame:
        """See Coder."""
        return unpack(
            codes,
            self.code,
            grid,
            tables=self.tables,
            reference=reference,
            allow_partial=allow_partial,
        )


class NativeCoder:
    """The twin in csrc."""

    def __init__(self, code: LatticeCode, tables: EntropyTables | None) -> None:
        self._reference = PythonCoder(code, tables)
        self._code = code
        self._model = Scq1Model(
            code.num_codes,
            code.max_support,
            code.denominator,
            None
            if tables is None
            else Scq1Tables(tables.base_cluster, tables.other_cluster, tables.frequencies),
        )

    def pack_key(
        self, header: KeyHeader, assignment: LatticeAssignment, grid: Grid, options: KeyOptions
    ) -> PackedFrame:
        """See Coder."""
        native = Scq1Options(
            header.model_hash,
            header.width,
            header.height,
            header.letterboxed,
            options.tile or 0,
            options.entropy,
        )
        if not self._fits(assignment, grid, options.tile):
            return self._reference.pack_key(header, assignment, grid, options)
        try:
            frame = self._model.pack(self._codes(assignment), grid, native)
        except Scq1Error:
            return self._reference.pack_key(header, assignment, grid, options)
        return PackedFrame(frame.codes, "rans" if frame.is_rans else "raw", frame.base_bytes)

    def pack_delta(
        self,
        model_hash: bytes,
        assignment: LatticeAssignment,
        grid: Grid,
        reference: LatticeAssignment,
        tile: int | None,
    ) -> PackedFrame:
        """See Coder."""
        fits = self._fits(assignment, grid, tile) and self._fits(reference, grid, tile)
        if not fits or self._reference.tables is None:
            return self._reference.pack_delta(model_hash, assignment, grid, reference, tile)
        options = Scq1Options(model_hash, tile=tile or 0)
        now, before = self._codes(assignment), self._codes(reference)
        try:
            frame = self._model.pack(now, grid, options, before)
        except Scq1Error:
            return self._reference.pack_delta(model_hash, assignment, grid, reference, tile)
        modes = dict(zip(MODE_NAMES, frame.modes, strict=True))
        return PackedFrame(frame.codes, "rans", frame.base_bytes, modes)

    def unpack(
        self,
        codes: bytes,
        grid: Grid,
        *,
        reference: LatticeAssignment | None = None,
        allow_partial: bool = False,
    ) -> UnpackedFrame:
        """See Coder."""
        try:
            return self.unpack_natively(
                codes, grid, reference=reference, allow_partial=allow_partial
            )
        except Scq1Error:
            return self._reference.unpack(
                codes, grid, reference=reference, allow_partial=allow_partial
            )

    def unpack_natively(
        self,
        codes: bytes,
        grid: Grid,
        *,
        reference: LatticeAssignment | None = None,
        allow_partial: bool = False,
    ) -> UnpackedFrame:
        """`unpack` without a second opinion: raises Scq1Error where the library refuses."""
        header = parse_header(codes, allow_partial=allow_partial)
        # A key frame needs no reference, and one of another size must not matter to it.
        before = reference if header.is_delta else None
        if before is not None and not self._fits(before, grid, None):
            raise Scq1Error(Scq1Reason.REFERENCE)
        found, complete = self._model.unpack(
            codes,
            grid,
            reference=None if before is None else self._codes(before),
            allow_partial=allow_partial,
        )
        latents = Latents(found.indices, found.numerators)
        return UnpackedFrame(latents.to_assignment(), complete, header)

    def _fits(self, assignment: LatticeAssignment, grid: Grid, tile: int | None) -> bool:
        """Whether the arrays have the shapes that the native call takes for granted."""
        shape = (grid[0] * grid[1], self._code.max_support)
        tile_fits = tile is None or 1 <= tile <= MAX_TILE
        return tile_fits and assignment.indices.shape == assignment.numerators.shape == shape

    def _codes(self, assignment: LatticeAssignment) -> Scq1Codes:
        latents = canonical(assignment, self._code)
        return Scq1Codes(latents.indices, latents.numerators)
