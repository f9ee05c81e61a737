"""Folders in VPTQ's Hugging Face format, `quant_method` "vptq".

config.json lists every quantized linear in `config_for_layers`. VPTQ keeps indices, residual and
main, in one bitstream, and views 16-bit indices and permutations as int16.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from vqllm.errors import CorruptCheckpoint, UnsupportedModel
from vqllm.formats import base
from vqllm.formats.base import FolderFormat, Shape
from vqllm.quantization.base import Arrays
from vqllm.quantization.vptq_linear import VptqLinear
from vqllm.quantization.vptq_reading import read_vptq
from vqllm.tensor_store import TensorStore

INTEGER_PARTS = ("indices", "outlier_indices")
FLOAT_PARTS = (
    "centroids.weight",
    "res_centroids.weight",
    "outlier_centroids.weight",
    "weight_scale",
    "weight_bias",
)


@dataclass(frozen=True)
class VptqFormat(FolderFormat):
    """The `quantization_config` of a VPTQ checkpoint.

    Attributes:
        layers: the entry of every quantized linear by its full name.
        shared: entries by the last part of the name, for linears without one of their own.
        excluded: linears that stay plain weights.
    """

    layers: dict[str, dict[str, Any]]
    shared: dict[str, dict[str, Any]] = field(default_factory=dict)
    excluded: tuple[str, ...] = ("lm_head",)
    recipe: dict[str, Any] = field(default_factory=dict)

    quant_method: ClassVar[str] = "vptq"

    def to_dict(self) -> dict[str, Any]:
        return {
            "quant_method": "vptq",
            "config_for_layers": self.layers,
            "shared_layer_config": self.shared,
            "modules_to_not_convert": list(self.excluded),
            "enable_proxy_error": False,
            "meta": {"quantizer": ["vqstack:0.1"], **self.recipe},
        }

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> VptqFormat:
        """Raises CorruptCheckpoint when the lists of layers are not objects."""
        shared = config.get("shared_layer_config") or {}
        layers = config.get("config_for_layers") or {}
        for key, value in {"shared_layer_config": shared, "config_for_layers": layers}.items():
            base.field({key: value}, key, dict, "quantization_config")
        excluded = config.get("modules_to_not_convert") or ["lm_head"]
        meta = config.get("meta")
        return cls(layers, shared, tuple(excluded), meta if isinstance(meta, dict) else {})

    @property
    def meta(self) -> dict[str, Any]:
        return self.recipe

    def marker(self, name: str) -> str:
        return f"{name}.indices"

    def read(self, name: str, shape: Shape, store: TensorStore) -> VptqLinear | None:
        entry = self.layers.get(name, self.shared.get(name.rsplit(".", 1)[-1]))
        if entry is None:
            return None
        return stored_vptq(name, shape, store, entry)


def stored_vptq(name: str, shape: Shape, store: TensorStore, entry: dict[str, Any]) -> VptqLinear:
    """One linear from its entry in config.json and its tensors in the folder.

    Raises:
        CorruptCheckpoint: entry and tensors contradict each other; names field or tensor, and file.
        UnsupportedModel: vectors along the inputs, or indices that are not packed.
    """
    where = f"config.json: config_for_layers[{name!r}]"
    declared = (entry.get("out_features"), entry.get("in_features"))
    if declared != shape:
        raise CorruptCheckpoint(
            f"{where} has out_features, in_features = {declared}, the model has {shape}"
        )
    tensors = _tensors(name, store)
    try:
        return read_vptq(tensors, entry)
    except UnsupportedModel as error:
        raise UnsupportedModel(f"{where}: {error}") from error
    except ValueError as error:
        path = store.path_of(f"{name}.indices")
        raise CorruptCheckpoint(f"{where} and {path}: {error}") from error


def _tensors(name: str, store: TensorStore) -> Arrays:
    """The parts of one linear, floats as float16 whatever the file holds."""
    arrays: Arrays = {
        part: store.raw(f"{name}.{part}") for part in INTEGER_PARTS if f"{name}.{part}" in store
    }
    for part in FLOAT_PARTS:
        if (full := f"{name}.{part}") in store:
            arrays[part] = base.finite_part(store, full, store.shape(full))
    if (full := f"{name}.perm") in store:
        order = store.raw(full)  # older files hold int64
        arrays["perm"] = order.astype(np.uint16).view(np.int16)
    return arrays
