"""Schedules are fixed before the run, and load goes to loopback only."""

from __future__ import annotations

from itertools import pairwise

import pytest

from openloop.arrivals import ArrivalKind, Arrivals
from openloop.target import ForbiddenTarget, require_loopback
from openloop.workload import Workload


def test_equal_seeds_give_equal_schedules_and_others_do_not() -> None:
    schedule = Arrivals(rate=50, duration=4, max_requests=1000, seed=3).offsets()
    assert schedule == Arrivals(rate=50, duration=4, max_requests=1000, seed=3).offsets()
    assert schedule != Arrivals(rate=50, duration=4, max_requests=1000, seed=4).offsets()


def test_poisson_arrivals_have_the_rate_and_the_spread_of_a_poisson_process() -> None:
    offsets = Arrivals(rate=100, duration=100, max_requests=100_000, seed=1).offsets()
    gaps = [after - before for before, after in pairwise(offsets)]
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert mean == pytest.approx(0.01, rel=0.05)
    assert variance == pytest.approx(mean**2, rel=0.1)
    assert all(gap > 0 for gap in gaps)
    assert offsets[-1] < 100


def test_constant_arrivals_are_evenly_spaced() -> None:
    arrivals = Arrivals(rate=4, duration=1, max_requests=99, kind=ArrivalKind.CONSTANT)
    assert arrivals.offsets() == (0.0, 0.25, 0.5, 0.75)
    assert arrivals.span() == 1


def test_max_requests_bounds_the_schedule_and_its_span() -> None:
    arrivals = Arrivals(rate=10, duration=1e6, max_requests=5, kind=ArrivalKind.CONSTANT)
    assert len(arrivals.offsets()) == 5
    assert arrivals.span() == pytest.approx(0.4)


def test_a_schedule_is_never_empty() -> None:
    assert Arrivals(rate=1e-9, duration=0.1, max_requests=5).offsets() == (0.0,)


@pytest.mark.parametrize(
    "values",
    [
        {"rate": 0.0},
        {"rate": float("nan")},
        {"duration": -1.0},
        {"duration": float("inf")},
        {"max_requests": 0},
    ],
)
def test_senseless_schedules_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="give"):
        Arrivals(**({"rate": 1.0, "duration": 1.0, "max_requests": 1} | values))  # type: ignore[arg-type]


@pytest.mark.parametrize("address", ["127.0.0.1:1", "127.9.9.9:1", "localhost:1", "[::1]:1"])
def test_loopback_is_allowed(address: str) -> None:
    assert require_loopback(address) == address


@pytest.mark.parametrize("address", ["10.0.0.1:80", "example.org:80", "[::]:80", "0.0.0.0:80"])
def test_any_other_target_is_refused(address: str) -> None:
    with pytest.raises(ForbiddenTarget, match="only loopback is allowed"):
        require_loopback(address)


def test_payloads_depend_on_the_seed_alone() -> None:
    workload = Workload(image_width=48, image_height=32, num_images=2, seed=5)
    first, second = workload.images()
    assert [first, second] == workload.images()
    assert first != second
    assert first.startswith(b"\xff\xd8")
    assert workload.prompt(3) == workload.prompt(3) != workload.prompt(4)


@pytest.mark.parametrize(
    "values", [{"image_width": 0}, {"image_height": 10**6}, {"num_streams": 0}, {"max_age_ms": -1}]
)
def test_senseless_workloads_are_refused(values: dict[str, int]) -> None:
    (name,) = values
    with pytest.raises(ValueError, match=f"{name} is"):
        Workload(**values)  # type: ignore[arg-type]
