"""Linears spread over a Ray cluster of two workers on this machine."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from vqllm.checkpoint import Checkpoint
from vqllm.errors import CalibrationError, ExecutorUnavailable, InvalidConfig
from vqllm.quantization.base import GroupedSpec
from vqllm.quantization.gptq import GptqOptions
from vqllm.quantization.mappers import LocalMapper, Mapper, make_mapper
from vqllm.quantization.pipeline import Surroundings, quantize_model
from vqllm.quantization.recipe import Recipe
from vqllm.sources import PlainSource

Windows = np.ndarray[Any, np.dtype[np.int64]]


def start_cluster(ray: Any, tries: int = 3) -> None:
    """Two workers here. Ray's own servers now and then do not come up on a busy machine."""
    try:
        ray.init(
            num_cpus=2,
            include_dashboard=False,
            logging_level=logging.ERROR,
            object_store_memory=100 * 2**20,
        )
    except RuntimeError:
        ray.shutdown()
        if tries == 1:
            raise
        start_cluster(ray, tries - 1)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Mapper]:
    ray = pytest.importorskip("ray", reason="ray is not installed (extra: ray)")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        start_cluster(ray)
        with make_mapper("ray") as mapper:
            yield mapper
        ray.shutdown()


@pytest.mark.slow
def test_two_workers_give_the_bytes_of_a_local_run(
    cluster: Mapper, tiny_folder: Path, windows: Windows
) -> None:
    source = PlainSource(Checkpoint(tiny_folder))
    recipe = Recipe(GptqOptions(GroupedSpec(3, 32)), dampings=(0.005, 0.02))
    local = list(quantize_model(source, windows, recipe))
    spread = list(quantize_model(source, windows, recipe, Surroundings(mapper=cluster)))
    for one, other in zip(local, spread, strict=True):
        assert (one.name, one.relative_error, one.damping) == (
            other.name,
            other.relative_error,
            other.damping,
        )
        for name, values in one.linear.tensors().items():
            assert np.array_equal(values, other.linear.tensors()[name])


@pytest.mark.slow
def test_jobs_run_in_other_processes_in_order(cluster: Mapper) -> None:
    import os

    results = cluster.map(_process_and_sum, 10, list(range(6)))
    assert [total for _, total in results] == [10, 11, 12, 13, 14, 15]
    assert os.getpid() not in {process for process, _ in results}


@pytest.mark.slow
def test_an_error_on_a_worker_is_raised_as_it_is(cluster: Mapper) -> None:
    with pytest.raises(CalibrationError, match="job 3"):
        cluster.map(_fail, None, [3])


def _process_and_sum(shared: int, job: int) -> tuple[int, int]:
    import os

    return os.getpid(), shared + job


def _fail(shared: None, job: int) -> None:
    raise CalibrationError(f"job {job}")


def test_the_local_mapper_keeps_the_order() -> None:
    with make_mapper("local") as mapper:
        assert isinstance(mapper, LocalMapper)
        assert mapper.map(lambda shared, job: shared * job, 3, [1, 2]) == [3, 6]


def test_an_unknown_executor_is_refused() -> None:
    with pytest.raises(InvalidConfig, match="executor is 'slurm'"), make_mapper("slurm"):
        pass


def test_a_cluster_that_does_not_start_is_told_with_a_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(**options: object) -> None:
        raise RuntimeError("timed out")

    fake = SimpleNamespace(is_initialized=lambda: False, init=never)
    monkeypatch.setitem(sys.modules, "ray", fake)
    with (
        pytest.raises(ExecutorUnavailable, match=r"did not start.*timed out.*ray start"),
        make_mapper("ray"),
    ):
        pass


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with (
        pytest.raises(ExecutorUnavailable, match=r"install vqstack\[ray\]"),
        make_mapper("ray"),
    ):
        pass
