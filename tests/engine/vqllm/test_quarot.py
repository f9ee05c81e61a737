"""A rotated model computes what the original computes, in every family."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from support.tiny_models import CONFIGS, VOCAB_SIZE, write_tiny_model
from vqllm.checkpoint import Checkpoint
from vqllm.errors import InvalidConfig, UnsupportedModel
from vqllm.outlier.quarot import QuarotOptions, RotatedSource
from vqllm.outlier.transform import ModelTransform, rotation
from vqllm.sources import PlainSource, source_logits

TOKENS = torch.from_numpy(np.random.default_rng(5).integers(0, VOCAB_SIZE, (2, 24)))
TOLERANCE = 1e-4
VARIANTS = {
    "all": QuarotOptions(seed=11),
    "portable": QuarotOptions(seed=11, portable=True),
    "residual only": QuarotOptions(heads=False, down=False),
    "heads only": QuarotOptions(residual=False, down=False),
    "down only": QuarotOptions(residual=False, heads=False),
}


def plain(folder: Path, family: str) -> PlainSource:
    return PlainSource(Checkpoint(write_tiny_model(folder, family)))


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_rotation_preserves_the_logits(tmp_path: Path, family: str, variant: str) -> None:
    source = plain(tmp_path, family)
    expected = source_logits(source, TOKENS)
    found = source_logits(RotatedSource(source, VARIANTS[variant]), TOKENS)
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", CONFIGS)
def test_rotation_turns_every_weight_and_flattens_no_norm_out(tmp_path: Path, family: str) -> None:
    source = plain(tmp_path, family)
    rotated = RotatedSource(source, QuarotOptions(seed=1))
    before, after = source.block(1), rotated.block(1)
    for part, weight in before.linears.items():
        assert (weight - after.linears[part]).abs().mean() > 0.1 * weight.abs().mean()
    assert (after.input_norm == 1).all()
    assert after.down_seed == 3


@pytest.mark.parametrize("family", ["qwen2", "deepseek-v3", "llama-biases"])
@pytest.mark.parametrize("is_portable", [False, True])
def test_stored_tensors_are_those_that_the_blocks_use(
    tmp_path: Path, family: str, is_portable: bool
) -> None:
    source = plain(tmp_path, family)
    rotated = RotatedSource(source, QuarotOptions(seed=4, portable=is_portable))
    stored = rotated.other_tensors()
    for layer in range(rotated.config.num_layers):
        block, prefix = rotated.block(layer), f"model.layers.{layer}"
        np.testing.assert_array_equal(stored[f"{prefix}.input_layernorm.weight"], block.input_norm)
        for part, bias in block.biases.items():
            np.testing.assert_array_equal(stored[f"{prefix}.{part}.bias"], bias)
        for name, values in block.inner.items():
            np.testing.assert_array_equal(stored[f"{prefix}.{name}"], values)
    others = source.other_tensors()
    embedding = "model.embed_tokens.weight"
    assert np.array_equal(stored[embedding], others[embedding]) != is_portable
    assert stored.keys() - others.keys() == (
        {"lm_head.weight"} if is_portable and family == "qwen2" else set()
    )


def test_tied_tables_stay_tied_unless_the_folder_is_portable(tmp_path: Path) -> None:
    source = plain(tmp_path, "qwen2")
    online = RotatedSource(source, QuarotOptions(seed=4))
    assert online.config.tie_word_embeddings
    assert online.config_changes == {}
    assert online.transform == ModelTransform(residual_seed=4, head_seed=5, down_seed=6)
    portable = RotatedSource(source, QuarotOptions(seed=4, portable=True))
    assert not portable.config.tie_word_embeddings
    assert portable.config_changes == {"tie_word_embeddings": False}
    assert not portable.transform.is_online


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_portable_tables_of_a_16_bit_model_stay_16_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = write_tiny_model(tmp_path, "llama", dtype)
    source = PlainSource(Checkpoint(folder))
    rotated = RotatedSource(source, QuarotOptions(seed=4, portable=True))
    assert rotated.other_tensors()["lm_head.weight"].dtype == np.float16
    expected = source_logits(source, TOKENS)
    found = source_logits(rotated, TOKENS)
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()


def test_a_model_is_rotated_once(tmp_path: Path) -> None:
    rotated = RotatedSource(plain(tmp_path, "llama"), QuarotOptions())
    with pytest.raises(UnsupportedModel, match="rotated already"):
        RotatedSource(rotated, QuarotOptions())


def test_an_odd_size_has_no_rotation(tmp_path: Path) -> None:
    source = PlainSource(Checkpoint(write_tiny_model(tmp_path, "llama", intermediate_size=81)))
    with pytest.raises(UnsupportedModel, match="size 81"):
        RotatedSource(source, QuarotOptions()).block(0)


def test_a_size_without_a_matrix_is_rotated_in_blocks(tmp_path: Path) -> None:
    source = PlainSource(Checkpoint(write_tiny_model(tmp_path, "llama", intermediate_size=94)))
    assert rotation(94, 0).blocks == 47
    found = source_logits(RotatedSource(source, QuarotOptions()), TOKENS)
    torch.testing.assert_close(found, source_logits(source, TOKENS), atol=TOLERANCE, rtol=0)


def test_a_seed_beyond_64_bits_is_refused() -> None:
    with pytest.raises(InvalidConfig, match="head_seed"):
        _ = QuarotOptions(seed=2**64 - 1).seeds


def test_outliers_spread_over_all_channels() -> None:
    rows = torch.randn(64, 576, generator=torch.Generator().manual_seed(0))
    rows[:, 7] *= 100
    turned = rotation(576, 0).apply(rows)
    assert turned.abs().max() / turned.std() < 6
    torch.testing.assert_close(turned.norm(dim=1), rows.norm(dim=1))
