"""`scq.bitstream` on the native codec: the same functions, bytes and errors, some 100 times faster.

Where the native library is not installed these are the reference's own functions. Whatever the
native codec refuses goes to the reference, which is normative and says precisely what is wrong.
"""

from __future__ import annotations

import functools

import torch

from scq import bitstream
from scq.bitstream import EntropyTables, KeyHeader, PackedFrame, UnpackedFrame, parse_header
from scq.bitstream.canonical import Grid
from scq.bitstream.changes import MODE_NAMES
from scq.bitstream.frame import EntropyChoice
from scq.bitstream.header import MAX_TILE
from scq.lattice import LatticeAssignment, LatticeCode
from vqkernels import KernelError, native_status
from vqkernels.scq1 import Scq1Codes, Scq1Frame, Scq1Model, Scq1Options, Scq1Tables


def pack_key_frame(
    header: KeyHeader,
    assignment: LatticeAssignment,
    code: LatticeCode,
    grid: Grid,
    *,
    tables: EntropyTables | None = None,
    tile: int | None = None,
    entropy: EntropyChoice = "auto",
) -> PackedFrame:
    """As `scq.bitstream.pack_key_frame`."""
    if _has_native() and (tile is None or 1 <= tile <= MAX_TILE):
        options = Scq1Options(
            header.model_hash, header.width, header.height, header.letterboxed, tile or 0, entropy
        )
        try:
            return _packed(_model(code, tables).pack(_codes(assignment), grid, options))
        except KernelError:
            pass  # the reference says why
    return bitstream.pack_key_frame(
        header, assignment, code, grid, tables=tables, tile=tile, entropy=entropy
    )


def pack_delta_frame(
    model_hash: bytes,
    assignment: LatticeAssignment,
    code: LatticeCode,
    grid: Grid,
    *,
    reference: LatticeAssignment,
    tables: EntropyTables | None,
    tile: int | None = None,
) -> PackedFrame:
    """As `scq.bitstream.pack_delta_frame`."""
    fits = len(model_hash) == 4 and (tile is None or 1 <= tile <= MAX_TILE)
    if _has_native() and fits:
        options = Scq1Options(model_hash, tile=tile or 0)
        try:
            model = _model(code, tables)
            frame = model.pack(_codes(assignment), grid, options, _codes(reference))
            return _packed(frame, is_delta=True)
        except KernelError:
            pass  # the reference says why
    return bitstream.pack_delta_frame(
        model_hash, assignment, code, grid, reference=reference, tables=tables, tile=tile
    )


def unpack(
    codes: bytes,
    code: LatticeCode,
    grid: Grid,
    *,
    tables: EntropyTables | None = None,
    reference: LatticeAssignment | None = None,
    allow_partial: bool = False,
) -> UnpackedFrame:
    """As `scq.bitstream.unpack`."""
    if _has_native():
        before = None if reference is None else _codes(reference)
        try:
            found, complete = _model(code, tables).unpack(
                codes, grid, reference=before, allow_partial=allow_partial
            )
            header = parse_header(codes, allow_partial=True)
            assignment = LatticeAssignment(
                torch.from_numpy(found.indices), torch.from_numpy(found.numerators)
            )
            return UnpackedFrame(assignment, complete, header)
        except KernelError:
            pass  # the reference says why
    return bitstream.unpack(
        codes, code, grid, tables=tables, reference=reference, allow_partial=allow_partial
    )


@functools.cache
def _has_native() -> bool:
    return native_status().available


@functools.lru_cache(maxsize=16)
def _model(code: LatticeCode, tables: EntropyTables | None) -> Scq1Model:
    native = None
    if tables is not None:
        native = Scq1Tables(tables.base_cluster, tables.other_cluster, tables.frequencies)
    return Scq1Model(code.num_codes, code.max_support, code.denominator, native)


def _codes(assignment: LatticeAssignment) -> Scq1Codes:
    return Scq1Codes(assignment.indices.cpu().numpy(), assignment.numerators.cpu().numpy())


def _packed(frame: Scq1Frame, *, is_delta: bool = False) -> PackedFrame:
    modes = dict(zip(MODE_NAMES, frame.modes, strict=True)) if is_delta else {}
    return PackedFrame(frame.codes, "rans" if frame.is_rans else "raw", frame.base_bytes, modes)
