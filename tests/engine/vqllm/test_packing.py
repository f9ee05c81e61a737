"""The bit layout of GPTQ checkpoints."""

import numpy as np
import pytest

from vqllm.packing import pack_columns, pack_rows, unpack_columns, unpack_rows


def test_four_bit_words_hold_the_first_row_in_the_lowest_bits() -> None:
    codes = np.arange(8, dtype=np.uint8)[:, None]
    assert pack_rows(codes, 4).view(np.uint32).tolist() == [[0x76543210]]


def test_three_bit_codes_straddle_word_borders() -> None:
    codes = np.zeros((32, 1), dtype=np.uint8)
    codes[10] = 0b101  # bits 30 and 32 of the stream
    assert pack_rows(codes, 3).view(np.uint32)[:, 0].tolist() == [1 << 30, 1, 0]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_unpacking_restores_the_codes(bits: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 2**bits, (64, 96)).astype(np.uint8)
    assert pack_rows(codes, bits).shape == (64 * bits // 32, 96)
    assert pack_columns(codes, bits).shape == (64, 96 * bits // 32)
    np.testing.assert_array_equal(unpack_rows(pack_rows(codes, bits), bits), codes)
    np.testing.assert_array_equal(unpack_columns(pack_columns(codes, bits), bits), codes)


def test_codes_that_do_not_fill_words_are_refused() -> None:
    with pytest.raises(ValueError, match="12 codes of 4 bits"):
        pack_rows(np.zeros((12, 1), dtype=np.uint8), 4)


def test_a_code_wider_than_the_width_is_refused() -> None:
    with pytest.raises(ValueError, match="code 16 does not fit 4 bits"):
        pack_rows(np.full((8, 1), 16, dtype=np.uint8), 4)
