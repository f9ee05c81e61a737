"""Shared worlds for the kernel tests: the native library, and random layers of any shape."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import numpy as np
import pytest

from vqkernels import GptqTensors, native_status
from vqkernels.layout import CheckpointFormat

LayerFactory = Callable[..., GptqTensors]


@pytest.fixture(scope="session")
def native() -> None:
    """Skip where nothing could be built; fail where a compiler is there but the library is not."""
    status = native_status()
    if status.available:
        return
    if any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        pytest.fail(f"a C++ compiler is installed, but: {status.reason}")
    pytest.skip(status.reason)


@pytest.fixture(scope="session")
def make_layer() -> LayerFactory:
    """Random 4-bit layers: uniform codes, positive scales, zero points 8 or uniform."""

    def make(
        in_features: int,
        out_features: int,
        *,
        group_size: int = 128,
        has_zeros: bool = False,
        checkpoint_format: CheckpointFormat = "gptq",
        seed: int = 0,
    ) -> GptqTensors:
        random = np.random.default_rng(seed)
        num_groups = -(-in_features // group_size)

        def words(rows: int, cols: int) -> np.ndarray[tuple[int, ...], np.dtype[np.int32]]:
            values = random.integers(-(2**31), 2**31, (rows, cols), dtype=np.int64)
            return values.astype(np.int32)

        return GptqTensors(
            qweight=words(in_features // 8, out_features),
            scales=random.uniform(1e-3, 2e-2, (num_groups, out_features)).astype(np.float16),
            qzeros=words(num_groups, -(-out_features // 8)) if has_zeros else None,
            group_size=group_size,
            checkpoint_format=checkpoint_format,
        )

    return make
