"""From what a person asks for (a method, bits, a budget) to a recipe.

Knows the methods' options and the shapes of a model, no weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vqllm.errors import InvalidConfig
from vqllm.quantization.base import GroupedSpec, MethodOptions
from vqllm.quantization.gptq import GptqOptions
from vqllm.quantization.methods import method_of
from vqllm.quantization.recipe import DEFAULT_DAMPINGS, Recipe

PREPROCESSING = ("none", "quarot", "smoothquant")

Shapes = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class QuantizeConfig:
    """What to make of a model.

    Attributes:
        method: a key of METHODS.
        bits: nominal width of a code; None with `bpw`.
        bpw: true bits per weight of all linears together, overhead counted; the width and sizes of
            every linear are chosen so that the total meets it.
        group_size: input columns that share a scale.
        preprocess: one of PREPROCESSING.
        alpha: strength of the correction towards the full-precision activations.
        dampings: parts of the mean hessian diagonal to choose from.
        seed: of everything random.
        tune_steps: steps of tuning of scales, codebooks and norms afterwards.

    Raises:
        InvalidConfig: a value is outside its range.
    """

    method: str = "gptq"
    bits: int | None = 4
    bpw: float | None = None
    group_size: int = 128
    preprocess: str = "none"
    alpha: float = 0.5
    dampings: tuple[float, ...] = DEFAULT_DAMPINGS
    seed: int = 0
    tune_steps: int = 0

    def __post_init__(self) -> None:
        method_of(self.method)
        if self.preprocess not in PREPROCESSING:
            raise InvalidConfig("preprocess", self.preprocess, f"one of {PREPROCESSING}")
        if (self.bits is None) == (self.bpw is None):
            raise InvalidConfig("bits", self.bits, "given, or else bpw, and not both")
        if self.tune_steps < 0:
            raise InvalidConfig("tune_steps", self.tune_steps, "0 or more")
        if self.bpw is None:
            self.options()

    def options(self) -> MethodOptions:
        """Options of every linear without a bit budget."""
        return GptqOptions(GroupedSpec(self.bits or 4, self.group_size))


def make_recipe(config: QuantizeConfig, shapes: Shapes) -> Recipe:
    """The recipe for linears of the given (out, in) shapes.

    Raises:
        InvalidConfig, OverBudget: the bit budget cannot be met.
    """
    return Recipe(
        default=config.options(),
        alpha=config.alpha,
        dampings=config.dampings,
        seed=config.seed,
    )
