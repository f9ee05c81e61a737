"""The benchmark runs every format and refuses a peer that computes something else."""

from __future__ import annotations

import numpy as np
import pytest

from vqkernels import bench


@pytest.mark.parametrize("fields", [{"rounds": 4}, {"num_threads": 0}])
def test_bad_configs_are_refused(fields: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be at least"):
        bench.BenchConfig(**fields)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("where", ["hot", "cold"])
def test_every_format_and_equal_bits_peer_gets_a_row(
    monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.setattr(bench, "COLD_BYTES", 1 << 14)
    config = bench.BenchConfig(rounds=5, seconds=0.001)
    rows = bench.bench_shape(32, 256, where, config)
    names = {row.name for row in rows}
    assert names >= set(bench.FORMATS)
    assert {"ort 2-bit acc4", "ort 4-bit acc4", "ort 8-bit acc4"} <= names
    assert all(0 < row.min_us <= row.median_us for row in rows)
    assert "Gw/s" in str(rows[0])


def test_peer_with_another_result_is_refused() -> None:
    weights = bench.grid(2)(np.random.default_rng(0), 16, 128)
    x = np.ones(128, dtype=np.float32)
    with pytest.raises(RuntimeError, match="wrong layout"):
        bench.check_agreement(weights, x, np.zeros(16, dtype=np.float32))  # type: ignore[arg-type]
