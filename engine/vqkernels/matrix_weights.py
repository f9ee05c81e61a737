"""Weights of one linear in every format the packed matrices take, checked by name at construction.

Plain arrays as checkpoints store them; knows no file, no model and no packed layout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vqkernels.errors import DtypeError, LayoutError, NonFiniteError, ShapeError

CHUNK = 128
GRID_BITS = (2, 3, 4, 8)
MAX_VECTOR = 16
MAX_PARTS = 4096  # of a matrix
MAX_CODES = 65536
TABLE_SIZE = 256
WORD_BITS = 32
_INFINITY, _MINUS_INFINITY = 0x7C00, 0xFC00  # bits of halves

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class GridWeights:
    """W[n, k] = (code - zero) * scale of the group of column k, as GPTQ stores it.

    Attributes:
        codes: uint8 (in, out), or int32 words (in * bits / 32, out), lowest bits first.
        scales: float16 (groups, out).
        zeros: uint8 (groups, out), the code of weight 0; None for 2^(bits - 1).
        bits: 2, 3, 4 or 8.
        group_size: columns per scale, 32, 64 or a multiple of 128; 0 for one group.
    """

    codes: Array
    scales: Array
    zeros: Array | None = None
    bits: int = 4
    group_size: int = 128

    def __post_init__(self) -> None:
        if self.bits not in GRID_BITS:
            raise LayoutError(f"bits is {self.bits}, must be one of {GRID_BITS}")
        check_group_size(self.group_size)
        check_array("codes", self.codes, (np.uint8, np.int32), 2)
        check_scales(self.scales, self.num_groups, self.out_features)
        if self.zeros is not None:
            check_array("zeros", self.zeros, (np.uint8,), 2)
            check_shape("zeros", self.zeros, (self.num_groups, self.out_features))

    @property
    def in_features(self) -> int:
        rows = int(self.codes.shape[0])
        return rows if self.codes.dtype == np.uint8 else rows * WORD_BITS // self.bits

    @property
    def out_features(self) -> int:
        return int(self.codes.shape[1])

    @property
    def num_groups(self) -> int:
        return count_groups(self.in_features, self.group_size)


class _WholeWeight:
    """A weight in one array (out, in)."""

    weight: Array

    @property
    def in_features(self) -> int:
        return int(self.weight.shape[1])

    @property
    def out_features(self) -> int:
        return int(self.weight.shape[0])


@dataclass(frozen=True, eq=False)
class DenseWeights(_WholeWeight):
    """Float weights that packing rounds to 8 bits, one binary16 scale per row and group.

    Attributes:
        weight: float32 or float16 (out, in).
        group_size: as in :class:`GridWeights`; 0 (one scale per row) costs least.
    """

    weight: Array
    group_size: int = 0

    def __post_init__(self) -> None:
        check_array("weight", self.weight, (np.float32, np.float16), 2)
        check_group_size(self.group_size)
        if not _is_finite(self.weight):
            raise NonFiniteError("weight holds NaN or infinity")

    @property
    def num_groups(self) -> int:
        return count_groups(self.in_features, self.group_size)


@dataclass(frozen=True, eq=False)
class LayeredWeights(_WholeWeight):
    """8-bit weights in two layers of four bits, for the output head of a decoder.

    Products are those of `DenseWeights`. A decoder that is asked for the largest logit reads the
    lower layer only where that may be; see `DecodeChunk.largest_of`. Alone in its matrix.

    Attributes:
        weight: (out, in) float32 or float16, rounded to 8 bits with one binary16 scale per row; or
            int8 codes.
        scales: float16 (out,), of int8 codes; else None.
    """

    weight: Array
    scales: Array | None = None

    def __post_init__(self) -> None:
        if self.scales is None:
            check_array("weight", self.weight, (np.float32, np.float16), 2)
            if not _is_finite(self.weight):
                raise NonFiniteError("weight holds NaN or infinity")
            return
        check_array("weight", self.weight, (np.int8,), 2)
        check_scales(self.scales[None], 1, self.out_features)


@dataclass(frozen=True, eq=False)
class TcqWeights:
    """Trellis-coded weights: one bit stream per input column along the outputs.

    Symbol r of a column is its bits [r * bits, +bits), lowest first; the state of row r is the
    trellis_bits bits that end with symbol r, 0 before the stream. W[r, c] =
    table[((state * multiplier) mod 2^trellis_bits) >> (trellis_bits - 8)] * scales[g, r].

    Attributes:
        codes: uint8 (in, ceil(out * bits / 8)).
        scales: float16 (groups, out).
        table: int8 (256,).
        multiplier: odd.
        bits: 1 to 5.
        trellis_bits: 10 to 16.
        group_size: as in :class:`GridWeights`.
    """

    codes: Array
    scales: Array
    table: Array
    multiplier: int
    bits: int
    trellis_bits: int = 12
    group_size: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 5 or not 10 <= self.trellis_bits <= 16:
            raise LayoutError(
                f"bits {self.bits} with trellis_bits {self.trellis_bits}: must be 1..5 and 10..16"
            )
        if self.multiplier % 2 == 0 or not 0 < self.multiplier < 65536:
            raise LayoutError(f"multiplier is {self.multiplier}, must be odd and below 65536")
        check_group_size(self.group_size)
        check_array("codes", self.codes, (np.uint8,), 2)
        check_scales(self.scales, self.num_groups, self.out_features)
        check_array("table", self.table, (np.int8,), 1)
        check_shape("table", self.table, (TABLE_SIZE,))
        stream = -(-self.out_features * self.bits // 8)
        check_shape("codes", self.codes, (self.in_features, stream))

    @property
    def in_features(self) -> int:
        return int(self.codes.shape[0])

    @property
    def out_features(self) -> int:
        return int(self.scales.shape[1])

    @property
    def num_groups(self) -> int:
        return count_groups(self.in_features, self.group_size)


@dataclass(frozen=True, eq=False)
class VqWeights:
    """Vectors along the outputs: W[v * r + i, c] = sum over stages of codebook[index[r, c], i].

    Attributes:
        indices: one or two arrays uint16 (ceil(out / v), in).
        codebooks: as many arrays float16 (num_codes, v), v at most 16.
        out_features: rows of the weight; the last vector may be cut.
    """

    indices: tuple[Array, ...]
    codebooks: tuple[Array, ...]
    out_features: int

    def __post_init__(self) -> None:
        if len(self.indices) != len(self.codebooks) or not 1 <= len(self.indices) <= 2:
            raise ShapeError("indices and codebooks must be one or two arrays each")
        rows = -(-self.out_features // max(1, self.vector_length))
        for stage, (index, codebook) in enumerate(zip(self.indices, self.codebooks, strict=True)):
            check_array(f"codebooks[{stage}]", codebook, (np.float16,), 2)
            self._check_codebook(codebook)
            check_array(f"indices[{stage}]", index, (np.uint16,), 2)
            check_shape(f"indices[{stage}]", index, (rows, self.in_features))
            if int(index.max()) >= codebook.shape[0]:
                raise ShapeError(
                    f"indices[{stage}] holds {int(index.max())}, codebook has {codebook.shape[0]}"
                )

    def _check_codebook(self, codebook: Array) -> None:
        if codebook.shape[1] > MAX_VECTOR or codebook.shape[1] != self.vector_length:
            raise LayoutError(
                f"vector length is {codebook.shape[1]}, must be at most {MAX_VECTOR}, "
                "the same in both codebooks"
            )
        if codebook.shape[0] > MAX_CODES:
            raise ShapeError(f"a codebook has {codebook.shape[0]} entries, at most {MAX_CODES}")
        if not np.isfinite(codebook).all():
            raise NonFiniteError("a codebook holds NaN or infinity")

    @property
    def vector_length(self) -> int:
        return int(self.codebooks[0].shape[-1])

    @property
    def in_features(self) -> int:
        return int(self.indices[0].shape[1])


@dataclass(frozen=True, eq=False)
class VqColumns:
    """Vectors side by side: each of the parts covers the columns behind those of the one before.

    They may differ in vector length, codebooks and stages: outlier columns, or groups of columns
    with codebooks of their own. Activations get a scale of their own with every part.

    Attributes:
        parts: two or more, of the same ``out_features``.
    """

    parts: tuple[VqWeights, ...]

    def __post_init__(self) -> None:
        outs = {part.out_features for part in self.parts}
        if len(self.parts) < 2 or len(outs) > 1:
            raise ShapeError(
                f"{len(self.parts)} parts with out_features {sorted(outs)}, "
                "must be two or more with the same"
            )

    @property
    def in_features(self) -> int:
        return sum(part.in_features for part in self.parts)

    @property
    def out_features(self) -> int:
        return self.parts[0].out_features


Weights = GridWeights | DenseWeights | LayeredWeights | TcqWeights | VqWeights | VqColumns


@dataclass(frozen=True, eq=False)
class Transform:
    """What happens to x before the weights see it, and to y after; exact.

    Column j of the weights reads x[permutation[j]] * column_scales[permutation[j]];
    sum_i x[i] * column_bias[i] is added to every output, then row_bias.

    Attributes:
        permutation: integers (in,), or None.
        column_scales, column_bias: floats (in,) in the order of x, or None.
        row_bias: floats (out,) of the whole matrix, or None.
    """

    permutation: Array | None = None
    column_scales: Array | None = None
    column_bias: Array | None = None
    row_bias: Array | None = None

    def check(self, in_features: int, out_features: int) -> None:
        """Raise ShapeError unless everything fits a matrix of this shape."""
        sizes = {"permutation": in_features, "column_scales": in_features}
        sizes |= {"column_bias": in_features, "row_bias": out_features}
        for name, size in sizes.items():
            array = getattr(self, name)
            if array is not None:
                check_shape(name, array, (size,))
        if self.permutation is not None and not np.array_equal(
            np.sort(self.permutation), np.arange(in_features)
        ):
            raise ShapeError(f"permutation is not a permutation of 0..{in_features - 1}")


def count_groups(in_features: int, group_size: int) -> int:
    """Groups of a row; 0 means one."""
    return -(-in_features // group_size) if group_size else 1


def check_group_size(group_size: int) -> None:
    """Accept what the kernels split into segments."""
    if group_size in (0, 32, 64) or (group_size > 0 and group_size % CHUNK == 0):
        return
    raise LayoutError(f"group_size is {group_size}, must be 32, 64, a multiple of 128, or 0")


def check_scales(scales: object, num_groups: int, out_features: int) -> None:
    """float16 (groups, out), finite."""
    check_array("scales", scales, (np.float16,), 2)
    assert isinstance(scales, np.ndarray)
    check_shape("scales", scales, (num_groups, out_features))
    if not _is_finite(scales):
        raise NonFiniteError("scales holds NaN or infinity; the checkpoint is damaged")


def check_array(name: str, array: object, dtypes: tuple[type[np.generic], ...], ndim: int) -> None:
    """Raise DtypeError or ShapeError naming the array."""
    if not isinstance(array, np.ndarray):
        raise DtypeError(f"{name} is a {type(array).__name__}, must be a numpy array")
    if array.dtype not in [np.dtype(dtype) for dtype in dtypes]:
        wanted = " or ".join(dtype.__name__ for dtype in dtypes)
        raise DtypeError(f"{name} has dtype {array.dtype}, must be {wanted}")
    if array.ndim != ndim or 0 in array.shape:
        raise ShapeError(f"{name} has shape {array.shape}, must have {ndim} dimensions, none 0")


def check_shape(name: str, array: Array, shape: tuple[int, ...]) -> None:
    """Raise ShapeError naming the array."""
    if array.shape != shape:
        raise ShapeError(f"{name} has shape {array.shape}, must be {shape}")


def _is_finite(values: npt.NDArray[Any]) -> bool:
    """Whether no element is NaN or infinite; of halves by their bits, which is faster by far."""
    if values.dtype != np.float16:
        return bool(np.isfinite(values).all())
    positive, negative = values.view(np.int16), values.view(np.uint16)
    return bool(positive.max() < _INFINITY and negative.max() < _MINUS_INFINITY)
