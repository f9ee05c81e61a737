"""Sensitivities against measured divergences, and their basic properties."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from vqllm.checkpoint import Checkpoint
from vqllm.decoder.block import forward_block, trace_block
from vqllm.decoder.rope import RotaryTable
from vqllm.errors import CalibrationError, InvalidConfig
from vqllm.outlier.quarot import QuarotOptions, RotatedSource
from vqllm.quantization.hessian import Hessian, HessianFactor, factorize
from vqllm.quantization.sensitivity import SensitivityConfig, sensitivities
from vqllm.sources import PlainSource, source_logits

EXACT = SensitivityConfig(dtype=torch.float32)

Windows = NDArray[np.int64]


def logits_with(source: PlainSource, tokens: Tensor, name: str, weight: Tensor) -> Tensor:
    """Logits with one linear's weight replaced."""
    rotary = RotaryTable.build(source.config, tokens.shape[1])
    with torch.no_grad():
        hidden = source.embed(tokens)
        for layer in range(source.config.num_layers):
            block = source.block(layer)
            prefix = f"model.layers.{layer}."
            if name.startswith(prefix):
                block = replace(block, linears={**block.linears, name[len(prefix) :]: weight})
            hidden = forward_block(hidden, block, source.config, rotary)
        return source.logits(hidden)


def weight_of(source: PlainSource, name: str) -> Tensor:
    _, _, layer, part = name.split(".", 3)
    return source.block(int(layer)).linears[part]


def measured(source: PlainSource, tokens: Tensor, name: str, error: Tensor) -> float:
    """KL per token when `error` is added to one linear."""
    before = source_logits(source, tokens).log_softmax(-1)
    after = logits_with(source, tokens, name, weight_of(source, name) + error).log_softmax(-1)
    return float((before.exp() * (before - after)).sum(-1).mean())


def factor_of(inputs: Tensor) -> HessianFactor:
    hessian = Hessian(inputs.shape[1])
    hessian.add(inputs)
    return factorize(hessian.value, EXACT.damping)


def fed_back(weight: Tensor, factor: HessianFactor, distortion: float, seed: int) -> Tensor:
    """What is left of white rounding errors after feedback along the columns."""
    generator = torch.Generator().manual_seed(seed)
    scale = (distortion * weight.square().mean(1, keepdim=True)).sqrt()
    rounding = torch.randn(weight.shape, generator=generator) * scale
    error = torch.empty_like(weight)
    error[:, factor.order] = rounding / factor.upper.diagonal() @ factor.upper
    return error


def test_one_positive_number_per_linear(tiny_folder: Path, windows: Windows) -> None:
    source = PlainSource(Checkpoint(tiny_folder))
    found = sensitivities(source, windows)
    assert list(found) == source.linear_names()
    assert all(value > 0 and np.isfinite(value) for value in found.values())


def test_the_same_seed_gives_the_same_numbers(tiny_folder: Path, windows: Windows) -> None:
    source = PlainSource(Checkpoint(tiny_folder))
    assert sensitivities(source, windows, EXACT) == sensitivities(source, windows, EXACT)


def test_bfloat16_products_change_little(tiny_folder: Path, windows: Windows) -> None:
    source = PlainSource(Checkpoint(tiny_folder))
    exact, fast = sensitivities(source, windows, EXACT), sensitivities(source, windows)
    assert [fast[name] for name in exact] == pytest.approx(list(exact.values()), rel=0.15)


def test_it_predicts_the_divergence_of_what_feedback_leaves(
    tiny_folder: Path, windows: Windows
) -> None:
    """Labels are a sample, so the mean over six draws is compared."""
    source = PlainSource(Checkpoint(tiny_folder))
    tokens = torch.from_numpy(windows)
    draws = [replace(EXACT, seed=seed) for seed in range(6)]
    predictions = [sensitivities(source, windows, draw) for draw in draws]
    ratios = []
    for layer, part in itertools.product((0, 1), ("v_proj", "o_proj", "down_proj")):
        part = f"mlp.{part}" if part == "down_proj" else f"self_attn.{part}"
        name = f"model.layers.{layer}.{part}"
        factor = factor_of(inputs_of(source, tokens, layer, part))
        errors = [fed_back(weight_of(source, name), factor, 1e-5, seed) for seed in range(6)]
        mean = np.mean([measured(source, tokens, name, error) for error in errors])
        ratios.append(np.mean([found[name] for found in predictions]) * 1e-5 / mean)
    assert all(0.5 < ratio < 2 for ratio in ratios)
    assert np.exp(np.log(ratios).mean()) == pytest.approx(1, rel=0.35)


def inputs_of(source: PlainSource, tokens: Tensor, layer: int, part: str) -> Tensor:
    """Rows that a linear reads in full precision."""
    rotary = RotaryTable.build(source.config, tokens.shape[1])
    with torch.no_grad():
        hidden = source.embed(tokens)
        for index in range(layer):
            hidden = forward_block(hidden, source.block(index), source.config, rotary)
        for tap in trace_block(hidden, source.block(layer), source.config, rotary):
            if part in tap.parts:
                return tap.inputs.flatten(0, -2)
    raise AssertionError(part)


def test_rotation_keeps_the_gradients_scale(tiny_folder: Path, windows: Windows) -> None:
    """R1 turns outputs of o_proj and down_proj, which leaves the length of their gradients."""
    plain = PlainSource(Checkpoint(tiny_folder))
    rotated = RotatedSource(plain, QuarotOptions())
    one, other = sensitivities(plain, windows, EXACT), sensitivities(rotated, windows, EXACT)
    ratios = np.array([other[name] / one[name] for name in one])
    assert (ratios > 0.4).all()
    assert (ratios < 2.5).all()


def test_bad_input(make_folder: Any, windows: Windows) -> None:
    with pytest.raises(InvalidConfig, match="num_windows"):
        SensitivityConfig(num_windows=0)
    huge = {"model.norm.weight": torch.full((64,), 1e38)}
    source = PlainSource(Checkpoint(make_folder(tensors=huge)))
    with pytest.raises(CalibrationError, match=r"model\.layers\.\d"):
        sensitivities(source, windows, EXACT)
