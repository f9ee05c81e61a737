"""SCQ1 frames: exact round trips in every mode, partial frames, and no harm from any bytes."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scq.bitstream import (
    KeyHeader,
    PackedFrame,
    pack_delta,
    pack_delta_frame,
    pack_key,
    pack_key_frame,
    parse_header,
    unpack,
)
from scq.bitstream.canonical import canonical, fingerprint
from scq.bitstream.frame import EntropyChoice, split_tiles
from scq.bitstream.header import read_varint, sealed, write_varint
from scq.bitstream.ranking import radices, rank_rest, unrank_rest
from scq.bitstream.raw import base_bytes, enhancement_bytes
from scq.errors import CorruptCodes, ReferenceMismatch, UnsupportedOperation
from scq.lattice import LatticeAssignment, LatticeCode
from support.lattices import (
    PROFILES,
    assignment_of,
    changed_assignment,
    random_assignment,
    random_tables,
    same,
)

DEFAULT = LatticeCode(90, 2, 4)
HEADER = KeyHeader(width=40, height=24, model_hash=b"\x01\x02\x03\x04")
GRID = (3, 5)
COUNT = 15

profiles = st.sampled_from(PROFILES)
seeds = st.integers(0, 10**6)
tiles = st.sampled_from([None, 1, 2, 4, 255])


def key_frame(
    assignment: LatticeAssignment, code: LatticeCode = DEFAULT, entropy: EntropyChoice = "auto"
) -> PackedFrame:
    tables = random_tables(code)
    return pack_key_frame(HEADER, assignment, code, GRID, tables=tables, entropy=entropy)


def delta_frame(assignment: LatticeAssignment, reference: LatticeAssignment) -> PackedFrame:
    return pack_delta_frame(
        HEADER.model_hash,
        assignment,
        DEFAULT,
        GRID,
        reference=reference,
        tables=random_tables(DEFAULT),
    )


@functools.cache
def every_kind() -> list[tuple[PackedFrame, LatticeAssignment, LatticeAssignment | None]]:
    """A frame of each kind, what it holds, and its reference."""
    before = random_assignment(DEFAULT, COUNT)
    now = changed_assignment(before, DEFAULT, 1)
    return [
        (key_frame(now, entropy="raw"), now, None),
        (key_frame(now, entropy="rans"), now, None),
        (delta_frame(now, before), now, before),
    ]


def read(
    codes: bytes, reference: LatticeAssignment | None = None, *, allow_partial: bool = False
) -> tuple[LatticeAssignment, bool]:
    frame = unpack(
        codes,
        DEFAULT,
        GRID,
        tables=random_tables(DEFAULT),
        reference=reference,
        allow_partial=allow_partial,
    )
    return frame.assignment, frame.complete


@given(profiles, st.integers(1, 6), st.integers(1, 7), tiles, seeds)
@settings(max_examples=80, deadline=None)
def test_key_frames_of_any_profile_and_grid_round_trip(
    code: LatticeCode, rows: int, columns: int, tile: int | None, seed: int
) -> None:
    assignment = random_assignment(code, rows * columns, seed)
    tables = random_tables(code)
    lengths = {}
    kinds: tuple[EntropyChoice, ...] = ("raw", "rans", "auto")
    for entropy in kinds:
        codes = pack_key(
            HEADER, assignment, code, (rows, columns), tables=tables, tile=tile, entropy=entropy
        )
        lengths[entropy] = len(codes)
        frame = unpack(codes, code, (rows, columns), tables=tables)
        assert frame.complete
        assert same(frame.assignment, assignment)
        header = frame.header
        assert (header.width, header.height, header.model_hash) == (40, 24, HEADER.model_hash)
        assert header.tile == tile
    assert lengths["auto"] == min(lengths.values())


@given(profiles, st.integers(1, 6), st.integers(1, 7), tiles, seeds, st.floats(0, 1))
@settings(max_examples=80, deadline=None)
def test_delta_frames_of_any_profile_and_grid_round_trip(
    code: LatticeCode, rows: int, columns: int, tile: int | None, seed: int, share: float
) -> None:
    before = random_assignment(code, rows * columns, seed)
    now = changed_assignment(before, code, seed, share)
    tables = random_tables(code)
    packed = pack_delta_frame(
        b"abcd", now, code, (rows, columns), reference=before, tables=tables, tile=tile
    )
    frame = unpack(packed.codes, code, (rows, columns), tables=tables, reference=before)
    assert frame.complete
    assert same(frame.assignment, now)
    assert frame.header.is_delta
    assert sum(packed.modes.values()) == rows * columns


@given(profiles, seeds, st.integers(1, 200))
@settings(max_examples=60, deadline=None)
def test_any_slot_order_packs_to_the_same_raw_bytes(
    code: LatticeCode, seed: int, count: int
) -> None:
    assignment = random_assignment(code, count, seed)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(code.max_support))
    shuffled = LatticeAssignment(assignment.indices[:, order], assignment.numerators[:, order])
    frames = [pack_key(HEADER, a, code, (1, count), entropy="raw") for a in (assignment, shuffled)]
    assert frames[0] == frames[1]
    expected = base_bytes(count, code) + enhancement_bytes(
        canonical(assignment, code).heaviest, code
    )
    assert len(frames[0]) == 12 + expected


@pytest.mark.parametrize("code", [c for c in PROFILES if c.num_states < 3000])
def test_ranks_number_every_state_exactly_once(code: LatticeCode) -> None:
    limits = radices(np.arange(code.num_codes), code).tolist()
    leads = np.repeat(np.arange(code.num_codes), limits)
    ranks = np.concatenate([np.arange(limit) for limit in limits])
    assert len(ranks) == code.num_states
    latents = unrank_rest(leads, ranks, code)
    np.testing.assert_array_equal(latents.heaviest, leads)
    np.testing.assert_array_equal(rank_rest(latents, code), ranks)
    again = canonical(latents.to_assignment(), code)
    np.testing.assert_array_equal(again.indices, latents.indices)
    np.testing.assert_array_equal(again.numerators, latents.numerators)
    states = zip(latents.indices.tolist(), latents.numerators.tolist(), strict=True)
    assert len({str(state) for state in states}) == code.num_states


def test_ranks_of_small_states_follow_the_written_order() -> None:
    # K=5, s=3, n=4, heaviest 2. t=1: 1 rank. t=2, u=0: 2 codes above x (2,2), (3,1) = 4 ranks;
    # u=1: 2 below x (3,1) = 2 ranks. t=3, u=0: C(2,2) x (2,1,1) = 1; u=1: 2 x 2 x 1 = 4; u=2: 1.
    code = LatticeCode(5, 3, 4)
    assignment = assignment_of(
        [[2, 2, 2], [2, 3, 2], [2, 4, 2], [2, 0, 2], [2, 1, 2], [2, 3, 4], [2, 1, 3], [2, 0, 1]],
        [[4, 0, 0], [2, 2, 0], [3, 1, 0], [3, 1, 0], [3, 1, 0], [2, 1, 1], [2, 1, 1], [2, 1, 1]],
    )
    assert rank_rest(canonical(assignment, code), code).tolist() == [0, 1, 4, 5, 6, 7, 10, 12]
    assert radices(np.array([2]), code).tolist() == [13]


def test_a_sign_crop_takes_forty_bytes() -> None:
    assignment = random_assignment(DEFAULT, 16, 3)
    codes = pack_key(KeyHeader(32, 32, b"abcd"), assignment, DEFAULT, (4, 4))
    assert base_bytes(16, DEFAULT) == 13
    assert len(codes) <= 12 + 13 + 15
    # Heaviest index 0 throughout is the costliest enhancement: 179 ranks each.
    assert enhancement_bytes(np.zeros(16, np.int64), DEFAULT) == 15


def test_skipped_latents_are_nearly_free() -> None:
    code, grid = DEFAULT, (16, 16)
    before = random_assignment(code, 256)
    tables = random_tables(code)
    frame = pack_delta_frame(b"abcd", before, code, grid, reference=before, tables=tables)
    assert frame.modes == {"skip": 256, "reweight": 0, "swap1": 0, "new": 0}
    assert len(frame.codes) < 14 + 1 + 40
    assert frame.base_bytes == len(frame.codes)


def test_deltas_use_every_mode_where_it_fits() -> None:
    code = LatticeCode(90, 2, 4)
    before = assignment_of([[3, 5], [3, 5], [3, 5], [3, 3]], [[3, 1], [3, 1], [3, 1], [4, 0]])
    now = assignment_of([[3, 5], [5, 3], [3, 70], [8, 60]], [[3, 1], [3, 1], [3, 1], [3, 1]])
    frame = pack_delta_frame(
        b"abcd", now, code, (2, 2), reference=before, tables=random_tables(code)
    )
    assert frame.modes == {"skip": 1, "reweight": 1, "swap1": 1, "new": 1}


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_every_single_flipped_bit_is_noticed(kind: int) -> None:
    packed, _, reference = every_kind()[kind]
    for position in range(8 * len(packed.codes)):
        flipped = bytearray(packed.codes)
        flipped[position // 8] ^= 1 << (position % 8)
        with pytest.raises(CorruptCodes):
            read(bytes(flipped), reference)


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_frames_cut_behind_their_base_layer_show_it_when_asked(kind: int) -> None:
    packed, whole, reference = every_kind()[kind]
    base, _ = read(packed.codes[: packed.base_bytes], reference, allow_partial=True)
    for length in range(len(packed.codes)):
        cut = packed.codes[:length]
        with pytest.raises(CorruptCodes):
            read(cut, reference)
        if length < packed.base_bytes:
            with pytest.raises(CorruptCodes):
                read(cut, reference, allow_partial=True)
            continue
        assignment, complete = read(cut, reference, allow_partial=True)
        assert not complete
        assert same(assignment, base)
    assignment, complete = read(packed.codes, reference, allow_partial=True)
    assert complete
    assert same(assignment, whole)


def test_base_layers_hold_the_heaviest_code_or_the_reference() -> None:
    (raw, now, _), (rans, _, _), (delta, _, before) = every_kind()
    base, _ = read(raw.codes[: raw.base_bytes], allow_partial=True)
    assert torch.equal(base.indices[:, 0], now.indices[:, 0])
    assert base.numerators.tolist() == [[4, 0]] * COUNT
    base, _ = read(rans.codes[: rans.base_bytes], allow_partial=True)
    tied = now.numerators == now.numerators[:, :1]
    assert bool(((base.indices[:, :1] == now.indices) & tied).any(1).all())
    assert before is not None
    base, _ = read(delta.codes[: delta.base_bytes], before, allow_partial=True)
    kept = (base.indices == before.indices).all(1) & (base.numerators == before.numerators).all(1)
    assert int(kept.sum()) >= COUNT - delta.modes["new"]


def test_a_delta_frame_names_the_reference_it_changes() -> None:
    packed, _, before = every_kind()[2]
    assert before is not None
    header = parse_header(packed.codes)
    assert header.frame_type == "delta"
    assert header.reference == fingerprint(canonical(before, DEFAULT), GRID)
    with pytest.raises(ReferenceMismatch, match="none is at hand; ask for a key frame"):
        read(packed.codes)
    with pytest.raises(ReferenceMismatch, match="ask for a key frame") as caught:
        read(packed.codes, random_assignment(DEFAULT, COUNT, 77))
    assert caught.value.wanted == header.reference
    assert isinstance(caught.value, CorruptCodes)


def test_the_fingerprint_tells_assignments_and_grids_apart() -> None:
    one = canonical(random_assignment(DEFAULT, 6, 1), DEFAULT)
    two = canonical(random_assignment(DEFAULT, 6, 2), DEFAULT)
    values = {fingerprint(one, (2, 3)), fingerprint(one, (3, 2)), fingerprint(two, (2, 3))}
    assert len(values) == 3


def resealed(codes: bytes, base_end: int) -> bytes:
    return sealed(codes, min(base_end, len(codes)))


@given(st.integers(0, 2), st.data())
@settings(max_examples=300, deadline=None)
def test_mutated_frames_with_good_checks_are_corrupt_or_decode(
    kind: int, data: st.DataObject
) -> None:
    packed, _, reference = every_kind()[kind]
    codes = bytearray(packed.codes)
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(10, len(codes) - 1))
        codes[position] = data.draw(st.integers(0, 255))
    for base_end in {packed.base_bytes, data.draw(st.integers(10, len(codes)))}:
        try:
            assignment, complete = read(resealed(bytes(codes), base_end), reference)
        except CorruptCodes:
            continue
        assert complete
        canonical(assignment, DEFAULT)


@given(st.binary(max_size=80), st.integers(0, 15), st.integers(1, 3), st.integers(1, 5))
@settings(max_examples=300, deadline=None)
def test_hostile_bytes_raise_corrupt_codes_or_are_a_frame(
    body: bytes, flags: int, rows: int, columns: int
) -> None:
    before = random_assignment(DEFAULT, rows * columns)
    for codes in (body, b"S" + bytes([32 | flags]) + body):
        try:
            frame = unpack(
                codes, DEFAULT, (rows, columns), tables=random_tables(DEFAULT), reference=before,
                allow_partial=True,
            )  # fmt: skip
        except CorruptCodes:
            continue
        canonical(frame.assignment, DEFAULT)


def test_raw_chunks_beyond_the_last_rank_are_refused() -> None:
    frame = key_frame(random_assignment(DEFAULT, COUNT), entropy="raw")
    base_end = frame.base_bytes
    full_base = frame.codes[:12] + b"\xff" * (base_end - 12) + frame.codes[base_end:]
    with pytest.raises(CorruptCodes, match="beyond its last rank"):
        read(sealed(full_base, base_end))
    full_rest = frame.codes[:base_end] + b"\xff" * (len(frame.codes) - base_end)
    with pytest.raises(CorruptCodes, match="beyond its last rank"):
        read(sealed(full_rest, base_end))
    assert not read(sealed(full_rest, base_end), allow_partial=True)[1]
    with pytest.raises(CorruptCodes, match="grid takes"):
        read(sealed(frame.codes + b"\0", base_end))


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ("", "not an SCQ1 frame"),
        ("5153", "not an SCQ1 frame"),
        ("535101002800180001020304", "version 1 .* encode the picture again"),
        ("5330", "version 3"),
        ("53200102030400000000", "no end"),
        ("532001020304000000000001", "width 0"),
        ("53200102030400000000ffff0701", "width 131071"),
        ("53200102030400000000800001", "longer than its value"),
        ("532801020304000000000101", "end inside the header"),
        ("53280102030400000000010100", "tile side 0"),
        ("532101020304000000000000", "do not fit a delta frame"),
        ("532701020304000000000000", "do not fit a delta frame"),
        ("532301020304000000000000", "end inside the header"),
        ("5320010203040000", "at least 12"),
        ("532001020304000000000101", "full check"),
    ],
)
def test_headers_out_of_form_are_named(start: str, message: str) -> None:
    with pytest.raises(CorruptCodes, match=message):
        parse_header(bytes.fromhex(start))


def test_headers_are_read_without_a_model() -> None:
    assignment = random_assignment(LatticeCode(40, 4, 16), 200)
    codes = pack_key(
        KeyHeader(65535, 300, b"wxyz", letterboxed=True), assignment, LatticeCode(40, 4, 16),
        (10, 20), tile=3,
    )  # fmt: skip
    header = parse_header(codes)
    assert (header.width, header.height, header.letterboxed) == (65535, 300, True)
    assert (header.tile, header.entropy, header.frame_type) == (3, "raw", "key")
    assert (header.num_bytes, header.reference) == (16, None)
    assert parse_header(codes[:16], allow_partial=True) == header


@given(st.integers(0, 2**35 - 1))
def test_varints_have_one_form(value: int) -> None:
    assert read_varint(b"x" + write_varint(value) + b"y", 1) == (
        value, 1 + len(write_varint(value)),
    )  # fmt: skip


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 10))
def test_tiles_cover_the_grid_once(rows: int, columns: int, side: int) -> None:
    split = split_tiles((rows, columns), side)
    positions = [p for tile in split for p in tile.rows.tolist()]
    assert sorted(positions) == list(range(rows * columns))
    assert all(len(t.rows) == t.grid[0] * t.grid[1] and max(t.grid) <= side for t in split)


@pytest.mark.parametrize(
    ("indices", "numerators", "message"),
    [
        ([[90, 90]], [[4, 0]], r"not in \[0, 90\)"),
        ([[-1, 0]], [[3, 1]], r"not in \[0, 90\)"),
        ([[3, 3]], [[3, 1]], "twice"),
        ([[3, 4]], [[3, 2]], "sum to 4"),
        ([[3, 4]], [[5, -1]], "sum to 4"),
        ([[3]], [[4]], "shapes"),
        ([[3, 3, 3]], [[4, 0, 0]], "shapes"),
        ([[3, 3], [3, 3]], [[4, 0], [4, 0]], "do not fill"),
    ],
)
def test_assignments_outside_the_code_are_refused(
    indices: list[list[int]], numerators: list[list[int]], message: str
) -> None:
    with pytest.raises(CorruptCodes, match=message):
        pack_key(HEADER, assignment_of(indices, numerators), DEFAULT, (1, 1))


@pytest.mark.parametrize("fields", [(0, 1, b"1234"), (1, 65536, b"1234"), (1, 1, b"123")])
def test_headers_that_do_not_fit_their_fields_are_refused(fields: tuple[int, int, bytes]) -> None:
    with pytest.raises(CorruptCodes):
        KeyHeader(*fields)


def test_what_a_code_or_model_cannot_do_is_named() -> None:
    assignment = random_assignment(DEFAULT, COUNT)
    with pytest.raises(UnsupportedOperation, match="rANS needs entropy tables"):
        pack_key(HEADER, assignment, DEFAULT, GRID, entropy="rans")
    with pytest.raises(UnsupportedOperation, match="delta frames need entropy tables"):
        pack_delta(b"abcd", assignment, DEFAULT, GRID, reference=assignment, tables=None)
    with pytest.raises(CorruptCodes, match="no entropy tables"):
        unpack(key_frame(assignment, entropy="rans").codes, DEFAULT, GRID)
    with pytest.raises(CorruptCodes, match="tile side 256"):
        pack_key(HEADER, assignment, DEFAULT, GRID, tile=256)
    with pytest.raises(CorruptCodes, match="grid 0x5"):
        unpack(b"", DEFAULT, (0, 5))
    for code in (LatticeCode(8, 5, 8), LatticeCode(8, 2, 5), LatticeCode(8, 2, 32)):
        with pytest.raises(UnsupportedOperation, match="no profile"):
            unpack(b"", code, GRID)


@pytest.mark.parametrize("side", [0, -2])
def test_tiles_without_latents_are_refused(side: int) -> None:
    with pytest.raises(CorruptCodes, match=f"tiles of {side} latents"):
        split_tiles((4, 4), side)
