"""Our own folders, `quant_method` "vqstack": any method per layer, and rotated models.

quantization_config = {quant_method, version, method, layers: {name: entry}, transform, tcq: trellis
tables, embedding: {bits}, modules_to_not_convert, meta}. The tensors of GPTQ and VPTQ layers are
those of the standard formats (symmetric GPTQ layers as v1, asymmetric ones as v2).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from vqllm.errors import CorruptCheckpoint, InvalidConfig, UnsupportedModel
from vqllm.formats import base
from vqllm.formats.base import FolderFormat, Shape
from vqllm.formats.gptq import GptqFormat, read_grouped
from vqllm.formats.vptq import stored_vptq
from vqllm.quantization.base import SUPPORTED_BITS, GroupedSpec, QuantizedLinear
from vqllm.tensor_store import TensorStore

if TYPE_CHECKING:
    from vqllm.quantization.trellis import TrellisCodebook

VERSION = 1
_MARKERS = {
    "gptq": "qweight",
    "rtn": "qweight",
    "vptq": "indices",
    "tcq": "codes",
    "tcq_row": "codes",
}
EMBEDDING_BITS = (0, 8)


@dataclass(frozen=True)
class VqstackFormat(FolderFormat):
    """The `quantization_config` of a vqstack folder.

    Attributes:
        layers: the entry of every quantized linear by its full name, `method` among its fields.
        transform_fields: what `ModelTransform.to_dict` gave; empty for none.
        tables: trellis tables by `TrellisCodebook.key`, as `TrellisCodebook.to_dict` gives them.
        bits_of_embedding: 8 for int8 codes with a scale per row, 0 for plain floats.
    """

    layers: dict[str, dict[str, Any]]
    transform_fields: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, Any] = field(default_factory=dict)
    bits_of_embedding: int = 0
    excluded: tuple[str, ...] = ("lm_head",)
    recipe: dict[str, Any] = field(default_factory=dict)

    quant_method: ClassVar[str] = "vqstack"

    @property
    def method(self) -> str:
        """Methods of the layers, joined by `+` where they differ."""
        return "+".join(sorted({str(entry.get("method")) for entry in self.layers.values()}))

    @property
    def transform(self) -> dict[str, Any]:
        return self.transform_fields

    @property
    def meta(self) -> dict[str, Any]:
        return self.recipe

    @property
    def embedding_bits(self) -> int:
        return self.bits_of_embedding

    def to_dict(self) -> dict[str, Any]:
        content: dict[str, Any] = {
            "quant_method": "vqstack",
            "version": VERSION,
            "method": self.method,
            "layers": self.layers,
        }
        if self.transform_fields:
            content["transform"] = self.transform_fields
        if self.tables:
            content["tcq"] = self.tables
        if self.bits_of_embedding:
            content["embedding"] = {"bits": self.bits_of_embedding}
        content["modules_to_not_convert"] = list(self.excluded)
        content["meta"] = self.recipe
        return content

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> VqstackFormat:
        """Raises UnsupportedModel for another version, CorruptCheckpoint for broken fields."""
        where = "quantization_config"
        version = base.field(config, "version", int, where)
        if version != VERSION:
            raise UnsupportedModel(f"vqstack format version {version}; readable is {VERSION}")
        embedding = config.get("embedding") or {}
        bits = embedding.get("bits", 0) if isinstance(embedding, dict) else embedding
        if bits not in EMBEDDING_BITS:
            raise CorruptCheckpoint(f"config.json: {where}.embedding.bits is {bits!r}, not 8")
        return cls(
            layers=base.field(config, "layers", dict, where),
            transform_fields=config.get("transform") or {},
            tables=config.get("tcq") or {},
            bits_of_embedding=bits,
            excluded=tuple(config.get("modules_to_not_convert") or ()),
            recipe=config.get("meta") or {},
        )

    def marker(self, name: str) -> str:
        entry = self.layers.get(name, {})
        return f"{name}.{_MARKERS.get(entry.get('method', ''), 'codes')}"

    def read(self, name: str, shape: Shape, store: TensorStore) -> QuantizedLinear | None:
        entry = self.layers.get(name)
        if entry is None:
            return None
        method = base.field(entry, "method", str, f"layers[{name!r}]")
        if method not in _MARKERS:
            raise UnsupportedModel(f"{name}: method {method!r}; known are {sorted(_MARKERS)}")
        if method == "vptq":
            return stored_vptq(name, shape, store, entry)
        if method in ("tcq", "tcq_row"):
            linear = self._read_tcq(name, store, entry)
            return _checked_shape(name, shape, linear)
        return read_grouped(name, shape, store, _gptq_format(name, entry))

    def _read_tcq(self, name: str, store: TensorStore, entry: dict[str, Any]) -> QuantizedLinear:
        from vqllm.quantization.tcq import TcqLinear  # imports torch
        from vqllm.quantization.tcq_row import TcqRowLinear

        prefix = f"{name}."
        tensors = {
            full.removeprefix(prefix): store.raw(full)
            for full in store.names
            if full.startswith(prefix) and full != f"{name}.bias"
        }
        try:
            kind = TcqLinear if entry["method"] == TcqLinear.method else TcqRowLinear
            return kind.from_tensors(tensors, entry, self._codebook(name, entry))
        except CorruptCheckpoint:
            raise
        except (KeyError, InvalidConfig) as error:
            raise CorruptCheckpoint(f"config.json: layers[{name!r}]: {error}") from error
        except ValueError as error:
            path = store.path_of(self.marker(name))
            raise CorruptCheckpoint(f"{path}: {name}: {error}") from error

    def _codebook(self, name: str, entry: dict[str, Any]) -> TrellisCodebook:
        from vqllm.quantization.trellis import TrellisCodebook, codebook_key

        where = f"layers[{name!r}]"
        key = codebook_key(
            base.field(entry, "bits", int, where), base.field(entry, "trellis_bits", int, where)
        )
        if key not in self.tables:
            raise CorruptCheckpoint(
                f"config.json: {name} needs the trellis table {key}, quantization_config.tcq "
                f"has {sorted(self.tables)}"
            )
        return TrellisCodebook.from_dict(key, self.tables[key])


def _gptq_format(name: str, entry: dict[str, Any]) -> GptqFormat:
    where = f"layers[{name!r}]"
    bits = base.field(entry, "bits", int, where)
    if bits not in SUPPORTED_BITS:
        raise CorruptCheckpoint(f"config.json: {where}.bits is {bits}, not in {SUPPORTED_BITS}")
    try:
        spec = GroupedSpec(bits, base.field(entry, "group_size", int, where))
    except InvalidConfig as error:
        raise CorruptCheckpoint(f"config.json: {where}: {error}") from error
    is_symmetric = base.field(entry, "sym", bool, where)
    return GptqFormat(spec, is_symmetric, is_v2=not is_symmetric)


def _checked_shape(name: str, shape: Shape, linear: QuantizedLinear) -> QuantizedLinear:
    found = (linear.out_features, linear.in_features)
    if found != shape:
        raise CorruptCheckpoint(f"{name}: tensors of a linear {found}, the model has {shape}")
    return linear
