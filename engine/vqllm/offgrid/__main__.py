"""`python -m vqllm.offgrid TEXT OUT`: train the off-grid reference model from a text file."""

from __future__ import annotations

import argparse
from pathlib import Path

from vqllm.offgrid.training import TrainingConfig, train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path, help="UTF-8 text to train on")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--steps", type=int, default=TrainingConfig.num_steps)
    parser.add_argument("--seed", type=int, default=TrainingConfig.seed)
    arguments = parser.parse_args()
    config = TrainingConfig(num_steps=arguments.steps, seed=arguments.seed)
    train(
        arguments.text,
        arguments.out,
        config,
        lambda step, loss: print(f"step {step}: loss {loss:.3f}", flush=True),
    )


if __name__ == "__main__":
    main()
