"""Reading and writing model folders: plain Hugging Face ones and GPTQ ones.

The GPTQ layout is the one other tools read: int32 `qweight` (in * bits / 32, out), float16
`scales` (groups, out), int32 `qzeros` (groups, out * bits / 32), int32 `g_idx` (in,). Format
"gptq" (v1) stores zero points minus one, "gptq_v2" stores them as they are. Some published files
carry the wrong label, so symmetric files are told apart by their values.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vqllm.errors import CorruptCheckpoint, UnsupportedModel
from vqllm.model_config import LlamaConfig, parse_config, read_config
from vqllm.model_info import ModelInfo
from vqllm.packing import WORD_BITS, pack_columns, pack_rows, unpack_columns, unpack_rows
from vqllm.quantization.base import SUPPORTED_BITS, GroupedLinear, GroupedSpec
from vqllm.tensor_store import TensorLayout, TensorStore

logger = logging.getLogger(__name__)

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"
GPTQ_PARTS = ("qweight", "qzeros", "scales", "g_idx")


@dataclass(frozen=True)
class GptqFormat:
    """The `quantization_config` of a GPTQ checkpoint, as far as it matters for reading."""

    spec: GroupedSpec
    is_symmetric: bool = True
    is_v2: bool = False

    def to_dict(self) -> dict[str, Any]:
        return {
            "quant_method": "gptq",
            "bits": self.spec.bits,
            "group_size": self.spec.group_size,
            "sym": self.is_symmetric,
            # The column order of the sweep is not stored: with static groups the checkpoint
            # looks like one without act-order, which is what every kernel runs fastest.
            "desc_act": False,
            "static_groups": True,
            "true_sequential": True,
            "lm_head": False,
            "checkpoint_format": "gptq_v2" if self.is_v2 else "gptq",
            "meta": {"quantizer": ["vqstack:0.1"]},
        }

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> GptqFormat:
        """Raises UnsupportedModel for another method, width or group size."""
        method = config.get("quant_method")
        if method != "gptq":
            raise UnsupportedModel(f"quant_method is {method!r}; only 'gptq' can be read")
        bits, group_size = config.get("bits"), config.get("group_size")
        if bits not in SUPPORTED_BITS:
            raise UnsupportedModel(f"GPTQ with bits={bits!r}; readable are {SUPPORTED_BITS}")
        if not isinstance(group_size, int) or group_size < 16 or group_size & (group_size - 1):
            raise UnsupportedModel(
                f"GPTQ with group_size={group_size!r}; readable are powers of two from 16 on"
            )
        is_v2 = config.get("checkpoint_format", "gptq") == "gptq_v2"
        return cls(GroupedSpec(bits, group_size), bool(config.get("sym", True)), is_v2)


class Checkpoint:
    """One model folder, opened for reading; tensors stay on disk until asked for.

    Attributes:
        config: shape of the model.
        quantization: format of the quantized linears, or None for a plain folder.
    """

    def __init__(self, folder: Path) -> None:
        """Raises UnknownModel, UnsupportedModel or CorruptCheckpoint."""
        raw_config = read_config(folder)
        self.folder = folder
        self.config: LlamaConfig = parse_config(raw_config)
        quantization = raw_config.get("quantization_config")
        self.quantization = GptqFormat.from_dict(quantization) if quantization else None
        self.store = TensorStore(folder)

    def linear(self, name: str) -> GroupedLinear | NDArray[np.float32]:
        """A linear layer such as `model.layers.0.mlp.up_proj`: quantized, or (out, in) float32.

        Raises:
            CorruptCheckpoint: a tensor is missing, misshapen or not finite.
        """
        if self.quantization is not None and f"{name}.qweight" in self.store:
            return self._grouped(name, self.quantization)
        return self.dense(f"{name}.weight", self.linear_shape(name))

    def dense_linear(self, name: str) -> NDArray[np.float32]:
        """The same layer as weights, float32 (out, in), dequantized if need be."""
        linear = self.linear(name)
        return linear.dequantize() if isinstance(linear, GroupedLinear) else linear

    def dense(self, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """A float tensor of a known shape, as float32."""
        values = self.store.float32(name)
        if values.shape != shape:
            raise CorruptCheckpoint(
                f"{self.folder}: {name} has shape {values.shape}, config.json implies {shape}"
            )
        return values

    def embedding(self) -> NDArray[np.float32]:
        return self.dense(EMBEDDING, (self.config.vocab_size, self.config.hidden_size))

    def head(self) -> NDArray[np.float32]:
        """Output projection (vocab_size, hidden_size); the embedding where they are tied."""
        if self.config.tie_word_embeddings:
            return self.embedding()
        return self.dense(HEAD, (self.config.vocab_size, self.config.hidden_size))

    def norm(self, name: str) -> NDArray[np.float32]:
        return self.dense(name, (self.config.hidden_size,))

    def linear_shape(self, name: str) -> tuple[int, int]:
        """(out, in) of a linear layer by its full name."""
        return self.config.linear_shapes()[".".join(name.split(".")[3:])]

    def linear_names(self) -> list[str]:
        """Full names of all decoder linears, in execution order."""
        return [
            f"model.layers.{layer}.{part}"
            for layer in range(self.config.num_layers)
            for part in self.config.linear_shapes()
        ]

    def info(self, name: str | None = None) -> ModelInfo:
        """Facts about the folder; reads the weights once for the revision hash."""
        quantization = self.quantization
        bpw = self._bits_per_weight()
        return ModelInfo(
            name=name or self.folder.resolve().name,
            architecture=self.config.architecture,
            method="none" if quantization is None else "gptq",
            bits=round(bpw) if quantization is None else quantization.spec.bits,
            group_size=0 if quantization is None else quantization.spec.group_size,
            bpw=bpw,
            total_bpw=8
            * sum(map(self.store.num_bytes, self.store.names))
            / self.config.num_parameters,
            revision=self._revision(),
            context_length=self.config.context_length,
            num_parameters=self.config.num_parameters,
        )

    def _bits_per_weight(self) -> float:
        parts = [*GPTQ_PARTS, "weight"]
        names = (f"{linear}.{part}" for linear in self.linear_names() for part in parts)
        num_bytes = sum(self.store.num_bytes(name) for name in names if name in self.store)
        return 8 * num_bytes / self.config.num_linear_parameters

    def _revision(self) -> str:
        digest = hashlib.sha256()
        for path in (self.folder / "config.json", *self.store.files):
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()[:16]

    def _grouped(self, name: str, form: GptqFormat) -> GroupedLinear:
        out_features, in_features = self.linear_shape(name)
        spec = form.spec
        num_groups = spec.num_groups(in_features)
        words = self._part(name, "qweight", (in_features * spec.bits // WORD_BITS, out_features))
        packed_zeros = self._part(
            name, "qzeros", (num_groups, out_features * spec.bits // WORD_BITS)
        )
        scales = self._part(name, "scales", (num_groups, out_features))
        group_index = self._part(name, "g_idx", (in_features,)).astype(np.int32)
        if not np.isfinite(scales).all():
            raise CorruptCheckpoint(f"{self.folder}: {name}.scales holds NaN or infinite values")
        if group_index.min() < 0 or group_index.max() >= num_groups:
            raise CorruptCheckpoint(f"{self.folder}: {name}.g_idx names a group that is not there")
        return GroupedLinear(
            codes=unpack_rows(words, spec.bits),
            scales=scales.astype(np.float16),
            zeros=stored_to_zeros(unpack_columns(packed_zeros, spec.bits), form, name),
            group_index=group_index,
            spec=spec,
        )

    def _part(self, name: str, part: str, shape: tuple[int, ...]) -> NDArray[Any]:
        values = self.store.raw(f"{name}.{part}")
        if values.shape != shape:
            raise CorruptCheckpoint(
                f"{self.folder}: {name}.{part} has shape {values.shape}, expected {shape}"
            )
        return values


def stored_to_zeros(stored: NDArray[np.uint8], form: GptqFormat, name: str) -> NDArray[np.uint8]:
    """Zero points from what the file stores, v1 (minus one) or v2 (as they are).

    A symmetric file has one stored value everywhere, which tells the format whatever the label.

    Raises:
        CorruptCheckpoint: an asymmetric v1 file with a wrapped zero point, whose meaning differs
            between readers.
    """
    spec, offset = form.spec, 0 if form.is_v2 else 1
    if form.is_symmetric:
        value = int(stored.flat[0])
        if (stored == value).all() and value in (spec.symmetric_zero - 1, spec.symmetric_zero):
            found = spec.symmetric_zero - value
            if found != offset:
                logger.warning("%s: zero points contradict the format label; values win", name)
            offset = found
    if offset and (stored == spec.max_code).any():
        raise CorruptCheckpoint(
            f"{name}.qzeros: zero point 0 in a v1 file wraps and is ambiguous; save it as gptq_v2"
        )
    return stored + np.uint8(offset)


def packed_tensors(name: str, linear: GroupedLinear, form: GptqFormat) -> dict[str, NDArray[Any]]:
    """The four tensors of one quantized linear, under their file names."""
    bits = linear.spec.bits
    stored = linear.zeros if form.is_v2 else linear.zeros - np.uint8(1)
    return {
        f"{name}.qweight": pack_rows(linear.codes, bits),
        f"{name}.qzeros": pack_columns(stored, bits),
        f"{name}.scales": linear.scales,
        f"{name}.g_idx": linear.group_index,
    }


def packed_layout(name: str, shape: tuple[int, int], spec: GroupedSpec) -> dict[str, TensorLayout]:
    """Dtypes and shapes of `packed_tensors` for a linear of `shape` (out, in)."""
    out_features, in_features = shape
    num_groups = spec.num_groups(in_features)
    return {
        f"{name}.qweight": TensorLayout(
            "I32", (in_features * spec.bits // WORD_BITS, out_features)
        ),
        f"{name}.qzeros": TensorLayout("I32", (num_groups, out_features * spec.bits // WORD_BITS)),
        f"{name}.scales": TensorLayout("F16", (num_groups, out_features)),
        f"{name}.g_idx": TensorLayout("I32", (in_features,)),
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
