"""`python -m vqllm.offgrid.rotated MODEL OUT`: the same function with weights on no grid.

Rotations are folded into the weights (see `outlier/quarot`), nothing is left to do at run time.
Every new weight mixes a row or column of old ones, so a grid that they were dequantized from is
gone, for other quantizers as for ours; what else the rotation does for them, it does for all.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from vqllm.checkpoint import Checkpoint, write_json
from vqllm.errors import VqllmError
from vqllm.model_config import read_config
from vqllm.outlier.quarot import QuarotOptions, RotatedSource
from vqllm.quantization.saving import COMPANION_FILES
from vqllm.sources import PlainSource, WeightSource, as_float32

Halves = dict[str, NDArray[np.float16]]


def write_rotated(model: Path, out: Path, seed: int = 0) -> None:
    """Write the rotated model as a plain Hugging Face folder in half precision.

    Raises:
        VqllmError: `out` exists, or the model cannot be read or rotated.
    """
    if out.exists():
        raise VqllmError(f"{out} exists already; remove it or choose another folder")
    options = QuarotOptions(seed=seed, portable=True)
    source = RotatedSource(PlainSource(Checkpoint(model)), options)
    tensors = _tensors(source)
    config = {**read_config(model), **source.config_changes}
    out.mkdir(parents=True)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    write_json(out / "config.json", {**config, "torch_dtype": "float16"})
    for name in COMPANION_FILES:
        if (model / name).is_file():
            shutil.copyfile(model / name, out / name)


def _tensors(source: WeightSource) -> Halves:
    others = source.other_tensors().items()
    tensors = {name: as_float32(np.array(values)).half().numpy() for name, values in others}
    for layer in range(source.config.num_layers):
        for part, weight in source.block(layer).linears.items():
            tensors[f"model.layers.{layer}.{part}.weight"] = weight.half().numpy()
    return tensors


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="folder of a model in full precision")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    write_rotated(given.model, given.out, given.seed)


if __name__ == "__main__":
    main()
