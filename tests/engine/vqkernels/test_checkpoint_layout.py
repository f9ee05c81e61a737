"""The kernels read what vqllm's packing writes."""

from __future__ import annotations

import numpy as np
import pytest

from vqkernels.matrix import Matrix, matmul
from vqkernels.matrix_weights import GridWeights
from vqllm.packing import pack_rows


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("is_symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_words_packed_by_vqllm_are_read_back(bits: int, is_symmetric: bool) -> None:
    random = np.random.default_rng(3)
    codes = random.integers(0, 1 << bits, (192, 40), dtype=np.uint8)
    zeros = random.integers(0, 1 << bits, (2, 40), dtype=np.uint8)
    if is_symmetric:
        zeros[:] = 1 << (bits - 1)
    scales = random.uniform(0.01, 0.02, (2, 40)).astype(np.float16)
    stored_zeros = None if is_symmetric else zeros
    matrix = Matrix(GridWeights(pack_rows(codes, bits), scales, stored_zeros, bits))
    group = np.arange(192) // 128
    weight = (codes.astype(np.float32) - zeros[group]) * scales[group].astype(np.float32)
    np.testing.assert_array_equal(matrix.read_rows(np.arange(40)), weight.T)
    x = random.standard_normal((2, 192)).astype(np.float32)
    same = Matrix(GridWeights(codes, scales, stored_zeros, bits))
    np.testing.assert_array_equal(matmul(matrix, x), matmul(same, x))
