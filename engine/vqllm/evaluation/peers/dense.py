"""A copy of a plain folder with other linears, so that arms differ in the linears alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vqllm.checkpoint import Checkpoint
from vqllm.errors import EvaluationError
from vqllm.tensor_store import TensorFileWriter, TensorLayout

COMPANION_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
)


class DenseFolder:
    """Takes linears one by one, float32; a context manager that completes the folder."""

    def __init__(self, source: Checkpoint, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._source = source
        self._linears = {f"{name}.weight" for name in source.linear_names()}
        store = source.store
        layout = {
            name: TensorLayout(
                "F32" if name in self._linears else store.dtype(name), store.shape(name)
            )
            for name in store.names
        }
        self._writer = TensorFileWriter(folder / "model.safetensors", layout)
        for name in COMPANION_FILES:
            if (source.folder / name).is_file():
                shutil.copyfile(source.folder / name, folder / name)

    def __enter__(self) -> DenseFolder:
        return self

    def put(self, name: str, weight: NDArray[np.float32]) -> None:
        """Write the linear called `name`, (out, in).

        Raises:
            EvaluationError: another shape than the source's.
        """
        if weight.shape != self._source.linear_shape(name):
            raise EvaluationError(f"{name} has shape {weight.shape} in the peer's file")
        self._writer.put(f"{name}.weight", weight)

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is not None:
            self._writer.close()
            return
        store = self._source.store
        for name in store.names:
            if name not in self._linears:
                self._writer.put(name, store.raw(name))
        self._writer.finish()
