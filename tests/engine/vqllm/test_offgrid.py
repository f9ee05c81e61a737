"""References whose weights lie on no grid: a rotated copy, and a small trained model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from vqllm.checkpoint import Checkpoint
from vqllm.errors import VqllmError
from vqllm.offgrid.rotated import write_rotated
from vqllm.offgrid.training import MODEL, TrainingConfig, train
from vqllm.runtime.executors.torch import TorchExecutor

TOKENS = np.random.default_rng(0).integers(0, 256, (2, 12)).astype(np.int64)


def test_a_rotated_copy_computes_the_same_with_other_weights(
    tiny_folder: Path, tmp_path: Path
) -> None:
    write_rotated(tiny_folder, tmp_path / "rotated", seed=3)
    source, copy = Checkpoint(tiny_folder), Checkpoint(tmp_path / "rotated")
    expected = TorchExecutor(source, 24, 1).score_windows(TOKENS)
    found = TorchExecutor(copy, 24, 1).score_windows(TOKENS)
    np.testing.assert_allclose(found, expected, atol=0.02 * np.abs(expected).max())
    name = source.linear_names()[0]
    assert np.abs(source.dense_linear(name) - copy.dense_linear(name)).max() > 0.01
    assert not copy.transform.is_online


def test_a_rotated_copy_overwrites_nothing(tiny_folder: Path) -> None:
    with pytest.raises(VqllmError, match="exists already"):
        write_rotated(tiny_folder, tiny_folder)


def test_training_writes_a_folder_that_runs_and_learns(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the road goes on and on and the river runs beside the road \n" * 400)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    config = TrainingConfig(
        num_steps=100,
        batch_size=2,
        window_length=16,
        warmup_steps=3,
        model={**MODEL, **small, **heads, "vocab_size": 300},
    )
    losses: list[float] = []
    train(text, tmp_path / "out", config, lambda step, loss: losses.append(loss))
    checkpoint = Checkpoint(tmp_path / "out")
    assert checkpoint.config.vocab_size == 300
    assert losses[-1] < losses[0] - 0.5
    assert np.isfinite(TorchExecutor(checkpoint, 24, 1).score_windows(TOKENS)).all()
