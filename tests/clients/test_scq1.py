"""Headers of SCQ1 frames read without a model, against the conformance vectors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vqclient import EntropyMode, FrameType, HeaderError, is_codes, parse_header

VECTORS = Path(__file__).parents[2] / "clients" / "conformance" / "vectors.json"
ALL = json.loads(VECTORS.read_text())["vectors"]
READABLE = [vector for vector in ALL if not vector.get("refused")]
KEY = next(bytes.fromhex(v["codes"]) for v in READABLE if v["header"]["reference"] is None)


@pytest.mark.parametrize("vector", READABLE, ids=lambda vector: vector["name"])
def test_every_header_says_what_the_vector_says(vector: dict[str, Any]) -> None:
    codes, expected = bytes.fromhex(vector["codes"]), vector["header"]
    header = parse_header(codes)
    assert (header.width, header.height) == (expected["width"], expected["height"])
    assert header.model_hash == expected["model_hash"]
    assert header.tile_side == (expected["tile"] or 0)
    assert header.reference == expected["reference"]
    flags = expected["flags"]
    assert header.frame_type is (FrameType.DELTA if flags & 1 else FrameType.KEY)
    assert header.entropy is (EntropyMode.RANS if flags & 2 else EntropyMode.RAW)
    assert header.letterboxed == bool(flags & 4)
    assert header.intact
    assert is_codes(codes)


@pytest.mark.parametrize("vector", READABLE, ids=lambda vector: vector["name"])
def test_a_cut_frame_keeps_its_header_and_shows_that_it_was_cut(vector: dict[str, Any]) -> None:
    codes = bytes.fromhex(vector["codes"])
    whole = parse_header(codes)
    if whole.header_bytes == len(codes):
        pytest.skip("nothing follows this header")
    cut = parse_header(codes[:-1])
    assert (cut.width, cut.height, cut.model_hash) == (whole.width, whole.height, whole.model_hash)
    assert not cut.intact


@pytest.mark.parametrize(
    ("codes", "problem"),
    [
        (b"", "not an SCQ1 frame"),
        (b"\x89PNG\r\n\x1a\n", "not an SCQ1 frame"),
        (b"SQ\x01\x00" + bytes(12), "version 1"),
        (b"\x53\x30" + bytes(12), "version 3"),
        (KEY[:9], "ends inside its header"),
        (KEY[:11], "ends inside its header"),
        (KEY[:10] + b"\x00\x01", "written wrongly"),
        (KEY[:10] + b"\x80\x00\x01", "written wrongly"),
        (KEY[:10] + b"\xff\xff\xff\xff\x01", "above 65535"),
        (b"\x53\x21" + bytes(12), "do not fit a delta frame"),
        (b"\x53\x28" + KEY[2:10] + b"\x01\x01\x00", "tiles of 0"),
    ],
)
def test_other_bytes_are_refused_with_the_reason(codes: bytes, problem: str) -> None:
    with pytest.raises(HeaderError, match=problem):
        parse_header(codes)


def test_only_frames_look_like_codes() -> None:
    assert is_codes(b"SQ\x01\x00 a frame of the first version")
    for other in (b"", b"S", b"\xff\xd8\xff", b"\x89PNG", b"RIFF"):
        assert not is_codes(other)
