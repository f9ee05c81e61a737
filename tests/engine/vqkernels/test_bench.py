"""The benchmark runs every format and refuses a peer that computes something else."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from vqkernels import bench
from vqkernels.synthetic import grid, vq


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


# A stand-in for the wheel's program: the right product, by numpy.
WHEEL = """
import sys
from pathlib import Path
import numpy as np
folder = Path(sys.argv[1])
indices, centroids, x = (np.load(folder / f"{name}.npy") for name in ("indices", "centroids", "x"))
rows = centroids.astype(np.float32)[indices].transpose(0, 2, 1).reshape(-1, indices.shape[1])
np.save(folder / "y.npy", rows @ x)
print("vptq 0", flush=True)
for line in sys.stdin:
    print("done", flush=True)
"""


@pytest.mark.usefixtures("native")
def test_the_vptq_wheel_gets_a_row_beside_ours(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = tmp_path / "wheel.py"
    script.write_text(WHEEL)
    monkeypatch.setattr(bench, "VPTQ_SCRIPT", script)
    monkeypatch.setattr(bench, "VPTQ_CODES", 512)
    config = bench.BenchConfig(rounds=5, seconds=0.001)
    rows = list(bench.bench_vptq(Path(sys.executable), config, ((32, 256),)))
    assert [row.name for row in rows] == ["vq K65536 v8", "vptq 0"]


def test_a_wheel_that_does_not_start_shows_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = tmp_path / "wheel.py"
    script.write_text("raise SystemExit('no module named vptq')")
    monkeypatch.setattr(bench, "VPTQ_SCRIPT", script)
    x = np.ones(64, dtype=np.float32)
    with pytest.raises(RuntimeError, match="no module named vptq"):
        bench.VptqWheel(Path(sys.executable), vq(8, 16)(32, 64, 0), x, bench.BenchConfig())


def test_peer_with_another_result_is_refused() -> None:
    weights = grid(2)(16, 128, 0)
    x = np.ones(128, dtype=np.float32)
    with pytest.raises(RuntimeError, match="wrong layout"):
        bench.check_agreement(weights, x, np.zeros(16, dtype=np.float32))
