"""SCQ1, version 2: lattice assignments to bytes and back, with integers only.

docs/scq1.md is the specification; this package is its reference implementation. It knows nothing
of images, networks or where a model comes from.
"""

from __future__ import annotations

from scq.bitstream.fitting import CodedGrid, fit_tables
from scq.bitstream.frame import (
    PackedFrame,
    UnpackedFrame,
    pack_delta,
    pack_delta_frame,
    pack_key,
    pack_key_frame,
    unpack,
)
from scq.bitstream.header import FrameHeader, KeyHeader, parse_header
from scq.bitstream.tables import EntropyTables

__all__ = [
    "CodedGrid",
    "EntropyTables",
    "FrameHeader",
    "KeyHeader",
    "PackedFrame",
    "UnpackedFrame",
    "fit_tables",
    "pack_delta",
    "pack_delta_frame",
    "pack_key",
    "pack_key_frame",
    "parse_header",
    "unpack",
]
