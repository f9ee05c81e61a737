"""The fuzzer: hostile bytes do no harm, and harm would be noticed."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from scq import fuzz
from scq.errors import UnsupportedOperation
from vqkernels.scq1 import Scq1Error, Scq1Reason
from vqkernels.status import native_status


def test_hostile_bytes_are_refused_or_decode_to_valid_codes() -> None:
    report = fuzz.fuzz(fuzz.FuzzLimits(60_000), seed=1)
    assert report.num_bytes >= 60_000
    results = {result for _, result in report.outcomes}
    assert results == {"decoded", "base layer", "CorruptCodes", "ReferenceMismatch"}
    # Repaired checks let damage through to the segments: some of it decodes.
    assert report.outcomes["flip a bit", "decoded"] > 0
    assert {mutation for mutation, _ in report.outcomes} >= {"cut", "splice", "random frame"}


def test_runs_repeat_for_the_same_seed() -> None:
    one, two = (fuzz.fuzz(fuzz.FuzzLimits(3000), seed=1) for _ in range(2))
    assert one.outcomes == two.outcomes


def test_a_crash_is_reported_with_the_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise IndexError("list index out of range")

    monkeypatch.setattr(fuzz, "unpack", broken)
    with pytest.raises(fuzz.FuzzFailure, match=r"IndexError.* for [0-9a-f]*"):
        fuzz.fuzz(fuzz.FuzzLimits(1), seed=1)


def test_errors_of_another_family_and_slow_frames_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(fuzz.FuzzFailure, match=r"s for "):
        fuzz.fuzz(fuzz.FuzzLimits(1000, seconds_per_frame=0), seed=1)

    def unsupported(*arguments: object, **options: object) -> None:
        raise UnsupportedOperation("no")

    monkeypatch.setattr(fuzz, "unpack", unsupported)
    with pytest.raises(fuzz.FuzzFailure, match="UnsupportedOperation"):
        fuzz.fuzz(fuzz.FuzzLimits(1), seed=1)


@pytest.mark.skipif(not native_status().available, reason="the native library is not built")
def test_a_native_decoder_that_finds_something_else_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(*arguments: object, **options: object) -> None:
        raise Scq1Error(Scq1Reason.STREAM)

    monkeypatch.setattr("scq.bitstream.coder.NativeCoder.unpack_natively", refusing)
    with pytest.raises(fuzz.FuzzFailure, match="only the native decoder refuses"):
        fuzz.fuzz(fuzz.FuzzLimits(20_000), seed=1)


def test_the_command_prints_what_happened() -> None:
    import typer

    app = typer.Typer()
    app.command()(fuzz.main)
    result = CliRunner().invoke(app, ["--bytes", "2000", "--seed", "1"])
    assert result.exit_code == 0, result.output
    assert "no crash" in result.output
    assert "CorruptCodes" in result.output
