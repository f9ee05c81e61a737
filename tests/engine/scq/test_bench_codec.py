"""The codec benchmark runs, times every stage and counts whole frames; no times are asserted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from scq import bench_codec
from scq.codec import FrameCodec
from scq.errors import ScqError
from scq.model import ScqAutoencoder


def test_every_stage_is_timed(tiny_model: ScqAutoencoder, monkeypatch: pytest.MonkeyPatch) -> None:
    codec = FrameCodec(tiny_model)
    image = bench_codec.photograph(48)
    monkeypatch.setattr(bench_codec, "available_formats", lambda: (["jpeg"], []))
    timings = bench_codec.bench([codec], image)
    ours = {t.operation: t for t in timings if t.contender == "scq tiny raw, 48x48"}
    assert set(ours) >= {"encode", "encode: encoder", "encode: entropy", "decode"}
    assert ours["encode"].rounds == 100
    assert ours["encode"].coded_bytes == len(codec.encode(image, entropy="raw").codes)
    assert ours["encode"].p50_ms <= ours["encode"].p95_ms
    assert any(t.contender.startswith("jpeg q30") for t in timings)
    with pytest.raises(ScqError, match="at least 100"):
        bench_codec.bench([codec], image, 5)


def test_the_synthetic_picture_is_the_same_everywhere() -> None:
    picture = bench_codec.photograph(64)
    assert picture.shape == (64, 64, 3)
    assert picture.std() > 20
    assert np.array_equal(picture, bench_codec.photograph(64))


def test_timings_are_written_as_json(
    tiny_model: ScqAutoencoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timing = bench_codec.Timing("scq tiny", "encode", 1.0, 2.0, 30, 100)
    monkeypatch.setattr(bench_codec, "bench", lambda *_: [timing])
    monkeypatch.setattr("scq.zoo.list_models", list)
    page = tmp_path / "page.md"
    bench_codec.main(["--json", str(tmp_path / "codec.json"), "--report", str(page)])
    assert "| scq tiny | encode | 1.00 | 2.00 | 30 |" in page.read_text()
    assert json.loads((tmp_path / "codec.json").read_text())[0]["p95_ms"] == 2.0


def test_targets_are_judged_by_the_worst_frame() -> None:
    def timing(contender: str, operation: str, p95_ms: float) -> bench_codec.Timing:
        return bench_codec.Timing(contender, operation, 1.0, p95_ms, 30, 100)

    timings = [
        timing("scq nav raw, 256x256", "encode", 11.0),
        timing("scq food rans, 256x256", "encode", 14.9),
        timing("scq sign32 raw, 32x32", "encode", 99.0),
        timing("avif q30, 256x256", "encode", 99.0),
        timing("scq nav raw, 256x256", "decode", 5.1),
    ]
    verdict = bench_codec._verdict(timings)
    assert "encode within 15 ms p95: **met**, 11.0 to 14.9 ms" in verdict
    assert "decode within 5 ms p95: **missed**, 5.1 to 5.1 ms" in verdict
