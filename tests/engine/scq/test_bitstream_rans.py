"""The rANS primitive: exact round trips, sizes near the entropy, no harm from any bytes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scq.bitstream import rans
from scq.errors import CorruptCodes, ScqError


def frequencies_of(rows: int, alphabet: int, seed: int) -> rans.Ints:
    generator = np.random.default_rng(seed)
    return rans.quantize_frequencies(generator.gamma(0.3, size=(rows, alphabet)))


@given(st.integers(1, 40), st.integers(1, 5), st.integers(0, 200), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_symbols_round_trip_under_rows_of_their_own(
    alphabet: int, num_rows: int, count: int, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    frequencies = frequencies_of(num_rows, alphabet, seed)
    symbols = generator.integers(0, alphabet, count)
    rows = generator.integers(0, num_rows, count)
    stream = rans.encode(symbols, frequencies, rows)
    np.testing.assert_array_equal(rans.decode(stream, count, frequencies, rows), symbols)


def test_a_long_stream_takes_its_entropy_and_a_few_bytes() -> None:
    frequencies = frequencies_of(1, 64, 3)
    generator = np.random.default_rng(0)
    symbols = generator.choice(64, 5000, p=frequencies[0] / rans.TOTAL)
    stream = rans.encode(symbols, frequencies)
    ideal = rans.ideal_bits(symbols, frequencies) / 8
    assert ideal < len(stream) <= ideal * 1.002 + 4


def test_the_written_example_has_these_bytes() -> None:
    # x = 65536: symbol 2 owns [32768, 65536): 65536 div 32768 = 2, so x = 2*65536 + 32768.
    # Symbol 0, f = 16384: 163840 div 16384 = 10, so x = 10 * 65536 + 0.
    frequencies = [[16384, 16384, 32768]]
    assert rans.encode([0, 2], frequencies).hex() == "00000a00"
    assert rans.decode(bytes.fromhex("00000a00"), 2, frequencies).tolist() == [0, 2]


def test_no_symbols_and_one_symbol_alphabets_take_no_bytes() -> None:
    assert rans.encode([], [[1, 65535]]) == b""
    assert rans.encode([0, 0, 0], [[65536]]) == b""
    assert rans.decode(b"", 3, [[65536]]).tolist() == [0, 0, 0]
    with pytest.raises(CorruptCodes, match="4 bytes, its symbols take 0"):
        rans.decode(b"\0\0\1\0", 0, [[1, 65535]])


@given(st.binary(max_size=40), st.integers(0, 30))
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_corrupt_or_the_only_stream_of_their_symbols(
    stream: bytes, count: int
) -> None:
    frequencies = frequencies_of(2, 7, 1)
    rows = np.arange(count) % 2
    try:
        symbols = rans.decode(stream, count, frequencies, rows)
    except CorruptCodes:
        return
    assert rans.encode(symbols, frequencies, rows) == stream


def test_every_cut_and_every_extension_of_a_stream_is_noticed() -> None:
    frequencies = frequencies_of(1, 7, 1)
    stream = rans.encode(np.arange(60) % 7, frequencies)
    for length in range(len(stream)):
        with pytest.raises(CorruptCodes):
            rans.decode(stream[:length], 60, frequencies)
    with pytest.raises(CorruptCodes, match="bytes"):
        rans.decode(stream + b"\0\0", 60, frequencies)


@pytest.mark.parametrize("alphabet", [1, 2, 255, 8192, 65536])
def test_quantized_frequencies_are_positive_and_sum_to_65536(alphabet: int) -> None:
    weights = np.random.default_rng(0).gamma(0.05, size=(3, alphabet))
    weights[1] = 0
    weights[2, 1:] = 0
    frequencies = rans.quantize_frequencies(weights)
    assert frequencies.min() >= 1
    assert (frequencies.sum(1) == 65536).all()


@pytest.mark.parametrize(
    ("symbols", "frequencies", "rows", "message"),
    [
        ([0], [[0, 65536]], None, "each >= 1"),
        ([0], [[1, 2]], None, "summing to 65536"),
        ([2], [[1, 65535]], None, "alphabet has 2"),
        ([-1], [[1, 65535]], None, "alphabet has 2"),
        ([0], [[1, 65535]], [1], "there are 1"),
        ([0, 1], [[1, 65535]], [0], "1 rows given for 2"),
    ],
)
def test_misuse_is_named(
    symbols: list[int], frequencies: list[list[int]], rows: list[int] | None, message: str
) -> None:
    with pytest.raises(ScqError, match=message):
        rans.encode(symbols, frequencies, rows)


@pytest.mark.parametrize("weights", [[[-1.0, 1.0]], [[float("nan"), 1.0]], [1.0], [[]]])
def test_weights_that_are_no_distribution_are_refused(weights: object) -> None:
    with pytest.raises(ScqError, match="weights"):
        rans.quantize_frequencies(weights)  # type: ignore[arg-type]
