"""The cost model: shapes, fits, profiles, plans, criteria, and what it refuses."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vqllm.cli import main
from vqllm.errors import CorruptCheckpoint, InvalidConfig, UnknownModel
from vqllm.plan.cost import (
    QuantizationPlan,
    bytes_per_token,
    linear_bytes,
    make_plan,
    other_bytes,
    peak_bytes,
    quantization_seconds,
)
from vqllm.plan.criteria import verdicts
from vqllm.plan.fit import Fit, Timing, fit, nonnegative_least_squares
from vqllm.plan.hardware import PEAKS, Hardware, find_hardware, project
from vqllm.plan.measure import MeasureConfig, measurable, measure_operation, profile_of
from vqllm.plan.operations import OPERATIONS
from vqllm.plan.shapes import NAMES, find_shape
from vqllm.quantization.base import GroupedSpec
from vqllm.quantization.gptq import GptqOptions

FOUR_BITS = QuantizationPlan(GptqOptions(GroupedSpec(4, 128)))
TINY = MeasureConfig("tiny", ((32, 32), (64, 64), (64, 128)), (96, 96), repeats=1, num_threads=1)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("smollm2-135m", 0.1345),
        ("llama-2-7b", 6.738),
        ("llama-2-70b", 68.98),
        ("llama-3-8b", 8.030),
        ("llama-3.1-405b", 405.85),
        ("mistral-7b", 7.242),
        ("qwen2-7b", 7.616),
        ("deepseek-v3", 671.03),
    ],
)
def test_known_shapes_have_the_published_sizes(name: str, billions: float) -> None:
    assert find_shape(name).num_parameters / 1e9 == pytest.approx(billions, rel=5e-4)


def test_a_shape_comes_from_a_folder_or_a_config(tiny_folder: Path, tmp_path: Path) -> None:
    assert find_shape(tiny_folder) == find_shape(tiny_folder / "config.json")
    with pytest.raises(UnknownModel, match="llama-2-7b"):
        find_shape("llama-9")
    broken = tmp_path / "config.json"
    broken.write_text("{")
    with pytest.raises(CorruptCheckpoint, match=r"config\.json"):
        find_shape(broken)


def test_a_fit_finds_the_prices_that_made_the_times() -> None:
    truth = Fit(0.01, (2e-9, 3e-8))
    sizes = [(1, 64, 64), (1, 128, 512), (1, 1024, 256), (1, 2048, 2048), (1, 100, 3000)]
    operation = OPERATIONS["gptq"]
    found = fit(operation, [Timing(size, truth.seconds(operation, size)) for size in sizes])
    assert found.fixed == pytest.approx(truth.fixed, rel=1e-6)
    assert found.prices == pytest.approx(truth.prices, rel=1e-6)
    with pytest.raises(InvalidConfig, match="three"):
        fit(operation, [Timing((1, 2, 3), 1.0)])


def test_prices_are_never_negative() -> None:
    matrix = np.array([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]])
    falling = nonnegative_least_squares(matrix, np.array([3.0, 2.0, 1.0]))
    assert (falling >= 0).all()
    np.testing.assert_allclose(falling, [2.0, 0.0])


def test_measuring_makes_a_profile_that_is_read_back(tmp_path: Path) -> None:
    results = [measure_operation(name, TINY) for name in ("gemm", "gram", "factorize", "read")]
    assert all(len(one.timings) == 3 and one.predicted >= 0 for one in results)
    profile = profile_of(TINY, results, 1e9, "a note")
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(profile.to_dict()))
    assert find_hardware(str(path)) == profile
    path.write_text('{"name": "x"}')
    with pytest.raises(CorruptCheckpoint, match="profile"):
        find_hardware(str(path))
    with pytest.raises(InvalidConfig, match="h100"):
        find_hardware("gpu9")


@pytest.mark.parametrize("name", measurable())
def test_every_operation_can_be_measured(name: str) -> None:
    shapes = ((64, 64), (64, 128), (128, 64))
    config = MeasureConfig("tiny", shapes, (128, 128), repeats=1, num_threads=1)
    assert math.isfinite(measure_operation(name, config).error)


def test_bytes_are_exact() -> None:
    shape = find_shape("llama-3.1-405b")
    two = GptqOptions(GroupedSpec(2, 128))
    overhead = linear_bytes(shape, two) / (shape.num_linear_parameters / 4)
    assert 1 < overhead < 1.1
    assert other_bytes(shape) / 1e9 == pytest.approx(8.4, abs=0.05)
    dense = find_shape("llama-2-7b")
    head = dense.vocab_size * dense.hidden_size
    assert bytes_per_token(dense, two) == pytest.approx(linear_bytes(dense, two) + head)


def test_experts_are_stored_all_and_read_in_part() -> None:
    shape, options = find_shape("deepseek-v3"), FOUR_BITS.options
    assert linear_bytes(shape, options) > 300e9
    assert 15e9 < bytes_per_token(shape, options) < 25e9


def test_time_grows_with_the_model_and_with_the_correction() -> None:
    machine = project("h100-80gb", PEAKS["h100-80gb"])
    hours = [
        sum(quantization_seconds(find_shape(name), FOUR_BITS, machine).values())
        for name in ("llama-2-7b", "llama-2-70b", "llama-3.1-405b")
    ]
    assert hours == sorted(hours)
    plain = QuantizationPlan(FOUR_BITS.options, num_dampings=1, correct=False)
    shape = find_shape("llama-2-7b")
    assert sum(quantization_seconds(shape, plain, machine).values()) < hours[0]
    assert peak_bytes(shape, plain) < peak_bytes(shape, FOUR_BITS)
    with pytest.raises(InvalidConfig, match="num_tokens"):
        QuantizationPlan(FOUR_BITS.options, num_tokens=100)


def test_every_line_is_labelled() -> None:
    for name in NAMES:
        for machine in (project("h100-80gb", PEAKS["h100-80gb"]), find_hardware("reference")):
            lines = make_plan(find_shape(name), FOUR_BITS, machine)
            assert {line.basis for line in lines} == {"projected"}
            assert all(line.how for line in lines)
    big = make_plan(find_shape("llama-3.1-405b"), FOUR_BITS, project("x", PEAKS["a100-80gb"]))
    assert "does not fit" in big[-1].how


def test_the_reference_machine_is_measured_and_validated() -> None:
    machine: Hardware = find_hardware("reference")
    assert machine.basis == "measured"
    assert set(machine.fits) == set(OPERATIONS)
    assert all(len(rows) >= 5 for rows in machine.timings.values())
    assert set(machine.validation) == set(machine.fits)


def test_criteria_name_the_numbers() -> None:
    reasons = " ".join(verdict.reason for verdict in verdicts())
    for number in ("100 GB", "0.398 bits", "14.8 GB", "1.0 TB/s"):
        assert number in reasons


def test_the_command_prints_plans_and_measures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*words: str | Path) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["vqllm", "plan", *map(str, words)])
        with pytest.raises(SystemExit) as done:
            main()
        return int(done.value.code or 0), capsys.readouterr().out

    code, output = run(
        "llama-3.1-405b", "--method", "gptq", "--bits", "2", "--hardware", "h200-141gb",
        "--criteria", "--json", "-",
    )  # fmt: skip
    facts = json.loads(output)
    assert code == 0
    assert {line["basis"] for line in facts["lines"]} == {"projected"}
    assert len(facts["criteria"]) == 6
    monkeypatch.setattr("vqllm.plan.measure.STREAM_BYTES", 2**20)
    monkeypatch.setattr(
        "vqllm.plan.measure.MeasureConfig", lambda name, **_: replace(TINY, name=name)
    )
    profile = tmp_path / "profile.json"
    for operations in ("gemm", "gram"):
        assert run("--measure", profile, "--operations", operations, "--name", "mine")[0] == 0
    assert set(find_hardware(str(profile)).fits) == {"gemm", "gram"}
    assert run("no-such-model")[0] == 1
    assert run("llama-2-7b", "--method", "gptq", "--hardware", "h100-80gb")[0] == 0
