"""Reading model folders: plain Hugging Face ones, and quantized ones of every known format.

Labels are not trusted: what config.json says is checked against the tensors, and a contradiction
is an error that names field, tensor and file. The formats themselves are in `vqllm.formats`.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vqllm.errors import CorruptCheckpoint, UnsupportedModel
from vqllm.formats.base import FolderFormat
from vqllm.formats.fp8 import Fp8Format
from vqllm.formats.gptq import WHOLE_COLUMN, GptqFormat, ZeroPoints
from vqllm.formats.vptq import VptqFormat
from vqllm.formats.vqstack import VqstackFormat
from vqllm.model_config import LlamaConfig, parse_config, read_config
from vqllm.model_info import ModelInfo
from vqllm.quantization.base import QuantizedLinear
from vqllm.tensor_store import TensorStore

if TYPE_CHECKING:
    from vqllm.outlier.transform import ModelTransform

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"
# Codes and scales stand beside the tensor that they replace: `x.weight` becomes these two.
CODES_SUFFIX, SCALES_SUFFIX = ".weight_codes", ".weight_scales"
_MARKERS = ("qweight", "indices", "codes")


class Checkpoint:
    """One model folder, opened for reading; tensors stay on disk until asked for.

    Attributes:
        config: shape of the model.
        quantization: format of the quantized linears, or None for a plain folder.
    """

    def __init__(self, folder: Path, zero_points: ZeroPoints = ZeroPoints.AUTO) -> None:
        """`zero_points` decides for GPTQ folders whose label and values are both unclear.

        Raises:
            UnknownModel, UnsupportedModel, CorruptCheckpoint: the folder cannot be read.
        """
        raw_config = read_config(folder)
        self.folder = folder
        self.config: LlamaConfig = parse_config(raw_config)
        self.quantization = read_format(raw_config.get("quantization_config"), zero_points)
        self.store = TensorStore(folder)
        self._check_label()

    def linear(self, name: str) -> QuantizedLinear | NDArray[np.float32]:
        """A linear layer such as `model.layers.0.mlp.up_proj`: quantized, or (out, in) float32.

        Raises:
            CorruptCheckpoint: a tensor is missing, misshapen, not finite, or not what config.json
                says.
        """
        shape = self.linear_shape(name)
        if self.quantization is not None:
            linear = self.quantization.read(name, shape, self.store)
            if linear is not None:
                return linear
        return self.dense(f"{name}.weight", shape)

    def dense_linear(self, name: str) -> NDArray[np.float32]:
        """The same layer as weights, float32 (out, in), dequantized if need be."""
        linear = self.linear(name)
        return linear.dequantize() if isinstance(linear, QuantizedLinear) else linear

    def dense(self, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """A float tensor of a known shape, as float32."""
        values = self.store.float32(name)
        if values.shape != shape:
            raise CorruptCheckpoint(
                f"{self.folder}: {name} has shape {values.shape}, config.json implies {shape}"
            )
        return values

    def embedding(self) -> NDArray[np.float32]:
        return self._table(EMBEDDING)

    def head(self) -> NDArray[np.float32]:
        """Output projection (vocab_size, hidden_size); the embedding where they are tied."""
        return self.embedding() if self.config.tie_word_embeddings else self._table(HEAD)

    def embedding_codes(
        self, name: str = EMBEDDING
    ) -> tuple[NDArray[np.int8], NDArray[np.float32]] | None:
        """int8 codes (vocab, d) and float32 scales (vocab,) of a table stored in 8 bits, or None.

        Raises:
            CorruptCheckpoint: one of the two is missing or misshapen.
        """
        stem = name.removesuffix(".weight")
        if stem + CODES_SUFFIX not in self.store:
            return None
        shape = (self.config.vocab_size, self.config.hidden_size)
        codes = self.store.raw(stem + CODES_SUFFIX)
        if codes.shape != shape or codes.dtype != np.int8:
            raise CorruptCheckpoint(
                f"{self.folder}: {stem}{CODES_SUFFIX} is {codes.dtype} {codes.shape}, "
                f"expected int8 {shape}"
            )
        return codes, self.dense(stem + SCALES_SUFFIX, shape[:1])

    def norm(self, name: str) -> NDArray[np.float32]:
        return self.dense(name, (self.config.hidden_size,))

    @property
    def transform(self) -> ModelTransform:
        """The rotations that a runner of this folder has to compute.

        Raises:
            CorruptCheckpoint: the fields in config.json are broken.
        """
        from vqllm.outlier.transform import ModelTransform  # imports torch

        fields = self.quantization.transform if self.quantization is not None else {}
        return ModelTransform.from_dict(fields) if fields else ModelTransform()

    def linear_shape(self, name: str) -> tuple[int, int]:
        """(out, in) of a linear layer by its full name."""
        return self.config.linear_shape(name)

    def linear_names(self) -> list[str]:
        """Full names of all decoder linears, in execution order."""
        return self.config.linear_names()

    def info(self, name: str | None = None) -> ModelInfo:
        """Facts about the folder; reads the weights once for the revision hash."""
        form, num_parameters = self.quantization, self.config.num_parameters
        linear_bytes = self._linear_bytes()
        bpw = 8 * linear_bytes / self.config.num_linear_parameters
        tensor_bytes = sum(map(self.store.num_bytes, self.store.names))
        return ModelInfo(
            name=name or self.folder.resolve().name,
            architecture=self.config.architecture,
            method="none" if form is None else getattr(form, "method", form.quant_method),
            bits=form.spec.bits if isinstance(form, GptqFormat) else round(bpw),
            group_size=self._group_size(),
            bpw=bpw,
            total_bpw=8 * tensor_bytes / num_parameters,
            revision=self._revision(),
            context_length=self.config.context_length,
            num_parameters=num_parameters,
            format="plain" if form is None else form.quant_method,
            linear_bytes=linear_bytes,
            embedding_bpw=self.embedding_bpw(),
            file_bytes=sum(path.stat().st_size for path in self.store.files),
            is_rotated=form is not None and form.is_online,
        )

    def _group_size(self) -> int:
        """Of a folder whose linears agree on it, else 0."""
        form = self.quantization
        if isinstance(form, GptqFormat):
            return 0 if form.spec.group_size == WHOLE_COLUMN else form.spec.group_size
        if isinstance(form, VqstackFormat):
            sizes = {entry.get("group_size", 0) for entry in form.layers.values()}
            methods = {entry.get("method") for entry in form.layers.values()}
            if len(sizes) == 1 and "vptq" not in methods:
                return int(sizes.pop())
        return 0

    def _linear_bytes(self) -> int:
        prefixes = tuple(f"{name}." for name in self.linear_names())
        names = (n for n in self.store.names if n.startswith(prefixes) and not n.endswith(".bias"))
        return sum(map(self.store.num_bytes, names))

    def embedding_bpw(self) -> float:
        """True bits per weight of the embedding; reads headers only."""
        stem = EMBEDDING.removesuffix("weight")
        names = [name for name in self.store.names if name.startswith(stem)]
        num_weights = self.config.vocab_size * self.config.hidden_size
        return 8 * sum(map(self.store.num_bytes, names)) / num_weights

    def _revision(self) -> str:
        digest = hashlib.sha256()
        for path in (self.folder / "config.json", *self.store.files):
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()[:16]

    def _table(self, name: str) -> NDArray[np.float32]:
        """An embedding or a head, (vocab_size, hidden_size), from floats or from 8-bit codes."""
        quantized = self.embedding_codes(name)
        if quantized is None:
            return self.dense(name, (self.config.vocab_size, self.config.hidden_size))
        codes, scales = quantized
        return codes * scales[:, None]

    def _check_label(self) -> None:
        """Raise CorruptCheckpoint when the format that config.json names is not the stored one."""
        config_path, form = self.folder / "config.json", self.quantization
        names = self.linear_names()
        found = [f"{n}.{part}" for n in names for part in _MARKERS if f"{n}.{part}" in self.store]
        if form is None:
            if found:
                raise CorruptCheckpoint(
                    f"{config_path} has no quantization_config, but "
                    f"{self.store.path_of(found[0])} holds {found[0]}"
                )
            return
        if not any(form.marker(name) in self.store for name in names):
            what = f"holds {found[0]}" if found else "holds plain weights"
            raise CorruptCheckpoint(
                f"{config_path}: quantization_config.quant_method is {form.quant_method!r}, but "
                f"{self.store.files[0]} has no {form.marker(names[0])} and {what}"
            )


def read_format(config: Any, zero_points: ZeroPoints = ZeroPoints.AUTO) -> FolderFormat | None:
    """The format that a `quantization_config` describes, None for none.

    Raises:
        UnsupportedModel: a `quant_method` or a feature that cannot be read.
        CorruptCheckpoint: a field is absent or of the wrong type.
    """
    if not config:
        return None
    if not isinstance(config, dict):
        raise CorruptCheckpoint(f"config.json: quantization_config is {config!r}, not an object")
    method = config.get("quant_method")
    if method == GptqFormat.quant_method:
        return GptqFormat.from_dict(config, zero_points)
    if method == VptqFormat.quant_method:
        return VptqFormat.from_dict(config)
    if method == VqstackFormat.quant_method:
        return VqstackFormat.from_dict(config)
    if method == Fp8Format.quant_method:
        return Fp8Format.from_dict(config)
    known = "'gptq', 'vptq', 'vqstack', 'fp8'"
    raise UnsupportedModel(f"quant_method is {method!r}; readable are {known}")


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
