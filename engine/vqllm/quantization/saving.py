"""Writes a GPTQ checkpoint folder part by part, next to which the original stays untouched.

Parts go to disk as they come. The folder appears under its final name only when it is complete.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from types import TracebackType
from typing import Any

from numpy.typing import NDArray

from vqllm.checkpoint import (
    Checkpoint,
    GptqFormat,
    packed_layout,
    packed_tensors,
    write_json,
)
from vqllm.errors import VqllmError
from vqllm.model_card import quantized_card
from vqllm.model_config import read_config
from vqllm.quantization.pipeline import QuantizedPart
from vqllm.tensor_store import TensorFileWriter, TensorLayout

MAX_SHARD_BYTES = 4 * 2**30

COMPANION_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


class CheckpointWriter:
    """Takes quantized parts and writes the folder; a context manager.

    Leaving the block normally finishes the folder, leaving it by an exception removes what was
    written so far.
    """

    def __init__(self, source: Checkpoint, target: Path, form: GptqFormat, recipe: str) -> None:
        """`recipe` is one sentence for the model card: on what text, with which options.

        Raises:
            VqllmError: `target` exists already.
        """
        if target.exists():
            raise VqllmError(f"{target} exists already; remove it or choose another folder")
        self._source, self._target, self._form, self._recipe = source, target, form, recipe
        self._scratch = target.with_name(f".{target.name}.partial")
        self._errors: dict[str, float] = {}
        self._linears = source.linear_names()
        self._shards = _split(self._layout())
        self._writers: dict[str, TensorFileWriter] = {}

    def __enter__(self) -> CheckpointWriter:
        shutil.rmtree(self._scratch, ignore_errors=True)
        self._scratch.mkdir(parents=True)
        for file_name, layout in self._shards.items():
            writer = TensorFileWriter(self._scratch / file_name, layout)
            self._writers.update(dict.fromkeys(layout, writer))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            for writer in self._writers.values():
                writer.close()
            shutil.rmtree(self._scratch, ignore_errors=True)

    def add(self, part: QuantizedPart) -> None:
        """Write one quantized linear."""
        self._errors[part.name] = part.relative_error
        for name, values in packed_tensors(part.name, part.linear, self._form).items():
            self._put(name, values)

    def _layout(self) -> dict[str, TensorLayout]:
        """Every tensor of the new folder: the quantized linears, then what is copied."""
        layout: dict[str, TensorLayout] = {}
        for name in self._linears:
            layout |= packed_layout(name, self._source.linear_shape(name), self._form.spec)
        store = self._source.store
        return layout | {
            name: TensorLayout(store.dtype(name), store.shape(name)) for name in self._copied()
        }

    def _copied(self) -> list[str]:
        """Names of the tensors that stay as they are."""
        replaced = {f"{name}.weight" for name in self._linears}
        return [name for name in self._source.store.names if name not in replaced]

    def _put(self, name: str, values: NDArray[Any]) -> None:
        self._writers[name].put(name, values)

    def _finish(self) -> None:
        for name in self._copied():
            self._put(name, self._source.store.raw(name))
        for writer in set(self._writers.values()):
            writer.finish()
        if len(self._shards) > 1:
            self._write_index()
        self._write_descriptions()
        self._scratch.rename(self._target)

    def _write_index(self) -> None:
        weight_map = {name: file for file, layout in self._shards.items() for name in layout}
        total = sum(t.num_bytes for layout in self._shards.values() for t in layout.values())
        content = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(self._scratch / "model.safetensors.index.json", content)

    def _write_descriptions(self) -> None:
        folder, quantization = self._scratch, self._form.to_dict()
        config: dict[str, Any] = read_config(self._source.folder)
        write_json(folder / "config.json", {**config, "quantization_config": quantization})
        write_json(folder / "quantize_config.json", quantization)
        for name in COMPANION_FILES:
            if (self._source.folder / name).is_file():
                shutil.copyfile(self._source.folder / name, folder / name)
        info = Checkpoint(folder).info(self._target.name)
        card = quantized_card(info, self._source.folder.resolve().name, self._recipe, self._errors)
        (folder / "README.md").write_text(card, encoding="utf-8")


def _split(layout: dict[str, TensorLayout]) -> dict[str, dict[str, TensorLayout]]:
    """Layout by file name, each file at most MAX_SHARD_BYTES where tensors allow it."""
    shards: list[dict[str, TensorLayout]] = [{}]
    num_bytes = 0
    for name, tensor in layout.items():
        if shards[-1] and num_bytes + tensor.num_bytes > MAX_SHARD_BYTES:
            shards.append({})
            num_bytes = 0
        shards[-1][name] = tensor
        num_bytes += tensor.num_bytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {
        f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors": shard
        for index, shard in enumerate(shards)
    }
