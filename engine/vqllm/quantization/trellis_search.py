"""Makes `trellis_codebooks.json`: `python -m vqllm.quantization.trellis_search`.

Per size, multipliers are drawn at random and each gets a table by Lloyd's iteration on Gaussian
samples: encode by Viterbi, set every level to the mean of its samples. The best few are trained on
more samples, and the best of these on samples held out wins. Deterministic; minutes on one core.

Few bits need few levels, and a table of 64 or 128 is one look-up of a processor where 256 are two
and a blend, or sixteen: those tables repeat every level in 4 or 2 neighbouring entries.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from vqkernels.trellis import MAX_BITS, Sweep, sweep_trellis
from vqllm.quantization.trellis import (
    DEVIATION,
    TABLE_SIZE,
    TrellisCodebook,
    decode,
    states_of,
)

TRELLIS_BITS = (10, 12, 14, 16)
NUM_LEVELS = {1: 64, 2: 64, 3: 128, 4: TABLE_SIZE, 5: TABLE_SIZE}  # by bits
_ROWS = 256  # of a column: short, so that codes with a good start are chosen

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Effort:
    """How much to spend on one size.

    Attributes:
        candidates: multipliers tried.
        finalists: of them trained further.
        columns, rounds: samples (in columns of 256) and Lloyd iterations of a candidate.
        final_columns, final_rounds: the same of a finalist.
    """

    candidates: int
    finalists: int = 4
    columns: int = 128
    rounds: int = 4
    final_columns: int = 1024
    final_rounds: int = 12


def effort_of(trellis_bits: int) -> Effort:
    """About a minute on one core."""
    if trellis_bits <= 10:
        return Effort(candidates=512, finalists=8, final_columns=512, final_rounds=8)
    if trellis_bits <= 12:
        return Effort(candidates=1024, finalists=8, final_columns=512, final_rounds=8)
    if trellis_bits <= 14:
        return Effort(candidates=16, finalists=2, final_columns=512, final_rounds=6)
    return Effort(4, finalists=1, columns=64, rounds=3, final_columns=512, final_rounds=4)


def gaussian_columns(seed: int, num_columns: int) -> Floats:
    """Samples (num_columns, rows) of the deviation that the tables are made for."""
    samples = np.random.default_rng(seed).standard_normal((num_columns, _ROWS))
    return (samples * DEVIATION).astype(np.float32)


def mean_squared_error(codebook: TrellisCodebook, samples: Floats) -> float:
    """Of the best paths, relative to the variance of the samples."""
    levels = decode(codebook, _encode(codebook, samples), samples.shape[1])
    return float(np.square((samples - levels) / DEVIATION).mean())


def lloyd(codebook: TrellisCodebook, samples: Floats, rounds: int) -> TrellisCodebook:
    """The codebook after `rounds` iterations; levels without samples stay as they are."""
    num_levels = NUM_LEVELS[codebook.bits]
    shift = codebook.trellis_bits - (num_levels.bit_length() - 1)
    for _ in range(rounds):
        states = states_of(codebook, _encode(codebook, samples), samples.shape[1])
        hashed = (states * codebook.multiplier) & ((1 << codebook.trellis_bits) - 1)
        index = (hashed >> shift).ravel()
        counts = np.bincount(index, minlength=num_levels)
        sums = np.bincount(index, weights=samples.ravel(), minlength=num_levels)
        before = codebook.table[:: TABLE_SIZE // num_levels]
        means = np.where(counts > 0, sums / np.maximum(counts, 1), before)
        codebook = replace(codebook, table=_as_table(means))
    return codebook


def search(bits: int, trellis_bits: int, effort: Effort) -> tuple[TrellisCodebook, float]:
    """The best codebook found, and its error on samples held out."""
    rng = np.random.default_rng([bits, trellis_bits])
    training = gaussian_columns(1, effort.final_columns)
    held_out = gaussian_columns(2, effort.final_columns)
    odd = rng.choice(1 << (trellis_bits - 1), effort.candidates, replace=False) * 2 + 1
    first = training[: effort.columns]
    candidates = [
        lloyd(TrellisCodebook(bits, trellis_bits, int(a), first_table(bits)), first, effort.rounds)
        for a in odd
    ]
    candidates.sort(key=lambda codebook: mean_squared_error(codebook, first))
    finalists = [
        lloyd(codebook, training, effort.final_rounds)
        for codebook in candidates[: effort.finalists]
    ]
    errors = [mean_squared_error(codebook, held_out) for codebook in finalists]
    best = int(np.argmin(errors))
    return finalists[best], errors[best]


def _encode(codebook: TrellisCodebook, samples: Floats) -> NDArray[np.uint8]:
    ones = np.ones((1, samples.shape[1]), np.float32)
    groups = np.zeros(len(samples), np.int32)
    codes, _ = sweep_trellis(Sweep(samples.copy(), ones, groups), codebook.native())
    return codes


def first_table(bits: int) -> NDArray[np.int8]:
    """Quantiles of the Gaussian, turned so that the first row has a good choice.

    From the zero state it can choose 2^bits levels, evenly spaced in the table from entry 0 on; the
    turn makes them the middles of 2^bits equal parts of the Gaussian instead of their borders.
    """
    gaussian, num_levels = NormalDist(0, DEVIATION), NUM_LEVELS[bits]
    points = [gaussian.inv_cdf((i + 0.5) / num_levels) for i in range(num_levels)]
    return _as_table(np.roll(points, -(num_levels >> (bits + 1))))


def _as_table(levels: NDArray[np.float64]) -> NDArray[np.int8]:
    """All entries of a table, from the levels that differ."""
    rounded = np.clip(np.rint(levels), -127, 127).astype(np.int8)
    return np.repeat(rounded, TABLE_SIZE // len(levels))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m vqllm.quantization.trellis_search")
    parser.add_argument("--trellis-bits", type=int, nargs="+", default=TRELLIS_BITS)
    parser.add_argument("--bits", type=int, nargs="+", default=range(1, MAX_BITS + 1))
    parser.add_argument("--output", type=Path, required=True, help="JSON, updated in place")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Search the sizes asked for and put them into the file."""
    options = _parse(arguments)
    books = json.loads(options.output.read_text()) if options.output.exists() else {}
    for trellis_bits in options.trellis_bits:
        for bits in options.bits:
            codebook, error = search(bits, trellis_bits, effort_of(trellis_bits))
            books[codebook.key] = codebook.to_dict()
            sys.stdout.write(f"{codebook.key}: mean squared error {error:.5f}\n")
            lines = (f"  {json.dumps(key)}: {json.dumps(books[key])}" for key in sorted(books))
            options.output.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
