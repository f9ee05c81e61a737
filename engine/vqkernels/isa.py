"""Which instruction-set tier the kernels run on, and how to force one.

The choice is made by the library from cpuid and the operating system's state, once. Forcing is for
tests and measurements; all tiers give the same bits.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from contextlib import contextmanager

from vqkernels.errors import IsaError
from vqkernels.loader import load_library


class Isa(enum.IntEnum):
    """Tiers of ``vq_isa``, slowest first. AUTO is only an argument of :func:`set_isa`."""

    AUTO = -1
    BASELINE = 0
    AVX2 = 1
    AVX512_VNNI = 2
    AVX512_VBMI = 3


TIERS: tuple[Isa, ...] = (Isa.BASELINE, Isa.AVX2, Isa.AVX512_VNNI, Isa.AVX512_VBMI)


def supported_isas() -> tuple[Isa, ...]:
    """The tiers this build holds and this machine can run, slowest first."""
    library = load_library()
    return tuple(isa for isa in TIERS if library.vq_isa_supported(int(isa)))


def get_isa() -> Isa:
    """The tier the next call will use."""
    return Isa(load_library().vq_get_isa())


def set_isa(isa: Isa) -> None:
    """Force a tier for the whole process; ``Isa.AUTO`` returns to the best one.

    Raises:
        IsaError: this CPU or this build cannot run the tier.
    """
    if load_library().vq_set_isa(int(isa)) != 0:
        names = ", ".join(tier.name for tier in supported_isas())
        raise IsaError(f"tier {isa.name} cannot run here; supported: {names}")


@contextmanager
def forced_isa(isa: Isa) -> Iterator[None]:
    """Run a block on one tier of the whole process, then go back to the tier before it."""
    before = get_isa()
    set_isa(isa)
    try:
        yield
    finally:
        set_isa(before)
