"""The benchmark runs every tier and refuses a peer that computes something else."""

from __future__ import annotations

import numpy as np
import pytest

from vqkernels import bench, bench_matrix, supported_isas


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("cold", [False, True])
def test_every_tier_and_peer_gets_a_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, cold: bool
) -> None:
    monkeypatch.setattr(bench, "COLD_BYTES", 1 << 14)
    bench.bench_shape(24, 192, bench.BenchConfig(rounds=5, seconds=0.001, cold=cold))
    printed = capsys.readouterr().out
    for name in (*(f"vq {isa.name.lower()}" for isa in supported_isas()), "numpy dense fp32"):
        assert name in printed
    assert "ort MatMulNBits acc4" in printed


def test_peer_with_another_result_is_refused() -> None:
    layer = bench.random_layer(16, 128)
    x = np.ones(128, dtype=np.float32)
    with pytest.raises(RuntimeError, match="wrong layout"):
        bench.check_agreement(layer, x, np.zeros(16, dtype=np.float32))


@pytest.mark.parametrize("fields", [{"rounds": 4}, {"num_threads": 0}])
def test_bad_configs_are_refused(fields: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be at least"):
        bench.BenchConfig(**fields)  # type: ignore[arg-type]


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("where", ["hot", "cold"])
def test_every_format_and_equal_bits_peer_gets_a_row(
    monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.setattr(bench_matrix, "COLD_BYTES", 1 << 14)
    config = bench.BenchConfig(rounds=5, seconds=0.001)
    rows = bench_matrix.bench_shape(32, 256, where, config)
    names = {row.name for row in rows}
    assert names >= set(bench_matrix.FORMATS)
    assert {"ort 2-bit acc4", "ort 4-bit acc4", "ort 8-bit acc4"} <= names
    assert all(0 < row.min_us <= row.median_us for row in rows)
    assert "Gw/s" in str(rows[0])


def test_format_peer_with_another_result_is_refused() -> None:
    weights = bench_matrix.grid(2)(np.random.default_rng(0), 16, 128)
    x = np.ones(128, dtype=np.float32)
    with pytest.raises(RuntimeError, match="wrong layout"):
        bench_matrix.check_agreement(weights, x, np.zeros(16, dtype=np.float32))  # type: ignore[arg-type]
