"""The first bytes of an SCQ1 frame, version 2: fields, variable-length integers, checksums.

    offset  size    field
    0       1       0x53, "S"
    1       1       version 2 in the high four bits; flags: 1 delta, 2 rANS, 4 letterboxed, 8 tiled
    2       4       first 4 bytes of the model id
    6       2       base check: CRC-16 of bytes 0..5 and 10.. to the end of the base layer
    8       2       full check: CRC-16 of bytes 0..5 and 10.. to the end of the frame
    10      1..3    key frame: width of the original picture; varint, 1..65535
            1..3    key frame: height; varint
            4       delta frame instead: fingerprint of the reference
            1       if tiled: side of a tile in latents, >= 1

Little-endian; CRC-16/CCITT-FALSE. Reading it takes no model. Knows nothing of what follows.
"""

from __future__ import annotations

import binascii
import struct
from dataclasses import dataclass
from typing import Literal

from scq.errors import CorruptCodes

MAGIC = 0x53
VERSION = 2
MAX_SIDE = 0xFFFF
MAX_TILE = 255
CHECKED_FROM = 10
_DELTA, _RANS, _LETTERBOXED, _TILED = 1, 2, 4, 8
_FIXED = struct.Struct("<BB4sHH")
_MAX_VARINT_BYTES = 5

Entropy = Literal["raw", "rans"]


@dataclass(frozen=True)
class KeyHeader:
    """What a key frame says about its picture. width, height: original pixels, 1..65535.

    model_hash: the first 4 bytes of the model id. letterboxed: pixels were lost to resizing.
    Raises CorruptCodes for fields that no header can hold.
    """

    width: int
    height: int
    model_hash: bytes
    letterboxed: bool = False

    def __post_init__(self) -> None:
        if not (1 <= self.width <= MAX_SIDE and 1 <= self.height <= MAX_SIDE):
            raise CorruptCodes(
                f"frame size {self.width}x{self.height}, both sides must lie in 1..{MAX_SIDE}"
            )
        _check_hash(self.model_hash)


@dataclass(frozen=True)
class FrameHeader:
    """A parsed header.

    width, height: original pixels; 0 in a delta frame, whose size is that of its stream's key
    frame, as is `letterboxed`. tile: side in latents, None for one tile. reference: fingerprint
    of the assignment that a delta frame changes, None in a key frame. num_bytes: header length.
    """

    model_hash: bytes
    entropy: Entropy
    width: int = 0
    height: int = 0
    letterboxed: bool = False
    tile: int | None = None
    reference: int | None = None
    base_check: int = 0
    full_check: int = 0
    num_bytes: int = 0

    @property
    def is_delta(self) -> bool:
        """Whether the frame changes another one."""
        return self.reference is not None

    @property
    def frame_type(self) -> Literal["key", "delta"]:
        """What the frame stands for: a picture of its own, or the change of another."""
        return "delta" if self.is_delta else "key"


def parse_header(codes: bytes, *, allow_partial: bool = False) -> FrameHeader:
    """Read the header and verify the full check; no model is needed.

    With allow_partial the frame may be cut after its header, and nothing is verified but the
    header's own form. Raises CorruptCodes.
    """
    _check_start(codes)
    magic_flags, model_hash, base_check, full_check = codes[1], *_FIXED.unpack_from(codes)[2:]
    flags = magic_flags & 15
    fields, position = _parse_fields(codes, flags)
    if not allow_partial:
        computed = checksum(codes, len(codes))
        if computed != full_check:
            raise CorruptCodes(
                f"full check is {computed:04x}, the frame says {full_check:04x}: it is cut or "
                "damaged; send it again, or settle for its base layer (allow_partial, --partial)"
            )
    return FrameHeader(
        model_hash,
        "rans" if flags & _RANS else "raw",
        letterboxed=bool(flags & _LETTERBOXED),
        base_check=base_check,
        full_check=full_check,
        num_bytes=position,
        **fields,
    )


def checksum(codes: bytes, end: int) -> int:
    """CRC-16/CCITT-FALSE of bytes 0..5 and 10..end - 1."""
    view = memoryview(codes)
    return binascii.crc_hqx(view[CHECKED_FROM:end], binascii.crc_hqx(view[:6], 0xFFFF))


def key_fields(header: KeyHeader, entropy: Entropy, tile: int | None) -> bytes:
    """The header of a key frame with both checks 0."""
    flags = _LETTERBOXED if header.letterboxed else 0
    sides = write_varint(header.width) + write_varint(header.height)
    return _fields(flags, header.model_hash, entropy, sides, tile)


def delta_fields(model_hash: bytes, reference: int, tile: int | None) -> bytes:
    """The header of a delta frame with both checks 0."""
    _check_hash(model_hash)
    return _fields(_DELTA, model_hash, "rans", reference.to_bytes(4, "little"), tile)


def sealed(frame: bytes, base_end: int) -> bytes:
    """The frame with its two checks filled in; the base layer ends at `base_end`."""
    checks = struct.pack("<HH", checksum(frame, base_end), checksum(frame, len(frame)))
    return frame[:6] + checks + frame[CHECKED_FROM:]


def write_varint(value: int) -> bytes:
    """LEB128: 7 bits to a byte, lowest first, the high bit set on all but the last."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def read_varint(codes: bytes, position: int) -> tuple[int, int]:
    """A varint of at most 5 bytes and the position behind it.

    Raises CorruptCodes where the bytes end, or for a longer form than needed.
    """
    value = 0
    for count, byte in enumerate(codes[position : position + _MAX_VARINT_BYTES]):
        value |= (byte & 127) << (7 * count)
        if byte < 128:
            if count and not byte:
                raise CorruptCodes(f"varint at byte {position} is longer than its value needs")
            return value, position + count + 1
    raise CorruptCodes(f"varint at byte {position} has no end")


def _check_hash(model_hash: bytes) -> None:
    if len(model_hash) != 4:
        raise CorruptCodes(f"model hash has {len(model_hash)} bytes instead of 4")


def _fields(
    flags: int, model_hash: bytes, entropy: Entropy, own_fields: bytes, tile: int | None
) -> bytes:
    if tile is not None and not 1 <= tile <= MAX_TILE:
        raise CorruptCodes(f"tile side {tile} is not in 1..{MAX_TILE} latents")
    flags |= (_RANS if entropy == "rans" else 0) | (_TILED if tile is not None else 0)
    start = _FIXED.pack(MAGIC, VERSION << 4 | flags, model_hash, 0, 0)
    return start + own_fields + (b"" if tile is None else bytes([tile]))


def _check_start(codes: bytes) -> None:
    if codes[:3] == b"SQ\x01":
        raise CorruptCodes(
            "the frame has version 1 of SCQ1, which is no longer read; encode the picture again"
        )
    if codes[:1] != bytes([MAGIC]):
        raise CorruptCodes(f"codes start with {codes[:1]!r} instead of b'S'; not an SCQ1 frame")
    if len(codes) > 1 and codes[1] >> 4 != VERSION:
        raise CorruptCodes(f"frame version {codes[1] >> 4} is not supported, only {VERSION}")
    if len(codes) < _FIXED.size:
        raise CorruptCodes(f"codes have {len(codes)} bytes, a header has at least 12")


def _parse_fields(codes: bytes, flags: int) -> tuple[dict[str, int], int]:
    """The fields from byte 10 on by name, and where they end."""
    fields: dict[str, int] = {}
    position = _FIXED.size
    if flags & _DELTA:
        if flags & _LETTERBOXED or not flags & _RANS:
            raise CorruptCodes(f"flags {flags:#x} do not fit a delta frame: rANS, not letterboxed")
        fields["reference"] = int.from_bytes(codes[position : position + 4], "little")
        position += 4
    else:
        for name in ("width", "height"):
            fields[name], position = read_varint(codes, position)
            if not 1 <= fields[name] <= MAX_SIDE:
                raise CorruptCodes(f"{name} {fields[name]} is not in 1..{MAX_SIDE}")
    if flags & _TILED:
        fields["tile"] = codes[position] if position < len(codes) else 0
        position += 1
    if position > len(codes):
        raise CorruptCodes(f"codes have {len(codes)} bytes and end inside the header")
    if fields.get("tile") == 0:
        raise CorruptCodes("tile side 0 is not in 1..255 latents")
    return fields, position
