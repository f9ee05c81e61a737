"""Threads that share out pieces of a job: order, errors, and the same result for any number."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vqllm.checkpoint import Checkpoint
from vqllm.errors import InvalidConfig
from vqllm.outlier.quarot import QuarotOptions, RotatedSource
from vqllm.quantization.mappers import LocalMapper
from vqllm.quantization.pipeline import Surroundings, quantize_model
from vqllm.quantization.presets import QuantizeConfig
from vqllm.quantization.products import multiply, multiply_rows
from vqllm.quantization.recipe import Recipe
from vqllm.quantization.sensitivity import sensitivities
from vqllm.quantization.workers import Workers, one_thread_each
from vqllm.sources import PlainSource
from vqllm.tuning.tune import TuningConfig, TuningStep, tune

RunVqllm = Callable[..., tuple[int, str, str]]
Windows = np.ndarray[Any, np.dtype[np.int64]]


def test_results_come_in_the_order_of_the_items() -> None:
    def slow_first(item: int) -> int:
        time.sleep(0.02 * (item == 0))
        return item * item

    with Workers(3) as workers:
        assert list(workers.map(slow_first, range(20))) == [item * item for item in range(20)]


def test_two_pieces_run_at_a_time() -> None:
    meeting = threading.Barrier(2, timeout=10)
    with Workers(2) as workers:
        workers.run(lambda _: meeting.wait(), range(4))


def test_few_results_wait_at_a_time() -> None:
    started: list[int] = []
    with Workers(2) as workers:
        results = workers.map(started.append, range(100))
        next(results)
        assert len(started) <= 4
        results.close()
    assert len(started) <= 4


@pytest.mark.parametrize("count", [1, 2])
def test_the_first_error_is_raised_and_the_rest_left(count: int) -> None:
    def fail(item: int) -> int:
        if item == 2:
            raise ValueError(f"piece {item}")
        return item

    with Workers(count) as workers, pytest.raises(ValueError, match="piece 2"):
        list(workers.map(fail, range(50)))


@pytest.mark.parametrize("count", [1, 2])
def test_pieces_see_one_thread_and_the_callers_mode(count: int) -> None:
    def look(_: int) -> tuple[int, bool]:
        return torch.get_num_threads(), torch.is_grad_enabled()

    with Workers(count) as workers, one_thread_each(), torch.no_grad():
        assert set(workers.map(look, range(8))) == {(1, False)}


def test_the_number_of_threads_comes_back() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    with one_thread_each():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


def test_zero_is_one_per_processor_and_less_is_refused() -> None:
    assert Workers(0).count >= 1
    with pytest.raises(InvalidConfig, match="threads is -1"):
        Workers(-1)


def test_products_are_those_of_torch() -> None:
    left, right = torch.randn(30, 20), torch.randn(30, 20)
    with torch.no_grad():
        assert torch.allclose(multiply(left, right), left @ right.T, atol=1e-5)
        assert torch.allclose(multiply_rows(left, right), left.T @ right, atol=1e-5)
        assert torch.allclose(multiply(left[None], right)[0], left @ right.T, atol=1e-5)
    left.requires_grad_()
    assert multiply(left, right).requires_grad


def rotated(folder: Path) -> RotatedSource:
    return RotatedSource(PlainSource(Checkpoint(folder)), QuarotOptions())


def quantized(source: RotatedSource, windows: Windows, recipe: Recipe, count: int) -> list[Any]:
    with Workers(count) as workers:
        surroundings = Surroundings(LocalMapper(workers), workers)
        parts = list(quantize_model(source, windows, recipe, surroundings))
    return [(part.name, part.relative_error, part.damping, part.linear) for part in parts]


@pytest.mark.parametrize("method", ["gptq", "tcq", "vptq"])
def test_any_number_of_workers_gives_the_same_bytes(
    tiny_folder: Path, windows: Windows, method: str
) -> None:
    group_size = 32 if method == "gptq" else None
    options = QuantizeConfig(method=method, bits=2, group_size=group_size).options()
    recipe = Recipe(options, dampings=(0.01, 0.03, 0.1))
    source = rotated(tiny_folder)
    one, three = (quantized(source, windows, recipe, count) for count in (1, 3))
    for first, second in zip(one, three, strict=True):
        assert first[:3] == second[:3]
        for name, values in first[3].tensors().items():
            assert np.array_equal(values, second[3].tensors()[name]), (first[0], name)


def test_any_number_of_workers_measures_the_same(tiny_folder: Path, windows: Windows) -> None:
    source = rotated(tiny_folder)
    with Workers(3) as workers:
        assert sensitivities(source, windows, None, workers) == sensitivities(source, windows)


@pytest.mark.parametrize("method", ["gptq", "tcq", "vptq"])
def test_any_number_of_workers_tunes_the_same(
    tiny_folder: Path, windows: Windows, method: str
) -> None:
    group_size = 32 if method == "gptq" else None
    options = QuantizeConfig(method=method, bits=2, group_size=group_size).options()
    source = rotated(tiny_folder)
    parts = quantized(source, windows, Recipe(options, dampings=(0.01,)), 1)
    linears = {part[0]: part[3] for part in parts}
    found = []
    for count in (1, 2):
        config = TuningConfig(4, validation_windows=1, recompute=count > 1)
        steps: list[TuningStep] = []
        with Workers(count) as workers:
            result = tune(source, linears, windows, config, steps.append, workers)
        found.append((steps, result.before, result.after))
    assert found[0] == found[1]


def test_the_command_gives_the_same_bytes_with_any_number_of_threads(
    tiny_folder: Path, tmp_path: Path, run_vqllm: RunVqllm
) -> None:
    words = ("--method", "tcq", "--bpw", "2.5", "--windows", "6", "--window-length", "64")
    for count in ("1", "2"):
        target = tmp_path / count / "out"
        target.parent.mkdir()
        code, _, errors = run_vqllm(
            "quantize", tiny_folder, "-o", target, *words, "--threads", count, "--tune-steps", "2"
        )
        assert code == 0, errors
    one, two = (tmp_path / count / "out" for count in ("1", "2"))
    assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}
    for path in one.iterdir():
        assert path.read_bytes() == (two / path.name).read_bytes(), path.name
