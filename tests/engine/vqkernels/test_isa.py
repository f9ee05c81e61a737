"""Tiers are forced, restored and refused by name."""

from __future__ import annotations

import pytest

from vqkernels import Isa, IsaError, forced_isa, get_isa, set_isa, supported_isas
from vqkernels.isa import TIERS

pytestmark = pytest.mark.usefixtures("native")


def test_forced_tier_is_used_and_restored() -> None:
    before = get_isa()
    with forced_isa(Isa.BASELINE):
        assert get_isa() is Isa.BASELINE
    assert get_isa() is before


def test_auto_is_the_best_supported_tier() -> None:
    with forced_isa(Isa.BASELINE):
        set_isa(Isa.AUTO)
        assert get_isa() is supported_isas()[-1]


def test_baseline_always_runs_and_unknown_tiers_never_do() -> None:
    assert supported_isas()[0] is Isa.BASELINE
    unsupported = set(TIERS) - set(supported_isas())
    for tier in unsupported:
        with pytest.raises(IsaError, match=tier.name):
            set_isa(tier)
