"""Two processes that share a batch take the step that one process takes on all of it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from scq.data import CropConfig, ImageSet
from scq.errors import ScqError
from scq.model import ModelConfig, load_model
from scq.training import TrainConfig, TrainOptions, train
from scq.training_parallel import Team, current_team

CONFIG = TrainConfig(
    model=ModelConfig(
        "pair",
        "frame",
        stride=8,
        max_width=64,
        max_height=64,
        code_dim=4,
        num_codes=16,
        encoder_widths=(8, 8),
        encoder_blocks=(1, 1),
        decoder_widths=(8, 8),
        decoder_blocks=(1, 1),
    ),
    crop=CropConfig(size=32, min_scale=0.8, max_scale=1.0),
    identity_steps=3,
    soft_steps=1,
    lattice_steps=4,
    finetune_steps=1,
    batch_size=4,
    dead_code_interval=2,
    nested_dropout=0.3,
    bfloat16=False,
    hold_out="none",
)

# Run by torchrun in each of two processes.
WORKER = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from scq.training import TrainConfig, TrainOptions, train
from scq.training_parallel import process_group
sys.path.insert(0, sys.argv[1])
from test_training_parallel import noise_pictures
config = TrainConfig.from_json(Path(sys.argv[2]).read_text())
with process_group("cpu") as device:
    train(config, noise_pictures(), Path(sys.argv[3]), options=TrainOptions(device=device))
"""


def noise_pictures() -> ImageSet:
    """Six smooth pictures of random colours."""
    rng = np.random.default_rng(3)
    small = rng.integers(0, 255, (6, 5, 6, 3))
    images = tuple(np.kron(s, np.ones((8, 8, 1))).astype(np.uint8) for s in small)
    return ImageSet(images, tuple("abcdef"))


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(CONFIG.to_json())
    (tmp_path / "worker.py").write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(tmp_path / "worker.py"), str(Path(__file__).parent)]
    command += [str(tmp_path / "config.json"), str(tmp_path / "two")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    train(CONFIG, noise_pictures(), tmp_path / "one", options=TrainOptions(device="cpu"))
    one, two = (load_model(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for (name, left), right in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.allclose(left, right, atol=2e-3), name


def test_a_team_of_one_changes_nothing() -> None:
    team = current_team()
    assert (team.rank, team.size, team.leads) == (0, 1, True)
    layer = nn.Linear(2, 1)
    layer(torch.ones(3, 2)).sum().backward()
    before = layer.weight.grad.clone() if layer.weight.grad is not None else None
    team.average_gradients(layer.parameters())
    assert before is not None
    assert layer.weight.grad is not None
    assert torch.equal(layer.weight.grad, before)


def test_batches_are_shared_evenly_or_not_at_all() -> None:
    assert list(Team(1, 2).slots(6)) == [3, 4, 5]
    with pytest.raises(ScqError, match="not a multiple of 2"):
        Team(0, 2).slots(5)
    assert json.loads(replace(CONFIG, batch_size=6).to_json())["batch_size"] == 6
