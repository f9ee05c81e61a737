"""VPTQ as its released tool quantizes, as a command: a baseline of the comparison.

`python -m vqllm.evaluation.published MODEL OUTPUT --bits 2 --calibration FILE ...`. Codebook sizes
are those of our own VPTQ at the same width, so that both spend the same bits. What it does not
copy is in the baseline's favour: inputs come from the quantized prefix, and k-means has a seed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from vqllm.calibration import CalibrationConfig, calibration_windows
from vqllm.checkpoint import Checkpoint
from vqllm.quantization.job import QuantizeJob
from vqllm.quantization.pipeline import Surroundings
from vqllm.quantization.presets import QuantizeConfig
from vqllm.quantization.vptq import VptqOptions
from vqllm.runtime.tokenizer import ChatTokenizer


def quantize_published(model: Path, target: Path, bits: int, text: CalibrationConfig) -> None:
    """Quantize a folder as the released tool would.

    Raises:
        VqllmError: the folder or the text cannot be used.
    """
    config = QuantizeConfig(
        method="vptq", bits=bits, preprocess="none", alpha=0.0, dampings=(0.01,)
    )
    windows = calibration_windows(ChatTokenizer.from_folder(model), text)
    job = QuantizeJob(Checkpoint(model), config, windows, "the comparison's text")
    recipe = job.recipe()
    assert isinstance(recipe.default, VptqOptions)
    recipe = replace(recipe, default=replace(recipe.default, is_published=True))
    parts = list(job.run(recipe, Surroundings()))
    job.write(target, iter(parts), recipe, {})


def main(words: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--windows", type=int, default=48)
    parser.add_argument("--window-length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args(words)
    torch.set_num_threads(given.threads)
    text = CalibrationConfig(given.calibration, given.windows, given.window_length)
    quantize_published(given.model, given.output, given.bits, text)


if __name__ == "__main__":
    main()
