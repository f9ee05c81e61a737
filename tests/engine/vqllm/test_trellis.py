"""The trellis code in numpy: against the native encoder, against brute force, and its codebooks."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vqkernels import NativeUnavailableError
from vqkernels.trellis import Sweep, sweep_trellis
from vqllm.errors import InvalidConfig
from vqllm.quantization import trellis, trellis_search
from vqllm.quantization.trellis import (
    DEVIATION,
    TrellisCodebook,
    codebook_of,
    codes_of,
    decode,
    decode_reference,
    encode_reference,
    shipped_codebooks,
    states_of,
)

pytestmark = pytest.mark.usefixtures("native_encoder")

SIZES = [(bits, trellis_bits) for bits in range(1, 6) for trellis_bits in (10, 13)]


def make_codebook(bits: int, trellis_bits: int) -> TrellisCodebook:
    table = np.random.default_rng(bits).normal(0, DEVIATION, 256).clip(-127, 127)
    return TrellisCodebook(bits, trellis_bits, 743, table.astype(np.int8))


def gaussian(num_rows: int, seed: int = 0) -> trellis.Floats:
    samples = np.random.default_rng(seed).normal(0, DEVIATION, num_rows)
    return samples.astype(np.float32)


def random_scales(num_rows: int) -> trellis.Floats:
    return np.random.default_rng(4).uniform(0.3, 2, num_rows).astype(np.float32)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("num_rows", [1, 33, 130])
def test_the_native_encoder_finds_the_path_of_the_definition(
    size: tuple[int, int], num_rows: int
) -> None:
    codebook, targets, scales = make_codebook(*size), gaussian(num_rows), random_scales(num_rows)
    sweep = Sweep(targets[None].copy(), scales[None], np.zeros(1, np.int32))
    codes, _ = sweep_trellis(sweep, codebook.native())
    path = encode_reference(codebook, targets, scales)
    np.testing.assert_array_equal(codes[0], codes_of(codebook, path))
    np.testing.assert_array_equal(states_of(codebook, codes, num_rows)[0], path)


@pytest.mark.parametrize(("bits", "num_rows"), [(1, 8), (2, 5), (3, 3), (4, 2), (5, 2)])
@pytest.mark.parametrize("seed", range(3))
def test_no_stream_of_bits_beats_the_path(bits: int, num_rows: int, seed: int) -> None:
    codebook, targets, scales = (
        make_codebook(bits, 10),
        gaussian(num_rows, seed),
        random_scales(num_rows),
    )

    def cost(levels: np.ndarray[Any, np.dtype[np.int8]]) -> float:
        return float(np.square(targets.astype(np.float64) - scales * levels.astype(float)).sum())

    streams = itertools.product((0, 1), repeat=bits * num_rows)
    every = np.packbits(np.array(list(streams), np.uint8), axis=1, bitorder="little")
    best = min(map(cost, decode_reference(codebook, every, num_rows)))
    found = cost(codebook.level_of(encode_reference(codebook, targets, scales)))
    assert found == pytest.approx(best, rel=1e-5)


def test_both_decoders_agree() -> None:
    for size in SIZES:
        codebook = make_codebook(*size)
        shape = (4, codebook.stream_bytes(97))
        codes = np.random.default_rng(5).integers(0, 256, shape, dtype=np.uint8)
        np.testing.assert_array_equal(
            decode(codebook, codes, 97), decode_reference(codebook, codes, 97)
        )


def test_decoding_needs_no_native_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise NativeUnavailableError("not built")

    codebook = make_codebook(3, 12)
    codes = np.arange(12, dtype=np.uint8).reshape(1, 12)
    expected = decode(codebook, codes, 32)
    monkeypatch.setattr(trellis, "decode_trellis", missing)
    np.testing.assert_array_equal(decode(codebook, codes, 32), expected)


@pytest.mark.parametrize("key", sorted(shipped_codebooks()))
def test_shipped_codebooks_are_near_the_rate_distortion_bound(key: str) -> None:
    codebook = shipped_codebooks()[key]
    samples = gaussian(3000 if codebook.trellis_bits < 15 else 600)[None]
    ones = np.ones(samples.shape, np.float32)
    codes, _ = sweep_trellis(Sweep(samples.copy(), ones, np.zeros(1, np.int32)), codebook.native())
    error = np.square(samples - decode(codebook, codes, samples.shape[1])).mean()
    excess_bits = np.log2(error / DEVIATION**2) / 2 + codebook.bits
    assert -0.1 < excess_bits < 0.36


def test_the_usual_sizes_are_shipped() -> None:
    usual = {f"{bits}x{size}" for bits in range(1, 6) for size in (10, 12)}
    assert usual <= set(shipped_codebooks())
    assert codebook_of(2, 12).key == "2x12"


def test_a_codebook_survives_json() -> None:
    codebook = make_codebook(2, 12)
    fields = json.loads(json.dumps(codebook.to_dict()))
    read = TrellisCodebook.from_dict(codebook.key, fields)
    assert (read.bits, read.trellis_bits, read.multiplier) == (2, 12, 743)
    np.testing.assert_array_equal(read.table, codebook.table)


@pytest.mark.parametrize(
    ("key", "changes", "field"),
    [
        ("2", {}, "codebook"),
        ("ax12", {}, "codebook"),
        ("6x12", {}, "bits"),
        ("2x17", {}, "trellis_bits"),
        ("2x12", {"multiplier": 6}, "multiplier"),
        ("2x12", {"multiplier": 4097}, "multiplier"),
        ("2x12", {"table": [1, 2]}, "table"),
        ("2x12", {"table": [300] * 256}, "table"),
        ("2x12", {"table": [0.5] * 256}, "table"),
        ("2x12", {"table": "abc"}, "table"),
    ],
)
def test_malformed_codebooks_are_refused(key: str, changes: dict[str, Any], field: str) -> None:
    fields = {**make_codebook(2, 12).to_dict(), **changes}
    with pytest.raises(InvalidConfig, match=field):
        TrellisCodebook.from_dict(key, fields)


def test_a_size_that_is_not_shipped_is_refused_by_name() -> None:
    with pytest.raises(InvalidConfig, match=r"'2x11'.*2x12"):
        codebook_of(2, 11)


def test_lloyds_iteration_lowers_the_error() -> None:
    samples = trellis_search.gaussian_columns(1, 16)
    codebook = replace(make_codebook(2, 10), table=trellis_search.first_table(2))
    trained = trellis_search.lloyd(codebook, samples, 3)
    before = trellis_search.mean_squared_error(codebook, samples)
    assert trellis_search.mean_squared_error(trained, samples) < 0.98 * before


def test_the_search_writes_what_the_reader_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    effort = trellis_search.Effort(2, 1, columns=4, rounds=1, final_columns=4, final_rounds=1)
    monkeypatch.setattr(trellis_search, "effort_of", lambda _: effort)
    target = tmp_path / "books.json"
    for bits in ("1", "2"):
        trellis_search.main(["--trellis-bits", "10", "--bits", bits, "--output", str(target)])
    books = json.loads(target.read_text())
    assert set(books) == {"1x10", "2x10"}
    assert TrellisCodebook.from_dict("2x10", books["2x10"]).bits == 2
    assert "2x10: mean squared error 0.0" in capsys.readouterr().out
