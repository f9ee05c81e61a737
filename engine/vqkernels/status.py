"""Says whether the native kernels can be used, on what, and if not, why and what remains."""

from __future__ import annotations

from dataclasses import dataclass

from vqkernels.errors import NativeUnavailableError
from vqkernels.isa import get_isa
from vqkernels.loader import load_library

ALWAYS_EXECUTORS: tuple[str, ...] = ("onnx", "torch")


@dataclass(frozen=True)
class NativeStatus:
    """The state of the native library in this process.

    Attributes:
        available: the library is loaded and callable.
        isa: the tier in use ("baseline", "avx2", "avx512_vnni"), "" if not available.
        reason: why it is not available, with the remedy; "" if it is.
        executors: names of the model executors that this installation allows.
    """

    available: bool
    isa: str
    reason: str
    executors: tuple[str, ...]

    def __str__(self) -> str:
        names = ", ".join(self.executors)
        if self.available:
            return f"native CPU kernels: available, tier {self.isa}\nexecutors: {names}"
        return f"native CPU kernels: not available\nreason: {self.reason}\nexecutors: {names}"


def native_status() -> NativeStatus:
    """Try to load the library and report; never raises for a missing library."""
    try:
        load_library()
    except NativeUnavailableError as error:
        return NativeStatus(available=False, isa="", reason=str(error), executors=ALWAYS_EXECUTORS)
    return NativeStatus(
        available=True,
        isa=get_isa().name.lower(),
        reason="",
        executors=("native", *ALWAYS_EXECUTORS),
    )
