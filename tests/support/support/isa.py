"""`VQ_ISA=baseline make test` runs every test on one instruction-set tier of the kernels."""

from __future__ import annotations

import os

VARIABLE = "VQ_ISA"


def apply() -> None:
    """Force the tier that the environment names, in this process; nothing without the variable.

    Raises:
        ValueError: no such tier; lists them.
        IsaError: this machine cannot run it.
    """
    name = os.environ.get(VARIABLE)
    if not name:
        return
    # Imported here, so that test processes without the variable load no library early.
    from vqkernels.isa import Isa, set_isa

    tiers = {isa.name.lower(): isa for isa in Isa} | {"avx512": Isa.AVX512_VNNI}
    if name not in tiers:
        raise ValueError(f"{VARIABLE} is {name!r}; known: {', '.join(sorted(tiers))}")
    set_isa(tiers[name])
