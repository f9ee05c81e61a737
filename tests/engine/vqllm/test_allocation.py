"""Bit budgets: the true total, optimality against brute force, impossible budgets."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import pytest

from vqllm.errors import OverBudget
from vqllm.quantization.allocation import Candidate, allocate
from vqllm.quantization.presets import suggested_steps
from vqllm.quantization.tcq import TcqOptions

SHAPES = {"a": (64, 64), "b": (64, 32), "c": (32, 128), "d": (16, 16)}
SENSITIVITIES = {"a": 1.0, "b": 0.03, "c": 5.0, "d": 0.0}


def candidates(name: str) -> list[Candidate]:
    found = []
    for bits in range(1, 6):
        options = TcqOptions(bits)
        found.append(Candidate(options, options.bits_of(*SHAPES[name]), 4.0**-bits))
    return found


def total_bits(chosen: dict[str, TcqOptions]) -> float:
    return sum(options.bits_of(*SHAPES[name]) for name, options in chosen.items())


def loss(chosen: dict[str, TcqOptions]) -> float:
    return sum(SENSITIVITIES[name] * 4.0**-options.bits for name, options in chosen.items())


def as_tcq(chosen: Mapping[str, object]) -> dict[str, TcqOptions]:
    return {name: options for name, options in chosen.items() if isinstance(options, TcqOptions)}


def num_weights() -> int:
    return sum(rows * columns for rows, columns in SHAPES.values())


@pytest.mark.parametrize("bpw", [1.5, 2.0, 2.25, 3.1, 4.4, 5.9])
def test_the_budget_holds_and_is_used(bpw: float) -> None:
    chosen = as_tcq(allocate(SHAPES, SENSITIVITIES, candidates, bpw))
    budget = bpw * num_weights()
    assert total_bits(chosen) <= budget
    largest = max(rows * columns for rows, columns in SHAPES.values())
    could_grow = any(chosen[name].bits < 5 and SENSITIVITIES[name] for name in SHAPES)
    assert not could_grow or total_bits(chosen) > budget - largest


@pytest.mark.parametrize("bpw", [1.8, 2.25, 2.9, 3.3, 4.2])
def test_close_to_the_best_of_all_choices(bpw: float) -> None:
    chosen = as_tcq(allocate(SHAPES, SENSITIVITIES, candidates, bpw))
    every = itertools.product(range(1, 6), repeat=len(SHAPES))
    choices = [dict(zip(SHAPES, map(TcqOptions, bits), strict=True)) for bits in every]
    feasible = [choice for choice in choices if total_bits(choice) <= bpw * num_weights()]
    assert loss(chosen) <= 1.6 * min(map(loss, feasible))


def test_more_bits_go_where_more_is_lost() -> None:
    chosen = as_tcq(allocate(SHAPES, SENSITIVITIES, candidates, 2.6))
    assert chosen["c"].bits > chosen["a"].bits > chosen["b"].bits


def test_an_insensitive_linear_gets_the_smallest_choice() -> None:
    chosen = as_tcq(allocate(SHAPES, SENSITIVITIES, candidates, 3.0))
    assert chosen["d"].bits == 1


def test_dominated_choices_are_never_taken() -> None:
    def worse(name: str) -> Sequence[Candidate]:
        wasteful = Candidate(TcqOptions(3, group_size=16), 3.5 * 64 * 64, 0.5)
        return [*candidates(name), wasteful]

    chosen = as_tcq(allocate({"a": (64, 64)}, SENSITIVITIES, worse, 3.6))
    assert chosen["a"] == TcqOptions(3)


def test_an_impossible_budget_names_what_can_be_met() -> None:
    with pytest.raises(OverBudget, match=r"1 bits per weight .* take 1\.\d+ to 5\.\d+"):
        allocate(SHAPES, SENSITIVITIES, candidates, 1.0)


def test_the_result_does_not_depend_on_the_order_of_names() -> None:
    turned = dict(reversed(SHAPES.items()))
    assert allocate(SHAPES, SENSITIVITIES, candidates, 2.7) == allocate(
        turned, SENSITIVITIES, candidates, 2.7
    )


def test_fewer_bits_are_tuned_longer() -> None:
    steps = [suggested_steps("tcq", width) for width in (2.25, 3.25, 4.25, 8)]
    assert steps == sorted(steps, reverse=True)
    assert steps[0] > 0
    assert steps[-1] == suggested_steps("rtn", 2.0) == 0
