"""Blocks of true shapes and random weights."""

from __future__ import annotations

from dataclasses import replace

import pytest

from support.tiny_models import CONFIGS
from vqllm.errors import OverBudget
from vqllm.model_config import parse_config
from vqllm.quantization.parts import QuantizedPart
from vqllm.quantization.recipe import Recipe
from vqllm.quantization.rehearsal import rehearse
from vqllm.quantization.tcq import TcqOptions

RECIPE = Recipe(TcqOptions(2), dampings=(0.01,))
CONFIG = parse_config(CONFIGS["llama"])


def test_one_block_is_quantized_and_measured() -> None:
    seen: list[QuantizedPart] = []
    done = rehearse(CONFIG, RECIPE, (4, 16), None, seen.append)
    assert [part.name for part in seen] == [n for n in CONFIG.linear_names() if ".0." in n]
    assert done.seconds > 0
    assert done.peak_bytes > 50 * 10**6
    assert 0 < done.worst_error < 0.5


def test_what_cannot_fit_is_refused() -> None:
    with pytest.raises(OverBudget, match="the run needs about"):
        rehearse(CONFIG, RECIPE, (4, 16), 10**6, lambda part: None)


@pytest.mark.slow
@pytest.mark.parametrize("is_lean", [False])
def test_the_estimate_holds_on_larger_shapes(is_lean: bool) -> None:
    config = replace(
        CONFIG,
        hidden_size=1024,
        intermediate_size=3584,
        num_heads=8,
        num_kv_heads=1,
        head_dim=128,
    )
    shape = (16, 256)
    fast = rehearse(config, RECIPE, shape, None, lambda part: None)
    limit = None if not is_lean else fast.expected_bytes - 10**7
    done = rehearse(config, RECIPE, shape, limit, lambda part: None)
    assert done.is_lean == is_lean
    assert 0.5 * done.expected_bytes < done.peak_bytes < done.expected_bytes
