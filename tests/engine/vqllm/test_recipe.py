"""Recipes as data, and how they come from what a person asks for."""

from __future__ import annotations

import json
from typing import Any

import pytest

from vqllm.errors import InvalidConfig, OverBudget
from vqllm.quantization.base import GroupedSpec
from vqllm.quantization.gptq import GptqOptions
from vqllm.quantization.presets import METHOD_NAMES, QuantizeConfig, make_recipe
from vqllm.quantization.recipe import Recipe, options_from_dict, options_to_dict
from vqllm.quantization.tcq import TcqOptions
from vqllm.quantization.vptq import VptqOptions

SHAPES = {f"model.layers.{layer}.{part}": (64, 160) for layer in range(4) for part in ("a", "b")}


def test_json_and_back() -> None:
    recipe = Recipe(
        GptqOptions(GroupedSpec(3, 64), symmetric=False),
        {"a": TcqOptions(3), "b": VptqOptions(vector_length=8)},
        alpha=0.25,
        dampings=(0.01,),
        seed=3,
    )
    text = json.dumps(recipe.to_dict())
    again = Recipe.from_dict(json.loads(text))
    assert again == recipe
    assert again.hash == recipe.hash
    assert again.options_of("a") == TcqOptions(3)
    assert again.options_of("other") == recipe.default


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_options_of_every_method_survive_json(method: str) -> None:
    options = QuantizeConfig(method=method, bits=2).options()
    again = options_from_dict(json.loads(json.dumps(options_to_dict(options))))
    assert again == options
    assert again.method == method


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_the_zero_point_is_in_the_middle_where_other_tools_gain_from_it(method: str) -> None:
    def is_symmetric(bits: int, **wish: Any) -> Any:
        options = QuantizeConfig(method=method, bits=bits, **wish).options()
        return options.symmetric  # type: ignore[attr-defined]

    assert is_symmetric(4)
    assert is_symmetric(4, preprocess="quarot-portable")
    assert not is_symmetric(3)
    assert not is_symmetric(4, preprocess="quarot")
    assert is_symmetric(4, preprocess="quarot", symmetric=True)
    assert not is_symmetric(8, symmetric=False)
    with pytest.raises(InvalidConfig, match="symmetric"):
        QuantizeConfig(method="tcq", bits=2, symmetric=True)


def test_the_hash_tells_recipes_apart() -> None:
    default = TcqOptions(2)
    recipes = [
        Recipe(default),
        Recipe(TcqOptions(3)),
        Recipe(default, {"a": TcqOptions(3)}),
        Recipe(default, alpha=0.4),
        Recipe(default, dampings=(0.01,)),
        Recipe(default, seed=1),
    ]
    assert len({recipe.hash for recipe in recipes}) == len(recipes)


def test_overrides_cannot_be_changed_from_outside() -> None:
    overrides: dict[str, Any] = {"a": TcqOptions(3)}
    recipe = Recipe(TcqOptions(2), overrides)
    overrides["a"] = TcqOptions(4)
    assert recipe.options_of("a") == TcqOptions(3)


@pytest.mark.parametrize(
    "changes", [{"alpha": 1.5}, {"alpha": -0.1}, {"dampings": ()}, {"dampings": (0.0,)}]
)
def test_values_outside_their_range_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidConfig, match=next(iter(changes))):
        Recipe(TcqOptions(2), **changes)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({}, "recipe"),
        ({"default": {"method": "magic"}}, "magic"),
        ({"default": {"method": "tcq", "bitts": 2}}, "bitts"),
        ({"default": {"method": "tcq"}, "beta": 1}, "beta"),
    ],
)
def test_unknown_content_is_named(content: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidConfig, match=named):
        Recipe.from_dict(content)


@pytest.mark.parametrize(
    ("method", "bpw"), [("tcq", 2.3), ("tcq", 3.3), ("vptq", 2.6), ("gptq", 3.5), ("rtn", 4.5)]
)
def test_a_bit_budget_is_met_and_used(method: str, bpw: float) -> None:
    sensitivities = {name: 1.0 + index for index, name in enumerate(SHAPES)}
    recipe = make_recipe(QuantizeConfig(method=method, bpw=bpw), SHAPES, sensitivities)
    true_bpw = recipe.bits_per_weight(SHAPES)
    assert bpw - 0.8 < true_bpw <= bpw
    assert {o.method for o in recipe.overrides.values()} == {method}


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_an_impossible_budget_names_what_can_be_had(method: str) -> None:
    config = QuantizeConfig(method=method, bpw=0.2)
    with pytest.raises(OverBudget, match=r"0\.2 bits per weight cannot be met.*at least \d"):
        make_recipe(config, SHAPES, dict.fromkeys(SHAPES, 1.0))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"method": "magic"}, "method is 'magic', allowed is one of gptq"),
        ({"bits": 7}, "bits"),
        ({"method": "vptq", "bits": 5}, "1 to 4"),
        ({"bits": 4, "bpw": 4.0}, "bits"),
        ({"bpw": 0.0}, "bpw"),
        ({"preprocess": "blur"}, "preprocess"),
        ({"tune_steps": -1}, "tune_steps"),
        ({"alpha": 2.0}, "alpha"),
        ({"dampings": (1.0,)}, "dampings"),
        ({"group_size": 100}, "group_size"),
    ],
)
def test_impossible_wishes_are_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidConfig, match=named):
        QuantizeConfig(**changes)


def test_what_suits_a_method_is_the_default() -> None:
    assert QuantizeConfig(method="tcq").preprocessing == "quarot"
    assert QuantizeConfig(method="tcq", preprocess="none").preprocessing == "none"
    options = QuantizeConfig(method="gptq", bits=3).options()
    assert isinstance(options, GptqOptions)
    assert not options.symmetric
