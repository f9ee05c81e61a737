"""The kernels read what vqllm's packing writes."""

from __future__ import annotations

import numpy as np
import pytest

from vqkernels import GptqTensors, pack_gptq, q4_gemv, reference
from vqllm.packing import pack_columns, pack_rows


@pytest.mark.usefixtures("native")
def test_codes_and_zero_points_packed_by_vqllm_are_read_back() -> None:
    random = np.random.default_rng(3)
    codes = random.integers(0, 16, (192, 40), dtype=np.uint8)
    zeros = random.integers(0, 16, (2, 40), dtype=np.uint8)
    layer = GptqTensors(
        qweight=pack_rows(codes, 4),
        scales=random.uniform(0.01, 0.02, (2, 40)).astype(np.float16),
        qzeros=pack_columns(np.asarray((zeros + 15) & 15, dtype=np.uint8), 4),
    )
    np.testing.assert_array_equal(reference.unpack_codes(layer.qweight), codes)
    np.testing.assert_array_equal(reference.unpack_zeros(layer), zeros)
    x = random.standard_normal(192).astype(np.float32)
    np.testing.assert_array_equal(q4_gemv(pack_gptq(layer), x), reference.q4_gemv_int8(layer, x))
