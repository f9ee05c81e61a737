"""From what a person asks for (a method, bits, a budget) to options and a recipe.

Knows the methods' options and the shapes of a model, no weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from vqllm.errors import InvalidConfig
from vqllm.formats.vqstack import EMBEDDING_BITS
from vqllm.quantization.allocation import Candidate, allocate
from vqllm.quantization.base import GroupedSpec, MethodOptions
from vqllm.quantization.gptq import GptqOptions
from vqllm.quantization.recipe import DEFAULT_DAMPINGS, Recipe
from vqllm.quantization.rtn import RtnOptions
from vqllm.quantization.tcq import TcqOptions
from vqllm.quantization.tcq_row import TcqRowOptions
from vqllm.quantization.vptq import VptqOptions
from vqllm.quantization.vptq_candidates import vptq_candidates

METHOD_NAMES = ("gptq", "rtn", "vptq", "tcq")
GRID_METHODS = ("gptq", "rtn")
DIRECTIONS = ("column", "row")
PREPROCESSING = ("none", "quarot", "quarot-portable", "smoothquant")

Shapes = Mapping[str, tuple[int, int]]

# Mean squared error per weight of a unit Gaussian, by bits; of scalars with the best clipping.
_SCALAR = {2: 0.119, 3: 0.0345, 4: 0.0095, 5: 0.0025, 6: 0.00065, 8: 0.00005}
_TRELLIS = {1: 0.29, 2: 0.0690, 3: 0.0180, 4: 0.0049, 5: 0.0014}

# Steps of tuning by method, up to a number of bits per weight. A step of SmolLM2-135M takes about
# 13 seconds of one core; trellis codes are made in less time than codebooks: they get more of it.
_TUNING: Mapping[str, tuple[tuple[float, int], ...]] = {
    "tcq": ((2.6, 80), (3.6, 40)),
    "vptq": ((2.6, 40), (3.6, 20)),
    "gptq": ((3.6, 40), (4.6, 20)),
}


def suggested_steps(method: str, width: float) -> int:
    """Steps of tuning for a method at `width` bits per weight: the fewer bits, the more it gains.

    0 where rounding is left as it is: at many bits, and for the baselines.
    """
    return next((steps for limit, steps in _TUNING.get(method, ()) if width <= limit), 0)


@dataclass(frozen=True)
class QuantizeConfig:
    """What to make of a model.

    Attributes:
        method: one of METHOD_NAMES.
        bits: nominal width of a code; None with `bpw`.
        bpw: true bits per weight of all linears together, overhead counted; the width and sizes of
            every linear are chosen so that the total meets it.
        group_size: input columns that share a scale; None leaves it to the method.
        symmetric: zero point of gptq and rtn in the middle of the codes, which the fastest kernels
            of other tools want, instead of a stored one per group, which rounds better. None takes
            the middle from 4 bits on, unless a rotation keeps other tools from the folder anyway.
        direction: of the trellis: "column" runs along the outputs inside one input column, "row"
            along the inputs inside one output row (worse, no native kernels).
        preprocess: one of PREPROCESSING; None is what suits the method. "quarot-portable" leaves
            out what a decoder would have to do, so that other tools run the folder.
        alpha: strength of the correction towards the full-precision activations.
        dampings: parts of the mean hessian diagonal to choose from.
        seed: of everything random.
        tune_steps: steps of tuning of scales, codebooks and norms afterwards.
        embedding_bits: 8 stores embedding and head in 8 bits; 0 leaves them as they are.

    Raises:
        InvalidConfig: a value is outside its range.
    """

    method: str = "gptq"
    bits: int | None = None
    bpw: float | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    direction: str = "column"
    preprocess: str | None = None
    alpha: float = 0.5
    dampings: tuple[float, ...] = DEFAULT_DAMPINGS
    seed: int = 0
    tune_steps: int = 0
    embedding_bits: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHOD_NAMES:
            raise InvalidConfig("method", self.method, f"one of {', '.join(METHOD_NAMES)}")
        if self.direction not in DIRECTIONS:
            raise InvalidConfig("direction", self.direction, f"one of {DIRECTIONS}")
        if self.direction == "row" and (self.method != "tcq" or self.group_size):
            raise InvalidConfig("direction", "row", '"column", except for tcq without groups')
        if self.symmetric is not None and self.method not in GRID_METHODS:
            raise InvalidConfig("symmetric", self.symmetric, f"absent for {self.method}")
        if self.preprocess not in (None, *PREPROCESSING):
            raise InvalidConfig("preprocess", self.preprocess, f"one of {PREPROCESSING}")
        if self.bits is not None and self.bpw is not None:
            raise InvalidConfig("bits", self.bits, "absent where bpw is given, which chooses them")
        if self.bpw is not None and not 0 < self.bpw <= 16:
            raise InvalidConfig("bpw", self.bpw, "a number in (0, 16]")
        if self.tune_steps < 0:
            raise InvalidConfig("tune_steps", self.tune_steps, "0 or more")
        if self.embedding_bits not in EMBEDDING_BITS:
            raise InvalidConfig("embedding_bits", self.embedding_bits, f"one of {EMBEDDING_BITS}")
        if self.bpw is None:
            Recipe(self.options(), alpha=self.alpha, dampings=self.dampings)

    @property
    def preprocessing(self) -> str:
        """What is done to the model first: the trellis wants Gaussian weights."""
        if self.preprocess is not None:
            return self.preprocess
        return "quarot" if self.method == "tcq" else "none"

    def is_symmetric(self, bits: int) -> bool:
        """Whether grids of that width have their zero point in the middle of the codes."""
        if self.symmetric is not None:
            return self.symmetric
        return bits >= 4 and self.preprocessing != "quarot"

    def options(self, bits: int | None = None) -> MethodOptions:
        """Options of a linear at a width; by default the one that was asked for."""
        if bits is None:
            bits = 4 if self.bits is None else self.bits
        return _options(self, bits)

    def to_dict(self) -> dict[str, Any]:
        """Fit for JSON."""
        return {**asdict(self), "dampings": list(self.dampings)}


def _options(config: QuantizeConfig, bits: int) -> MethodOptions:
    group_size = config.group_size
    grid_group = 128 if group_size is None else group_size
    match config.method:
        case "gptq":
            return GptqOptions(GroupedSpec(bits, grid_group), config.is_symmetric(bits))
        case "rtn":
            return RtnOptions(GroupedSpec(bits, grid_group), config.is_symmetric(bits))
        case "tcq" if config.direction == "row":
            return TcqRowOptions(bits)
        case "tcq":
            return TcqOptions(bits, group_size=group_size or 0)
        case _:
            return _vptq_options(bits, config.seed)


def _vptq_options(bits: int, seed: int) -> VptqOptions:
    """The best codebooks of that many index bits per weight; see `vptq_candidates`."""
    sizes = {1: (4, 16, 0), 2: (4, 256, 0), 3: (4, 256, 16), 4: (4, 256, 256)}
    if bits not in sizes:
        raise InvalidConfig("bits", bits, "1 to 4 for vptq")
    return VptqOptions(*sizes[bits], seed=seed)


def make_recipe(
    config: QuantizeConfig, shapes: Shapes, sensitivities: Mapping[str, float] | None = None
) -> Recipe:
    """The recipe for linears of the given (out, in) shapes.

    Args:
        sensitivities: loss per unit of distortion by linear; needed with a bit budget.

    Raises:
        OverBudget: the bit budget cannot be met.
        InvalidConfig: there is a bit budget and no sensitivity.
    """
    recipe = Recipe(
        default=config.options(4 if config.bpw else None),
        alpha=config.alpha,
        dampings=config.dampings,
        seed=config.seed,
    )
    if config.bpw is None:
        return recipe
    if sensitivities is None:
        raise InvalidConfig("sensitivities", None, "measured, for a bit budget")
    chosen = allocate(
        shapes, sensitivities, lambda name: candidates(config, name, shapes[name]), config.bpw
    )
    return replace(recipe, overrides=chosen)


def candidates(config: QuantizeConfig, name: str, shape: tuple[int, int]) -> list[Candidate]:
    """The ways to quantize a linear (out, in) that a bit budget chooses from.

    Linears that no norm comes before get a scale per input column: tuning moves it as it moves the
    norms before the others.
    """
    has_columns = name.endswith(("o_proj", "down_proj"))
    if config.method == "vptq":
        found = vptq_candidates(*shape, VptqOptions(seed=config.seed))
        return [c for c in found if not (has_columns and _lacks_norm(c.options))]
    distortions = _TRELLIS if config.method == "tcq" else _SCALAR
    found = []
    for bits, distortion in distortions.items():
        options = config.options(bits)
        if isinstance(options, TcqOptions):
            options = replace(options, column_scales=has_columns)
        found.append(Candidate(options, options.bits_of(*shape), distortion))
    return found


def _lacks_norm(options: MethodOptions) -> bool:
    return isinstance(options, VptqOptions) and not options.has_norm
