"""The SCQ1 bitstream: exact ranks, golden bytes, and no harm from any bytes."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scq.bitstream import (
    FrameHeader,
    pack_frame,
    parse_header,
    payload_bytes,
    rank,
    unpack_frame,
    unrank,
)
from scq.errors import CorruptCodes, ScqError, UnsupportedOperation
from scq.lattice import LatticeAssignment, LatticeCode

DEFAULT = LatticeCode(256, 2, 4)
GOLDEN = Path(__file__).parents[2] / "golden" / "scq"
HEADER = FrameHeader(width=40, height=24, model_hash=b"\x01\x02\x03\x04")


def assignment_of(indices: list[list[int]], numerators: list[list[int]]) -> LatticeAssignment:
    return LatticeAssignment(torch.tensor(indices), torch.tensor(numerators))


def random_assignment(code: LatticeCode, count: int, seed: int = 0) -> LatticeAssignment:
    return unrank(np.random.default_rng(seed).integers(0, code.num_states, count), code)


def with_checksum(start: bytes, payload: bytes) -> bytes:
    checksum = zlib.crc32(payload, zlib.crc32(start))
    return start + struct.pack("<I", checksum) + payload


@pytest.mark.parametrize(
    "code",
    [
        LatticeCode(1, 1, 1),
        LatticeCode(1, 1, 4),
        LatticeCode(5, 2, 4),
        LatticeCode(6, 3, 5),
        LatticeCode(5, 4, 4),
        LatticeCode(5, 5, 7),
    ],
)
def test_ranks_number_every_assignment_exactly_once(code: LatticeCode) -> None:
    ranks = np.arange(code.num_states)
    assignment = unrank(ranks, code)
    np.testing.assert_array_equal(rank(assignment, code), ranks)
    states = {
        tuple(sorted((i, a) for i, a in zip(*row, strict=True) if a > 0))
        for row in zip(assignment.indices.tolist(), assignment.numerators.tolist(), strict=True)
    }
    assert len(states) == code.num_states
    assert all(sum(a for _, a in state) == code.denominator for state in states)


def test_unranked_assignments_are_canonical() -> None:
    assignment = unrank(np.arange(LatticeCode(7, 3, 5).num_states), LatticeCode(7, 3, 5))
    indices, numerators = assignment.indices.numpy(), assignment.numerators.numpy()
    assert (np.diff(numerators, axis=1) <= 0).all()
    tied = (np.diff(numerators, axis=1) == 0) & (numerators[:, 1:] > 0)
    assert (np.diff(indices, axis=1)[tied] > 0).all()
    unused = numerators == 0
    assert (indices == indices[:, :1])[unused].all()


def test_ranks_of_small_states_follow_the_written_order() -> None:
    code = LatticeCode(4, 2, 4)
    assignment = assignment_of(
        [[3, 3], [0, 1], [0, 1], [1, 0], [2, 0], [2, 3]],
        [[4, 0], [3, 1], [2, 2], [3, 1], [2, 2], [2, 2]],
    )
    # Support {0, 1} follows the 4 single codes; its compositions run (1,3), (2,2), (3,1).
    assert rank(assignment, code).tolist() == [3, 6, 5, 4, 8, 20]


@given(st.integers(0, 200), st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_frames_of_any_length_round_trip(count: int, seed: int) -> None:
    assignment = random_assignment(DEFAULT, count, seed)
    codes = pack_frame(HEADER, assignment, DEFAULT)
    assert len(codes) == 16 + payload_bytes(DEFAULT, count)
    assert parse_header(codes) == HEADER
    back = unpack_frame(codes, DEFAULT, (1, count))
    assert torch.equal(back.indices, assignment.indices)
    assert torch.equal(back.numerators, assignment.numerators)


def test_latents_cost_fractions_of_bits() -> None:
    # 64 * log2(98176) = 1061.3 bits, so 133 bytes to a chunk: 16.63 bits per latent, not 17.
    assert DEFAULT.num_states == 256 + 3 * 256 * 255 // 2
    assert payload_bytes(DEFAULT, 256) == 4 * 133
    assert payload_bytes(DEFAULT, 257) == 4 * 133 + 3
    assert payload_bytes(LatticeCode(1, 1, 4), 1000) == 0


def test_golden_frames_pack_and_unpack_to_the_same_bytes() -> None:
    vectors = json.loads((GOLDEN / "frames_v1.json").read_text())
    assert len(vectors) == 4
    for vector in vectors:
        code = LatticeCode(**vector["code"])
        header = FrameHeader(
            vector["width"],
            vector["height"],
            bytes.fromhex(vector["model_hash"]),
            vector["letterboxed"],
        )
        assignment = assignment_of(vector["indices"], vector["numerators"])
        codes = bytes.fromhex(vector["codes"])
        assert pack_frame(header, assignment, code) == codes
        assert parse_header(codes) == header
        back = unpack_frame(codes, code, tuple(vector["grid"]))
        assert back.indices.tolist() == vector["indices"]
        assert back.numerators.tolist() == vector["numerators"]


def test_every_single_flipped_bit_is_noticed() -> None:
    codes = pack_frame(HEADER, random_assignment(DEFAULT, 15), DEFAULT)
    for position in range(8 * len(codes)):
        flipped = bytearray(codes)
        flipped[position // 8] ^= 1 << (position % 8)
        with pytest.raises(CorruptCodes):
            unpack_frame(bytes(flipped), DEFAULT, (3, 5))


def test_every_truncation_and_extension_is_noticed() -> None:
    codes = pack_frame(HEADER, random_assignment(DEFAULT, 15), DEFAULT)
    for length in range(len(codes)):
        with pytest.raises(CorruptCodes):
            unpack_frame(codes[:length], DEFAULT, (3, 5))
    longer = with_checksum(codes[:12], codes[16:] + b"\0")
    with pytest.raises(CorruptCodes, match="takes 48"):
        unpack_frame(longer, DEFAULT, (3, 5))


@given(st.binary(max_size=80), st.booleans(), st.integers(0, 3), st.integers(0, 5))
@settings(max_examples=400, deadline=None)
def test_hostile_bytes_raise_corrupt_codes_or_are_a_frame(
    body: bytes, valid_start: bool, rows: int, columns: int
) -> None:
    codes = with_checksum(b"SQ\x01\x00" + body[:8], body[8:]) if valid_start else body
    try:
        assignment = unpack_frame(codes, DEFAULT, (rows, columns))
    except CorruptCodes:
        return
    assert pack_frame(parse_header(codes), assignment, DEFAULT) == codes


def test_a_chunk_beyond_the_last_rank_is_refused() -> None:
    start = pack_frame(HEADER, random_assignment(DEFAULT, 15), DEFAULT)[:12]
    size = payload_bytes(DEFAULT, 15)
    largest = (DEFAULT.num_states**15 - 1).to_bytes(size, "little")
    beyond = (DEFAULT.num_states**15).to_bytes(size, "little")
    assert len(unpack_frame(with_checksum(start, largest), DEFAULT, (3, 5))) == 15
    with pytest.raises(CorruptCodes, match="chunk 0"):
        unpack_frame(with_checksum(start, beyond), DEFAULT, (3, 5))


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (0, b"SX", "SQ"),
        (2, b"\x02", "version 2"),
        (3, b"\x02", "reserved"),
        (4, b"\0\0", "0x24"),
        (6, b"\0\0", "40x0"),
    ],
)
def test_header_fields_out_of_range_are_named(offset: int, value: bytes, message: str) -> None:
    codes = bytearray(pack_frame(HEADER, random_assignment(DEFAULT, 1), DEFAULT))
    codes[offset : offset + len(value)] = value
    with pytest.raises(CorruptCodes, match=message):
        parse_header(with_checksum(bytes(codes[:12]), bytes(codes[16:])))


@pytest.mark.parametrize(
    ("indices", "numerators", "message"),
    [
        ([[256, 256]], [[4, 0]], r"not in \[0, 256\)"),
        ([[-1, 0]], [[3, 1]], r"not in \[0, 256\)"),
        ([[3, 3]], [[3, 1]], "twice"),
        ([[3, 4]], [[3, 2]], "sum to 4"),
        ([[3, 4]], [[5, -1]], "sum to 4"),
        ([[3]], [[4]], "shapes"),
        ([[3, 3, 3]], [[4, 0, 0]], "shapes"),
    ],
)
def test_assignments_outside_the_code_are_refused(
    indices: list[list[int]], numerators: list[list[int]], message: str
) -> None:
    with pytest.raises(CorruptCodes, match=message):
        pack_frame(HEADER, assignment_of(indices, numerators), DEFAULT)


@pytest.mark.parametrize("value", [-1, DEFAULT.num_states])
def test_ranks_out_of_range_are_refused(value: int) -> None:
    with pytest.raises(CorruptCodes, match=f"rank {value} of latent 1"):
        unrank(np.array([0, value]), DEFAULT)


@pytest.mark.parametrize("fields", [(0, 1, b"1234"), (1, 65536, b"1234"), (1, 1, b"123")])
def test_headers_that_do_not_fit_their_fields_are_refused(fields: tuple[int, int, bytes]) -> None:
    with pytest.raises(CorruptCodes):
        FrameHeader(*fields)


def test_a_code_with_too_many_states_for_raw_mode_is_refused() -> None:
    huge = LatticeCode(65536, 4, 16)
    with pytest.raises(UnsupportedOperation, match="2\\^62"):
        unrank(np.array([0]), huge)
    assert issubclass(UnsupportedOperation, ScqError)
