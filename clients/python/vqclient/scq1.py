"""The header of an SCQ1 frame (docs/scq1.md), read without a model: size, type, codebook.

Enough for a client that stores or forwards codes; reading the codes themselves takes a model.
Knows bytes; knows no service.
"""

from __future__ import annotations

import binascii
import struct
from dataclasses import dataclass

from vqclient.types import EntropyMode, FrameType

MAGIC, VERSION = 0x53, 2
_DELTA, _RANS, _LETTERBOXED, _TILED = 1, 2, 4, 8
_FIXED = struct.Struct("<BB4sHH")
_MAX_SIDE = 0xFFFF


class HeaderError(ValueError):
    """Bytes that do not begin like an SCQ1 frame of this version."""


@dataclass(frozen=True)
class CodesHeader:
    """What a frame says about itself.

    model_hash: the first 8 hexadecimal digits of the model's. width, height: pixels of the
    original; 0 in a delta frame, whose size is that of its stream's key frame. tile_side: latents,
    0 for one tile. reference: fingerprint of the frame that a delta frame changes, else None.
    intact: whether the checksum over the whole frame holds; a truncated frame's does not.
    """

    frame_type: FrameType
    entropy: EntropyMode
    model_hash: str
    width: int
    height: int
    letterboxed: bool
    tile_side: int
    reference: int | None
    intact: bool
    header_bytes: int


def parse_header(codes: bytes) -> CodesHeader:
    """Read a frame's header; raises HeaderError."""
    flags, model_hash, full_check = _fixed_fields(codes)
    is_delta = bool(flags & _DELTA)
    position, width, height, reference = _FIXED.size, 0, 0, None
    if is_delta:
        reference = int.from_bytes(_take(codes, position, 4), "little")
        position += 4
    else:
        width, position = _side(codes, position)
        height, position = _side(codes, position)
    tile_side = 0
    if flags & _TILED:
        tile_side = _take(codes, position, 1)[0]
        position += 1
        if not tile_side:
            raise HeaderError("the header names tiles of 0 latents")
    return CodesHeader(
        FrameType.DELTA if is_delta else FrameType.KEY,
        EntropyMode.RANS if flags & _RANS else EntropyMode.RAW,
        model_hash,
        width,
        height,
        bool(flags & _LETTERBOXED),
        tile_side,
        reference,
        _checksum(codes) == full_check,
        position,
    )


def is_codes(payload: bytes) -> bool:
    """Whether `payload` begins like an SCQ1 frame of any version rather than an image file."""
    return payload.startswith(b"SQ\x01") or (
        len(payload) > 1 and payload[0] == MAGIC and payload[1] >> 4 == VERSION
    )


def _fixed_fields(codes: bytes) -> tuple[int, str, int]:
    """Flags, model hash and the check of the whole frame."""
    if codes.startswith(b"SQ\x01"):
        raise HeaderError("version 1 of SCQ1 is no longer read; encode the picture again")
    if codes[:1] != bytes([MAGIC]):
        raise HeaderError(f"not an SCQ1 frame: it begins with {codes[:2]!r}")
    if len(codes) > 1 and codes[1] >> 4 != VERSION:
        raise HeaderError(f"SCQ1 version {codes[1] >> 4}; this client reads version {VERSION}")
    _, second, model_hash, _, full_check = _FIXED.unpack(_take(codes, 0, _FIXED.size))
    flags = second & 15
    if flags & _DELTA and (flags & _LETTERBOXED or not flags & _RANS):
        raise HeaderError(f"flags {flags:#x} do not fit a delta frame")
    return flags, model_hash.hex(), full_check


def _side(codes: bytes, position: int) -> tuple[int, int]:
    """A width or height as LEB128, and the position behind it."""
    value = shift = 0
    while True:
        byte = _take(codes, position, 1)[0]
        value |= (byte & 127) << shift
        position, shift = position + 1, shift + 7
        if byte < 128:
            break
        if shift > 14:
            raise HeaderError("a side of the picture is above 65535 pixels")
    if not 1 <= value <= _MAX_SIDE or (shift > 7 and not byte):
        raise HeaderError(f"a side of the picture is written wrongly or {value} pixels long")
    return value, position


def _take(codes: bytes, position: int, count: int) -> bytes:
    if position + count > len(codes):
        raise HeaderError(f"the frame has {len(codes)} bytes and ends inside its header")
    return codes[position : position + count]


def _checksum(codes: bytes) -> int:
    """CRC-16/CCITT-FALSE of bytes 0..5 and everything from byte 10."""
    return binascii.crc_hqx(codes[10:], binascii.crc_hqx(codes[:6], 0xFFFF))
