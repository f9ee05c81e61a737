"""Smoothing keeps the function, helps where it is chosen, and shares scales as heads do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from support.tiny_models import CONFIGS, VOCAB_SIZE, write_tiny_model
from vqllm.checkpoint import Checkpoint
from vqllm.errors import InvalidConfig, UnsupportedModel
from vqllm.outlier.quarot import QuarotOptions, RotatedSource
from vqllm.outlier.smoothquant import SmoothedSource, SmoothOptions
from vqllm.sources import PlainSource, WeightSource, source_logits

WINDOWS = np.random.default_rng(6).integers(0, VOCAB_SIZE, (6, 20))
TOKENS = torch.from_numpy(np.random.default_rng(5).integers(0, VOCAB_SIZE, (2, 24)))
OPTIONS = SmoothOptions(alphas=(0.5, 0.8), bits=3, group_size=16)


def plain(folder: Path, family: str) -> PlainSource:
    return PlainSource(Checkpoint(write_tiny_model(folder, family)))


def assert_same_function(found: WeightSource, expected: WeightSource) -> None:
    torch.testing.assert_close(
        source_logits(found, TOKENS), source_logits(expected, TOKENS), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("family", CONFIGS)
def test_smoothing_preserves_the_logits(tmp_path: Path, family: str) -> None:
    source = plain(tmp_path, family)
    smoothed = SmoothedSource.calibrated(source, WINDOWS, OPTIONS)
    assert any(layer.scales for layer in smoothed.layers)
    assert_same_function(smoothed, source)


@pytest.mark.parametrize("family", ["qwen2", "deepseek-v3"])
def test_a_smoothed_model_can_be_rotated(tmp_path: Path, family: str) -> None:
    source = plain(tmp_path, family)
    smoothed = SmoothedSource.calibrated(source, WINDOWS, OPTIONS)
    assert_same_function(RotatedSource(smoothed, QuarotOptions(seed=2)), source)


def test_a_model_rotated_without_r4_can_be_smoothed(tmp_path: Path) -> None:
    source = plain(tmp_path, "llama")
    rotated = RotatedSource(source, QuarotOptions(seed=2, down=False))
    assert_same_function(SmoothedSource.calibrated(rotated, WINDOWS, OPTIONS), source)


def test_rotated_down_projections_cannot_be_smoothed(tmp_path: Path) -> None:
    rotated = RotatedSource(plain(tmp_path, "llama"), QuarotOptions())
    with pytest.raises(UnsupportedModel, match="smooth the model first"):
        SmoothedSource.calibrated(rotated, WINDOWS)


@pytest.mark.parametrize("family", ["llama-biases", "qwen2", "deepseek-v2"])
def test_stored_tensors_are_those_that_the_blocks_use(tmp_path: Path, family: str) -> None:
    source = plain(tmp_path, family)
    smoothed = SmoothedSource.calibrated(source, WINDOWS, OPTIONS)
    stored = smoothed.other_tensors()
    for layer in range(source.config.num_layers):
        block, prefix = smoothed.block(layer), f"model.layers.{layer}"
        np.testing.assert_array_equal(stored[f"{prefix}.input_layernorm.weight"], block.input_norm)
        for part, bias in block.biases.items():
            np.testing.assert_array_equal(stored[f"{prefix}.{part}.bias"], bias)
        for name, values in block.inner.items():
            np.testing.assert_array_equal(stored[f"{prefix}.{name}"], values)


def test_query_heads_of_one_value_head_share_their_scales(tmp_path: Path) -> None:
    smoothed = SmoothedSource.calibrated(plain(tmp_path, "llama"), WINDOWS, OPTIONS)
    scales = [layer.scales.get("self_attn.o_proj") for layer in smoothed.layers]
    found = [scale for scale in scales if scale is not None]
    assert found
    for scale in found:
        heads = scale.view(2, 2, 12)
        torch.testing.assert_close(heads[:, 0], heads[:, 1])


def rounding_error(source: WeightSource, expected: torch.Tensor) -> float:
    """Mean squared error of the logits with every linear rounded to 4 bits per row."""

    class Rounded:
        def __getattr__(self, name: str) -> object:
            return getattr(source, name)

        def block(self, layer: int) -> object:
            weights = source.block(layer)
            for part, weight in weights.linears.items():
                step = weight.abs().amax(1, keepdim=True) / 7
                weights.linears[part] = (weight / step).round() * step
            return weights

    rounded: WeightSource = Rounded()  # type: ignore[assignment]
    return float((source_logits(rounded, TOKENS) - expected).square().mean())


def test_smoothing_helps_where_weight_columns_have_outliers(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path, "llama")
    source = PlainSource(Checkpoint(folder))
    block = source.block

    def with_outliers(layer: int) -> object:
        weights = block(layer)
        for part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
            weights.linears[part][:, ::9] *= 20
        weights.input_norm[::9] /= 20
        return weights

    source.block = with_outliers  # type: ignore[method-assign, assignment]
    expected = source_logits(source, TOKENS)
    options = SmoothOptions(group_size=48, activation_bits=0)
    smoothed = SmoothedSource.calibrated(source, WINDOWS, options)
    assert all(layer.alphas["input_layernorm.weight"] is not None for layer in smoothed.layers)
    assert rounding_error(smoothed, expected) < 0.7 * rounding_error(source, expected)


@pytest.mark.parametrize(
    ("change", "field"),
    [({"alphas": (1.5,)}, "alphas"), ({"bits": 1}, "bits"), ({"activation_bits": 1}, "activation")],
)
def test_options_out_of_range_are_refused(change: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidConfig, match=field):
        SmoothOptions(**change)  # type: ignore[arg-type]


def test_a_dead_channel_gets_a_bounded_scale(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path, "llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.input_layernorm.weight"][5] = 0
    save_file(tensors, folder / "model.safetensors")
    source = PlainSource(Checkpoint(folder))
    smoothed = SmoothedSource.calibrated(source, WINDOWS, OPTIONS)
    for layer in smoothed.layers:
        for scale in layer.scales.values():
            assert 1e-3 <= float(scale.min()) <= float(scale.max()) <= 1e3
    assert_same_function(smoothed, source)
