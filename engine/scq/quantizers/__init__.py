"""Quantizers behind one interface: latents to symbols to measured bytes and back."""

from __future__ import annotations

from collections.abc import Callable

from scq.errors import InvalidCodebook
from scq.quantizers.base import Quantizer, QuantizerConfig, QuantizerOutput
from scq.quantizers.coding import SymbolTables
from scq.quantizers.fsq import FiniteScalarQuantizer
from scq.quantizers.gumbel import GumbelQuantizer
from scq.quantizers.none import Unquantized
from scq.quantizers.rvq import ResidualQuantizer
from scq.quantizers.scq_soft import ExactConvexQuantizer, RelaxedConvexQuantizer
from scq.quantizers.scq_sparse import SparseConvexQuantizer
from scq.quantizers.simvq import SimQuantizer
from scq.quantizers.vq import VectorQuantizer
from scq.quantizers.vq_ema import MovingAverageQuantizer

QUANTIZERS: dict[str, Callable[[QuantizerConfig], Quantizer]] = {
    "vq": VectorQuantizer,
    "vq_ema": MovingAverageQuantizer,
    "gumbel": GumbelQuantizer,
    "rvq": ResidualQuantizer,
    "fsq": FiniteScalarQuantizer,
    "simvq": SimQuantizer,
    "scq_exact": ExactConvexQuantizer,
    "scq_relaxed": RelaxedConvexQuantizer,
    "scq_sparse": SparseConvexQuantizer,
    "none": Unquantized,
}


def build_quantizer(name: str, config: QuantizerConfig) -> Quantizer:
    """The quantizer of that name. Raises InvalidCodebook for an unknown name or bad settings."""
    if name not in QUANTIZERS:
        raise InvalidCodebook(f"unknown quantizer {name!r}; available: {', '.join(QUANTIZERS)}")
    return QUANTIZERS[name](config)


__all__ = [
    "QUANTIZERS",
    "Quantizer",
    "QuantizerConfig",
    "QuantizerOutput",
    "SymbolTables",
    "build_quantizer",
]
