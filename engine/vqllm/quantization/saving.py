"""Writes a GPTQ checkpoint folder part by part, next to which the original stays untouched.

The folder appears under its final name only when it is complete.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from vqllm.checkpoint import Checkpoint, GptqFormat, packed_tensors, write_json
from vqllm.errors import VqllmError
from vqllm.model_card import quantized_card
from vqllm.model_config import read_config
from vqllm.quantization.pipeline import QuantizedPart

MAX_SHARD_BYTES = 2 * 2**30

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
    """Collects quantized parts and writes the folder; a context manager.

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
        self._tensors: dict[str, Tensor] = {}
        self._shards: list[list[str]] = []
        self._total_bytes = 0
        self._errors: dict[str, float] = {}

    def __enter__(self) -> CheckpointWriter:
        shutil.rmtree(self._scratch, ignore_errors=True)
        self._scratch.mkdir(parents=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self._finish()
        else:
            shutil.rmtree(self._scratch, ignore_errors=True)

    def add(self, part: QuantizedPart) -> None:
        """Take one quantized linear; shards are written as they fill."""
        self._errors[part.name] = part.relative_error
        for name, values in packed_tensors(part.name, part.linear, self._form).items():
            self._put(name, torch.tensor(values))  # copies: parts may share arrays

    def _put(self, name: str, tensor: Tensor) -> None:
        self._tensors[name] = tensor
        if sum(held.nbytes for held in self._tensors.values()) >= MAX_SHARD_BYTES:
            self._flush()

    def _flush(self) -> None:
        path = self._shard_path(len(self._shards))
        save_file(self._tensors, path, metadata={"format": "pt"})
        path.chmod(0o644)
        self._total_bytes += sum(held.nbytes for held in self._tensors.values())
        self._shards.append(list(self._tensors))
        self._tensors = {}

    def _shard_path(self, index: int) -> Path:
        return self._scratch / f"shard-{index}"

    def _finish(self) -> None:
        for name in self._source.store.names:
            if not self._is_replaced(name):
                self._put(name, _as_tensor(self._source, name))
        self._flush()
        self._name_shards()
        self._write_descriptions()
        self._scratch.rename(self._target)

    def _is_replaced(self, name: str) -> bool:
        return name.removesuffix(".weight") in self._errors

    def _name_shards(self) -> None:
        count = len(self._shards)
        if count == 1:
            self._shard_path(0).rename(self._scratch / "model.safetensors")
            return
        weight_map = {}
        for index, names in enumerate(self._shards):
            file_name = f"model-{index + 1:05d}-of-{count:05d}.safetensors"
            self._shard_path(index).rename(self._scratch / file_name)
            weight_map.update(dict.fromkeys(names, file_name))
        index_content = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
        write_json(self._scratch / "model.safetensors.index.json", index_content)

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


def _as_tensor(source: Checkpoint, name: str) -> Tensor:
    """The tensor as it is stored, copied out of the memory map."""
    tensor = torch.from_numpy(source.store.raw(name).copy())
    return tensor.view(torch.bfloat16) if source.store.dtype(name) == "BF16" else tensor
