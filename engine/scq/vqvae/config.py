"""What fixes a VQ-VAE's shape: its networks, its levels and its quantizer. Data only."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from scq.errors import ScqError
from scq.quantizers import QUANTIZERS, QuantizerConfig


@dataclass(frozen=True)
class VqVaeConfig:
    """One model. levels 1: van den Oord et al. (2017); 2: Razavi et al. (2019), top and bottom.

    halvings: of each picture side down to the (bottom) code grid; the top grid is half of that.
    width: channels of the networks. blocks: residual blocks on each side of a grid. quantizer
    names an entry of QUANTIZERS, quantization holds its settings, the same for both levels.
    pixel_variance divides the squared error: the variance of the Gaussian log p(x|z).

    Raises:
        ScqError: a field out of range, naming it.
    """

    quantizer: str = "vq"
    quantization: QuantizerConfig = field(
        default_factory=lambda: QuantizerConfig(code_dim=32, num_codes=512)
    )
    levels: int = 1
    halvings: int = 2
    width: int = 64
    blocks: int = 2
    pixel_variance: float = 0.05

    def __post_init__(self) -> None:
        if self.quantizer not in QUANTIZERS or self.quantizer == "none":
            known = ", ".join(name for name in QUANTIZERS if name != "none")
            raise ScqError(f"quantizer {self.quantizer!r} has no codes; choose one of {known}")
        for name in ("halvings", "width"):
            self._require(name, getattr(self, name) >= 1)
        self._require("levels", self.levels in (1, 2))
        self._require("blocks", self.blocks >= 0)
        self._require("pixel_variance", self.pixel_variance > 0)

    def _require(self, name: str, valid: bool) -> None:
        if not valid:
            raise ScqError(f"{name} is out of range: {getattr(self, name)!r}")

    @property
    def stride(self) -> int:
        """Picture sides must be multiples of this many pixels: one latent of the coarsest grid."""
        return int(2 ** (self.halvings + self.levels - 1))

    def to_json(self) -> str:
        """Indented JSON; `from_json` reads it back."""
        return json.dumps(asdict(self), indent=2, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> VqVaeConfig:
        """Inverse of `to_json`. Raises ScqError for anything else."""
        try:
            values = json.loads(text)
            settings = _known(values.pop("quantization"), QuantizerConfig)
            settings["levels"] = tuple(settings["levels"])
            return cls(quantization=QuantizerConfig(**settings), **_known(values, cls))
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ScqError(f"VQ-VAE config is not valid: {error}") from error


def _known(values: dict[str, Any], kind: Any) -> dict[str, Any]:
    unknown = set(values) - {item.name for item in fields(kind)}
    if unknown:
        raise ScqError(f"unknown config fields: {', '.join(sorted(unknown))}")
    return values
