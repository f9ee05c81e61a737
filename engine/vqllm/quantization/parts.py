"""Finished linears on their way from the core loop to a folder.

Knows no model and no file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from vqllm.quantization.base import QuantizedLinear


@dataclass(frozen=True)
class QuantizedPart:
    """One finished linear.

    Attributes:
        name: full name.
        relative_error: of its outputs, squared, on the calibration rows; see `LinearResult`.
        damping: of its hessian, as part of the mean diagonal.
    """

    name: str
    linear: QuantizedLinear
    relative_error: float
    damping: float = 0.0


class PartStore(Protocol):
    """Keeps finished linears between runs."""

    def load(self, name: str) -> QuantizedPart | None:
        """The linear, or None when it is not finished yet."""
        ...

    def save(self, part: QuantizedPart) -> None: ...
