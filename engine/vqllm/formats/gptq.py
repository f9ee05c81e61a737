"""Folders in the format of GPTQ tools, `quant_method` "gptq".

int32 `qweight` (in * bits / 32, out), float16 `scales` (groups, out), int32 `qzeros` (groups,
out * bits / 32), int32 `g_idx` (in,). `checkpoint_format` "gptq" (v1) stores zero points minus one,
"gptq_v2" as they are. Published files carry the wrong label now and then, so the label is only
believed where the values do not speak: see `ZeroPoints`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from vqllm.errors import CorruptCheckpoint, UnsupportedModel
from vqllm.formats.base import FolderFormat, Shape, finite_part, stored_part
from vqllm.packing import WORD_BITS, pack_columns, pack_rows, unpack_columns, unpack_rows
from vqllm.quantization.base import SUPPORTED_BITS, GroupedLinear, GroupedSpec
from vqllm.tensor_store import TensorStore

logger = logging.getLogger(__name__)

PARTS = ("qweight", "qzeros", "scales", "g_idx")
WHOLE_COLUMN = 1 << 20  # beyond the longest column: one group per output, written as -1
# Weights have a mean near zero, so the mean of code - zero tells the offset of the zero points;
# it counts as evidence within this many steps of one of the two candidates. Finer grids have steps
# that are small beside the mean that a layer may well have.
_EVIDENCE = 0.25
_MAX_EVIDENCE_BITS = 4
_MIN_EVIDENCE_CODES = 4096
_SAMPLED_COLUMNS = 128


class ZeroPoints(Enum):
    """How to read stored zero points: by label and values, or as the caller says."""

    AUTO = "auto"
    V1 = "v1"
    V2 = "v2"


@dataclass(frozen=True)
class GptqFormat(FolderFormat):
    """The `quantization_config` of a GPTQ checkpoint, as far as it matters for reading."""

    spec: GroupedSpec
    is_symmetric: bool = True
    is_v2: bool = False
    zero_points: ZeroPoints = ZeroPoints.AUTO
    recipe: dict[str, Any] = field(default_factory=dict)

    quant_method: ClassVar[str] = "gptq"

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
            "meta": {"quantizer": ["vqstack:0.1"], **self.recipe},
        }

    @classmethod
    def from_dict(
        cls, config: dict[str, Any], zero_points: ZeroPoints = ZeroPoints.AUTO
    ) -> GptqFormat:
        """Raises UnsupportedModel for a width, group size or label that cannot be read."""
        bits, group_size = config.get("bits"), config.get("group_size")
        if bits not in SUPPORTED_BITS:
            raise UnsupportedModel(f"GPTQ with bits={bits!r}; readable are {SUPPORTED_BITS}")
        label = config.get("checkpoint_format", "gptq")
        if label not in ("gptq", "gptq_v2"):
            raise UnsupportedModel(f"checkpoint_format is {label!r}; known: 'gptq', 'gptq_v2'")
        meta = config.get("meta")
        return cls(
            _spec(bits, group_size),
            bool(config.get("sym", True)),
            label == "gptq_v2",
            zero_points,
            meta if isinstance(meta, dict) else {},
        )

    @property
    def meta(self) -> dict[str, Any]:
        return self.recipe

    @property
    def label_offset(self) -> int:
        """What the label says was taken off the stored zero points."""
        return 0 if self.is_v2 else 1

    def marker(self, name: str) -> str:
        return f"{name}.qweight"

    def read(self, name: str, shape: Shape, store: TensorStore) -> GroupedLinear | None:
        if self.marker(name) not in store:
            return None
        return read_grouped(name, shape, store, self)


def _spec(bits: int, group_size: object) -> GroupedSpec:
    if group_size == -1:
        return GroupedSpec(bits, WHOLE_COLUMN)
    if not isinstance(group_size, int) or group_size < 16 or group_size & (group_size - 1):
        raise UnsupportedModel(
            f"GPTQ with group_size={group_size!r}; readable are -1 and powers of two from 16 on"
        )
    return GroupedSpec(bits, group_size)


def read_grouped(name: str, shape: Shape, store: TensorStore, form: GptqFormat) -> GroupedLinear:
    """One linear from its four tensors; shapes tell the truth about bits and group size.

    Raises:
        CorruptCheckpoint: a tensor is missing, misshapen, or contradicts config.json.
    """
    (out_features, in_features), spec = shape, form.spec
    _check_shapes(name, shape, store, spec)
    words = stored_part(store, f"{name}.qweight", np.int32)
    codes = unpack_rows(words, spec.bits)
    stored = unpack_columns(stored_part(store, f"{name}.qzeros", np.int32), spec.bits)
    group_index = _group_index(name, in_features, store, spec)
    where = f"{store.path_of(f'{name}.qzeros')}: {name}"
    return GroupedLinear(
        codes=codes,
        scales=finite_part(store, f"{name}.scales", (spec.num_groups(in_features), out_features)),
        zeros=_zeros(stored, codes, group_index, form, where),
        group_index=group_index,
        spec=spec,
    )


def _check_shapes(name: str, shape: Shape, store: TensorStore, spec: GroupedSpec) -> None:
    (out_features, in_features), bits = shape, spec.bits
    num_groups = spec.num_groups(in_features)
    expected = {
        "qweight": (in_features * bits // WORD_BITS, out_features),
        "qzeros": (num_groups, out_features * bits // WORD_BITS),
        "scales": (num_groups, out_features),
    }
    for part, wanted in expected.items():
        found = store.shape(f"{name}.{part}")
        if found != wanted:
            raise CorruptCheckpoint(
                f"{store.path_of(f'{name}.{part}')}: {name}.{part} has shape {found}, but "
                f"config.json (bits={bits}, group_size={spec.group_size}) implies {wanted}"
                f"{_explanation(part, found, wanted, shape)}"
            )


def _explanation(part: str, found: tuple[int, ...], wanted: tuple[int, ...], shape: Shape) -> str:
    """What the tensor would mean, where one field of config.json alone explains it."""
    out_features, in_features = shape
    if len(found) != 2:
        return ""
    if part == "qweight" and found[1] == out_features:
        return f"; the codes have {found[0] * WORD_BITS / in_features:g} bits"
    if part in ("scales", "qzeros") and found[1] == wanted[1] and found[0]:
        return f"; the groups have about {in_features / found[0]:g} columns"
    return ""


def _group_index(
    name: str, in_features: int, store: TensorStore, spec: GroupedSpec
) -> NDArray[np.int32]:
    if f"{name}.g_idx" not in store:  # tools that never permute leave it out
        return (np.arange(in_features) // spec.group_size).astype(np.int32)
    index = stored_part(store, f"{name}.g_idx", np.int32)
    where = f"{store.path_of(name + '.g_idx')}: {name}.g_idx"
    if index.shape != (in_features,):
        raise CorruptCheckpoint(f"{where} has shape {index.shape}, expected {(in_features,)}")
    if index.min() < 0 or index.max() >= spec.num_groups(in_features):
        raise CorruptCheckpoint(f"{where} names a group that is not there")
    return np.array(index)


def _zeros(
    stored: NDArray[np.uint8],
    codes: NDArray[np.uint8],
    group_index: NDArray[np.int32],
    form: GptqFormat,
    where: str,
) -> NDArray[np.uint8]:
    is_coarse = form.spec.bits <= _MAX_EVIDENCE_BITS
    mean_step = _mean_step(stored, codes, group_index) if is_coarse else None
    return stored_to_zeros(stored, form, where, mean_step)


def _mean_step(
    stored: NDArray[np.uint8], codes: NDArray[np.uint8], group_index: NDArray[np.int32]
) -> float | None:
    """Mean of code - stored zero over the layer, None where there are too few to tell."""
    if codes.size < _MIN_EVIDENCE_CODES:
        return None
    columns_per_group = np.bincount(group_index, minlength=stored.shape[0])
    total = codes.sum(dtype=np.int64) - columns_per_group @ stored.sum(axis=1, dtype=np.int64)
    return float(total) / codes.size


def sampled_zeros(
    stored: NDArray[np.uint8],
    words: NDArray[np.int32],
    group_index: NDArray[np.int32],
    form: GptqFormat,
    name: str,
) -> NDArray[np.uint8] | None:
    """Zero points as `read_grouped` finds them, by the codes of a few columns alone.

    None where these do not bear out the label: then only all of the codes can tell.

    Args:
        stored: (groups, out) as unpacked from the file.
        words: (in * bits / 32, out), the packed codes.
        group_index: (in,) group of every column.
    """
    is_told = form.zero_points is not ZeroPoints.AUTO or form.spec.bits > _MAX_EVIDENCE_BITS
    if not is_told and _offset_of_constant(stored, form.spec) is None:
        codes = unpack_rows(words[: _SAMPLED_COLUMNS * form.spec.bits // WORD_BITS], form.spec.bits)
        mean_step = _mean_step(stored, codes, group_index[: len(codes)])
        if _offset_of_mean(mean_step) != form.label_offset:
            return None
    return stored_to_zeros(stored, form, name)


def stored_to_zeros(
    stored: NDArray[np.uint8], form: GptqFormat, name: str, mean_step: float | None = None
) -> NDArray[np.uint8]:
    """Zero points from what the file stores, v1 (minus one) or v2 (as they are).

    A symmetric file has one stored value everywhere, which tells the format whatever the label.
    In an asymmetric one `mean_step`, the mean of code minus stored value, is near 1 in v1 files
    and near 0 in v2 files, because weights have a mean near zero. Values win over the label.

    Raises:
        CorruptCheckpoint: an asymmetric v1 file with a wrapped zero point, whose meaning differs
            between readers.
    """
    spec, offset = form.spec, _offset(stored, form, name, mean_step)
    if offset and (stored == spec.max_code).any():
        raise CorruptCheckpoint(
            f"{name}.qzeros: zero point 0 in a v1 file wraps and is ambiguous; save it as gptq_v2, "
            "or open the folder with zero_points=ZeroPoints.V2 if its label is wrong"
        )
    return stored + np.uint8(offset)


def _offset(stored: NDArray[np.uint8], form: GptqFormat, name: str, mean_step: float | None) -> int:
    if form.zero_points is not ZeroPoints.AUTO:
        return int(form.zero_points is ZeroPoints.V1)
    found = _evidence(stored, form.spec, mean_step)
    if found is None or found == form.label_offset:
        return form.label_offset
    logger.warning(
        "%s.qzeros: checkpoint_format says %s, but the values are those of %s (%s); values win. "
        "Set zero_points to decide otherwise",
        name,
        "gptq_v2" if form.is_v2 else "gptq",
        "gptq" if found else "gptq_v2",
        f"all are {int(stored.flat[0])}" if mean_step is None else f"mean step {mean_step:.2f}",
    )
    return found


def _evidence(stored: NDArray[np.uint8], spec: GroupedSpec, mean_step: float | None) -> int | None:
    """What was taken off the zero points, as the values tell it; None where they do not."""
    constant = _offset_of_constant(stored, spec)
    return _offset_of_mean(mean_step) if constant is None else constant


def _offset_of_constant(stored: NDArray[np.uint8], spec: GroupedSpec) -> int | None:
    value = int(stored.flat[0])
    if (stored == value).all() and value in (spec.symmetric_zero - 1, spec.symmetric_zero):
        return spec.symmetric_zero - value
    return None


def _offset_of_mean(mean_step: float | None) -> int | None:
    for offset in (0, 1):
        if mean_step is not None and abs(mean_step - offset) < _EVIDENCE:
            return offset
    return None


def packed_tensors(name: str, linear: GroupedLinear, form: GptqFormat) -> dict[str, NDArray[Any]]:
    """The four tensors of one quantized linear, under their file names."""
    return {
        f"{name}.qweight": pack_rows(linear.codes, linear.spec.bits),
        f"{name}.qzeros": packed_zeros(linear, form.is_v2),
        f"{name}.scales": linear.scales,
        f"{name}.g_idx": linear.group_index,
    }


def packed_zeros(linear: GroupedLinear, is_v2: bool) -> NDArray[np.int32]:
    """`qzeros` of a linear in either format."""
    stored = linear.zeros if is_v2 else linear.zeros - np.uint8(1)
    return pack_columns(stored, linear.spec.bits)
