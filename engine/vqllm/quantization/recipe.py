"""What to do to a model, as data: method options per linear, correction, damping, seed.

A recipe goes to JSON and back and has a hash, so that a stopped run is resumed with the recipe it
was started with and a checkpoint can say how it was made. Knows no model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from types import MappingProxyType
from typing import Any, get_args, get_type_hints

from vqllm.errors import InvalidConfig
from vqllm.quantization.base import MethodOptions
from vqllm.quantization.methods import method_of

DEFAULT_DAMPINGS = (0.01, 0.03, 0.1)


@dataclass(frozen=True)
class Recipe:
    """How every linear of a model is quantized.

    Attributes:
        default: options of the linears that `overrides` does not name.
        overrides: options by full name of the linear; what a bit allocation writes.
        alpha: strength of the correction towards the full-precision activations, 0 to 1; 0 saves
            the second stream of activations.
        dampings: parts of the mean hessian diagonal to choose from; one means no search.
        seed: of everything random in the methods.

    Raises:
        InvalidConfig: a value is outside its range.
    """

    default: MethodOptions
    overrides: Mapping[str, MethodOptions] = field(default_factory=dict)
    alpha: float = 0.5
    dampings: tuple[float, ...] = DEFAULT_DAMPINGS
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise InvalidConfig("alpha", self.alpha, "a number from 0 to 1")
        if not self.dampings or not all(0 < damping < 1 for damping in self.dampings):
            raise InvalidConfig("dampings", self.dampings, "one or more numbers in (0, 1)")
        object.__setattr__(self, "overrides", MappingProxyType(dict(self.overrides)))

    def options_of(self, name: str) -> MethodOptions:
        """Options of the linear called `name`."""
        return self.overrides.get(name, self.default)

    def bits_per_weight(self, shapes: Mapping[str, tuple[int, int]]) -> float:
        """True bits per weight of linears with the given (out, in) shapes, all overhead counted."""
        bits = sum(self.options_of(name).bits_of(*shape) * 1.0 for name, shape in shapes.items())
        return bits / sum(rows * columns for rows, columns in shapes.values())

    def to_dict(self) -> dict[str, Any]:
        """Fit for JSON; `from_dict` reads it."""
        return {
            "default": options_to_dict(self.default),
            "overrides": {name: options_to_dict(o) for name, o in sorted(self.overrides.items())},
            "alpha": self.alpha,
            "dampings": list(self.dampings),
            "seed": self.seed,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """Raises InvalidConfig: a field or a method is unknown."""
        unknown = set(values) - {"default", "overrides", "alpha", "dampings", "seed"}
        if unknown or "default" not in values:
            raise InvalidConfig(
                "recipe", sorted(values), "default, overrides, alpha, dampings, seed"
            )
        overrides = values.get("overrides", {})
        return cls(
            default=options_from_dict(values["default"]),
            overrides={name: options_from_dict(entry) for name, entry in overrides.items()},
            alpha=float(values.get("alpha", 0.5)),
            dampings=tuple(map(float, values.get("dampings", DEFAULT_DAMPINGS))),
            seed=int(values.get("seed", 0)),
        )

    @property
    def hash(self) -> str:
        """16 hexadecimal digits that differ between recipes that differ."""
        return hash_of(self.to_dict())


def hash_of(content: Any) -> str:
    """16 hexadecimal digits of JSON content, independent of the order of keys."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def options_to_dict(options: MethodOptions) -> dict[str, Any]:
    """Fields of a method's options with `method` added, fit for JSON."""
    return {"method": options.method, **_plain(options)}


def options_from_dict(values: Mapping[str, Any]) -> MethodOptions:
    """Raises InvalidConfig: the method is unknown, or one of its fields is."""
    rest = dict(values)
    kind = method_of(str(rest.pop("method", ""))).options
    options: MethodOptions = _build(kind, rest)
    return options


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value) if f.init}
    if isinstance(value, tuple):
        return [_plain(entry) for entry in value]
    return value


def _build(kind: Any, values: Mapping[str, Any]) -> Any:
    """A dataclass of type `kind` from plain values, nested dataclasses included."""
    hints = get_type_hints(kind)
    known = {f.name for f in fields(kind) if f.init}
    if not known >= set(values):
        raise InvalidConfig(kind.__name__, sorted(set(values) - known), f"fields {sorted(known)}")
    return kind(**{name: _restored(hints[name], value) for name, value in values.items()})


def _restored(hint: Any, value: Any) -> Any:
    for candidate in (hint, *get_args(hint)):
        if is_dataclass(candidate) and isinstance(value, Mapping):
            return _build(candidate, value)
    return tuple(value) if isinstance(value, list) else value
