"""Writes a quantized model folder linear by linear; the original stays untouched.

Linears go to disk as they come. The folder appears under its final name only when it is complete.
The format is the most widely readable one that can hold the linears: "gptq" or "vptq" where all of
them are of one method and nothing has to be computed at run time, else "vqstack".
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from vqllm.checkpoint import (
    CODES_SUFFIX,
    EMBEDDING,
    HEAD,
    SCALES_SUFFIX,
    Checkpoint,
    write_json,
)
from vqllm.errors import InvalidConfig, VqllmError
from vqllm.formats.base import ONLINE_SEEDS, FolderFormat
from vqllm.formats.gptq import GptqFormat
from vqllm.formats.vptq import VptqFormat
from vqllm.formats.vqstack import EMBEDDING_BITS, VqstackFormat
from vqllm.model_card import quantized_card
from vqllm.model_config import read_config
from vqllm.packing import pack_columns
from vqllm.quantization.base import GroupedLinear, GroupedSpec, QuantizedLinear
from vqllm.quantization.tcq import TcqLinear
from vqllm.quantization.tcq_row import TcqRowLinear
from vqllm.quantization.trellis import TrellisCodebook
from vqllm.quantization.vptq_linear import VptqLinear, layer_config
from vqllm.tensor_spool import TensorSpool

FORMATS = ("auto", "gptq", "vptq", "vqstack")

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


class FinishedLinear(Protocol):
    """What the pipeline yields for each linear."""

    @property
    def name(self) -> str: ...

    @property
    def linear(self) -> QuantizedLinear: ...

    @property
    def relative_error(self) -> float: ...


@dataclass(frozen=True)
class FolderPlan:
    """What a folder is to be, besides its linears.

    Attributes:
        recipe: one sentence for the model card: on what text, with which options.
        meta: facts of the recipe for config.json, fit for JSON.
        transform: `ModelTransform.to_dict()`, empty for none.
        others: every other tensor by its name (bfloat16 as uint16 halves), as
            `WeightSource.other_tensors` gives them; None copies those of the source folder.
        config_changes: fields of config.json that differ from the source's.
        embedding_bits: 8 stores embedding and untied head as int8 with a scale per row, which only
            the "vqstack" format can; 0 keeps them as they are.
        form: "auto", or one of the formats.

    Raises:
        InvalidConfig: a value is outside its range.
    """

    recipe: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)
    transform: Mapping[str, Any] = field(default_factory=dict)
    others: Mapping[str, NDArray[Any]] | None = None
    config_changes: Mapping[str, Any] = field(default_factory=dict)
    embedding_bits: int = 0
    form: str = "auto"

    def __post_init__(self) -> None:
        if self.embedding_bits not in EMBEDDING_BITS:
            raise InvalidConfig("embedding_bits", self.embedding_bits, f"one of {EMBEDDING_BITS}")
        if self.form not in FORMATS:
            raise InvalidConfig("form", self.form, f"one of {FORMATS}")

    @property
    def needs_vqstack(self) -> bool:
        """Whether a reader has more to do than any standard format can say."""
        online = ONLINE_SEEDS & self.transform.keys()
        return bool(online or self.embedding_bits) or self.form == "vqstack"


@dataclass(frozen=True)
class _Stored:
    """What the folder's config has to know of a linear that is on disk already."""

    entry: dict[str, Any]
    grouped_spec: GroupedSpec | None
    is_symmetric: bool
    vptq_config: dict[str, Any] | None
    codebook: TrellisCodebook | None

    @classmethod
    def of(cls, linear: QuantizedLinear) -> _Stored:
        grouped = linear if isinstance(linear, GroupedLinear) else None
        return cls(
            entry=linear.entry(),
            grouped_spec=None if grouped is None else grouped.spec,
            is_symmetric=grouped is not None and grouped.is_symmetric,
            vptq_config=layer_config(linear) if isinstance(linear, VptqLinear) else None,
            codebook=linear.codebook if isinstance(linear, TcqLinear | TcqRowLinear) else None,
        )


class CheckpointWriter:
    """Takes quantized linears and writes the folder; a context manager.

    Leaving the block normally finishes the folder, leaving it by an exception removes what was
    written so far.
    """

    def __init__(self, source: Checkpoint, target: Path, plan: FolderPlan) -> None:
        """Raises VqllmError: `target` exists already."""
        if target.exists():
            raise VqllmError(f"{target} exists already; remove it or choose another folder")
        self._source, self._target, self._plan = source, target, plan
        self._scratch = target.with_name(f".{target.name}.partial")
        self._errors: dict[str, float] = {}
        self._linears: dict[str, _Stored] = {}
        self._spool = TensorSpool(self._scratch)

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
        try:
            if kind is None:
                self._finish()
        finally:
            self._spool.close()
            shutil.rmtree(self._scratch, ignore_errors=True)

    def add(self, part: FinishedLinear) -> None:
        """Write one quantized linear."""
        self._errors[part.name] = part.relative_error
        self.add_linear(part.name, part.linear)

    def add_linear(self, name: str, linear: QuantizedLinear) -> None:
        """Write one quantized linear of which no error is known.

        Raises:
            VqllmError: the model has no such linear, its shape differs, or the disk is full.
        """
        if name not in self._source.linear_names():
            raise VqllmError(f"the model has no linear called {name}")
        shape = (linear.out_features, linear.in_features)
        if shape != self._source.linear_shape(name):
            raise VqllmError(f"{name} is {shape}, the model's is {self._source.linear_shape(name)}")
        for part, values in linear.tensors().items():
            self._spool.put(f"{name}.{part}", values)
        self._linears[name] = _Stored.of(linear)

    def _finish(self) -> None:
        missing = [name for name in self._source.linear_names() if name not in self._linears]
        if missing:
            raise VqllmError(f"never written: {', '.join(missing)}")
        form = self._choose_format()
        self._write_others()
        weight_map = self._spool.finish()
        if len(set(weight_map.values())) > 1:
            content = {"metadata": {"total_size": self._spool.num_bytes}, "weight_map": weight_map}
            write_json(self._scratch / "model.safetensors.index.json", content)
        self._write_descriptions(form)
        self._scratch.rename(self._target)

    def _choose_format(self) -> FolderFormat:
        """Raises VqllmError when the wanted format cannot hold the linears."""
        stored, meta = list(self._linears.values()), dict(self._plan.meta)
        wanted = self._plan.form
        specs = {entry.grouped_spec for entry in stored}
        is_plain = not self._plan.needs_vqstack
        if is_plain and wanted in ("auto", "gptq") and len(specs) == 1 and None not in specs:
            return self._gptq_format(meta)
        is_vptq = all(entry.vptq_config is not None for entry in stored)
        if is_plain and wanted in ("auto", "vptq") and is_vptq:
            return self._vptq_format(meta)
        if wanted not in ("auto", "vqstack"):
            raise VqllmError(
                f"format {wanted!r} cannot hold these layers: they mix methods or sizes, or need "
                "rotations at run time; use 'vqstack'"
            )
        return self._vqstack_format(meta)

    def _gptq_format(self, meta: dict[str, Any]) -> GptqFormat:
        stored = self._linears.values()
        is_symmetric = all(entry.is_symmetric for entry in stored)
        if not is_symmetric:
            self._store_zeros_as_they_are()
        spec = next(iter(stored)).grouped_spec
        assert spec is not None
        return GptqFormat(spec, is_symmetric, is_v2=not is_symmetric, recipe=meta)

    def _store_zeros_as_they_are(self) -> None:
        """Turn the zero points of symmetric linears into v2 ones, as the others' are."""
        for name, entry in self._linears.items():
            if entry.is_symmetric and entry.grouped_spec is not None:
                out_features, in_features = self._source.linear_shape(name)
                spec = entry.grouped_spec
                shape = (spec.num_groups(in_features), out_features)
                zeros = np.full(shape, spec.symmetric_zero, np.uint8)
                self._spool.replace(f"{name}.qzeros", pack_columns(zeros, spec.bits))

    def _vptq_format(self, meta: dict[str, Any]) -> VptqFormat:
        layers = {}
        for name, entry in self._linears.items():
            assert entry.vptq_config is not None
            has_bias = f"{name}.bias" in self._others()
            layers[name] = {**entry.vptq_config, "bias": has_bias}
        return VptqFormat(layers, recipe=meta)

    def _vqstack_format(self, meta: dict[str, Any]) -> VqstackFormat:
        return VqstackFormat(
            layers={name: entry.entry for name, entry in self._linears.items()},
            transform_fields=dict(self._plan.transform),
            tables=self._tables(),
            bits_of_embedding=self._plan.embedding_bits,
            recipe=meta,
        )

    def _tables(self) -> dict[str, Any]:
        """The trellis tables that the layers use, each once."""
        codebooks = (entry.codebook for entry in self._linears.values())
        tables = {book.key: book.to_dict() for book in codebooks if book is not None}
        return dict(sorted(tables.items()))

    def _others(self) -> Mapping[str, NDArray[Any]]:
        if self._plan.others is not None:
            return self._plan.others
        replaced = {f"{name}.weight" for name in self._linears}
        store = self._source.store
        return {name: store.raw(name) for name in store.names if name not in replaced}

    def _write_others(self) -> None:
        tables = (EMBEDDING, HEAD) if self._plan.embedding_bits else ()
        for name, values in self._others().items():
            if name in tables:
                self._write_table(name, values)
            else:
                self._write_plain(name, values)

    def _write_plain(self, name: str, values: NDArray[Any]) -> None:
        """In the source's dtype where nothing changed; changed matrices of 16-bit models as F16."""
        store = self._source.store
        source_dtype = store.dtype(name) if name in store else None
        if source_dtype == "BF16" and values.dtype == np.uint16:
            self._spool.put(name, values, "BF16")
        elif source_dtype in ("F16", "BF16") and values.dtype == np.float32 and values.ndim > 1:
            self._spool.put(name, values.astype(np.float16))
        else:
            self._spool.put(name, values)

    def _write_table(self, name: str, values: NDArray[Any]) -> None:
        """A table (rows, d) as int8 with a float32 scale per row."""
        if values.dtype == np.uint16:
            values = (values.astype(np.uint32) << 16).view(np.float32)
        codes, scales = quantized_rows(values.astype(np.float32))
        stem = name.removesuffix(".weight")
        self._spool.put(stem + CODES_SUFFIX, codes)
        self._spool.put(stem + SCALES_SUFFIX, scales)

    def _write_descriptions(self, form: FolderFormat) -> None:
        folder, quantization = self._scratch, form.to_dict()
        config: dict[str, Any] = {
            **read_config(self._source.folder),
            **self._plan.config_changes,
        }
        write_json(folder / "config.json", {**config, "quantization_config": quantization})
        if isinstance(form, GptqFormat):
            write_json(folder / "quantize_config.json", quantization)
        for name in COMPANION_FILES:
            if (self._source.folder / name).is_file():
                shutil.copyfile(self._source.folder / name, folder / name)
        info = Checkpoint(folder).info(self._target.name)
        source = self._source.folder.resolve().name
        card = quantized_card(info, source, self._plan.recipe, self._errors)
        (folder / "README.md").write_text(card, encoding="utf-8")


def quantized_rows(
    values: NDArray[np.float32],
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Rows (n, d) on the symmetric 8-bit grid of each row's largest value: codes, scales (n,)."""
    scales = np.maximum(np.abs(values).max(axis=1), np.float32(1e-30)) / np.float32(127)
    codes = np.rint(values / scales[:, None]).clip(-127, 127).astype(np.int8)
    return codes, scales.astype(np.float32)
