"""A whole decoder step as one native call: paged KV cache, any packed matrices, any mix of chunks.

Checks arrays by name, keeps them alive, and releases the GIL for the whole step. Knows numpy only:
no checkpoint, no tokens' text. Conventions and the order of operations are in vqdecoder.h.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import weakref
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from vqkernels.closing import Closing
from vqkernels.errors import (
    DtypeError,
    NativeCallError,
    ShapeError,
)
from vqkernels.loader import Signatures, check_status, declare, load_library
from vqkernels.pool import ThreadPool

KV_BLOCK: Final = 16
PHASES: Final = (
    "embedding",
    "qkv",
    "cache",
    "attention",
    "output",
    "gate_up",
    "down",
    "head",
)
_STATUS_RANGE: Final = 16
_MAX_PARTS: Final = 3
_EMBEDDING_TYPES: Final = {"float32": 0, "float16": 1, "uint16": 2, "int8": 3}
_PTR: Final = ctypes.c_void_p
_SIGNATURES: Final[Signatures] = {
    "vq_decoder_create": (ctypes.c_int32, (_PTR, _PTR, _PTR)),
    "vq_decoder_free": (None, (_PTR,)),
    "vq_decoder_step": (ctypes.c_int32, (_PTR, _PTR, _PTR)),
    "vq_decoder_copy_page": (ctypes.c_int32, (_PTR, ctypes.c_int32, ctypes.c_int32)),
    "vq_decoder_page_bytes": (ctypes.c_int64, (_PTR,)),
    "vq_decoder_take_profile": (ctypes.c_int32, (_PTR, _PTR)),
    "vq_read_all": (ctypes.c_int32, (_PTR, ctypes.c_int64, _PTR, _PTR)),
}
_FLOATS: Final = np.dtype(np.float32)

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.int8]


class MatrixHandle(Protocol):
    """What a decoder needs of a packed matrix."""

    @property
    def handle(self) -> int:
        """Address of the ``vq_matrix``, valid as long as this object lives."""
        ...

    @property
    def nbytes(self) -> int:
        """Packed size."""
        ...


class RotationStruct(ctypes.Structure):
    """``vq_rotation`` of vqdecoder.h."""

    _fields_ = (
        ("size", ctypes.c_int32),
        ("order", ctypes.c_int32),
        ("power", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("signs", ctypes.c_void_p),
        ("base", ctypes.c_void_p),
    )


class ProjectionStruct(ctypes.Structure):
    """``vq_projection`` of vqdecoder.h."""

    _fields_ = (("parts", ctypes.c_void_p * _MAX_PARTS),)


class LayerStruct(ctypes.Structure):
    """``vq_decoder_layer`` of vqdecoder.h."""

    _fields_ = (
        ("input_norm", ctypes.c_void_p),
        ("post_attention_norm", ctypes.c_void_p),
        ("qkv", ProjectionStruct),
        ("output", ProjectionStruct),
        ("gate_up", ProjectionStruct),
        ("down", ProjectionStruct),
        ("sliding_window", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    )


class ConfigStruct(ctypes.Structure):
    """``vq_decoder_config`` of vqdecoder.h."""

    _fields_ = (
        ("vocab_size", ctypes.c_int32),
        ("hidden_size", ctypes.c_int32),
        ("intermediate_size", ctypes.c_int32),
        ("num_layers", ctypes.c_int32),
        ("num_heads", ctypes.c_int32),
        ("num_kv_heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("num_positions", ctypes.c_int32),
        ("page_size", ctypes.c_int32),
        ("num_pages", ctypes.c_int32),
        ("kv_bits", ctypes.c_int32),
        ("max_rows", ctypes.c_int32),
        ("num_threads", ctypes.c_int32),
        ("exact", ctypes.c_int32),
        ("rms_norm_eps", ctypes.c_float),
    )


class WeightsStruct(ctypes.Structure):
    """``vq_decoder_weights`` of vqdecoder.h."""

    _fields_ = (
        ("layers", ctypes.POINTER(LayerStruct)),
        ("final_norm", ctypes.c_void_p),
        ("embedding", ctypes.c_void_p),
        ("embedding_scales", ctypes.c_void_p),
        ("head", ctypes.c_void_p),
        ("cosines", ctypes.c_void_p),
        ("sines", ctypes.c_void_p),
        ("residual", RotationStruct),
        ("down", RotationStruct),
        ("embedding_type", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    )


class BatchStruct(ctypes.Structure):
    """``vq_decode_batch`` of vqdecoder.h."""

    _fields_ = (
        ("num_chunks", ctypes.c_int32),
        ("num_logit_rows", ctypes.c_int32),
        ("token_ids", ctypes.c_void_p),
        ("token_offsets", ctypes.c_void_p),
        ("pages", ctypes.c_void_p),
        ("page_offsets", ctypes.c_void_p),
        ("starts", ctypes.c_void_p),
        ("num_logits", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
        ("largest_of", ctypes.c_void_p),
    )


class ProfileStruct(ctypes.Structure):
    """``vq_decoder_profile`` of vqdecoder.h."""

    _fields_ = (("steps", ctypes.c_int64), ("nanoseconds", ctypes.c_int64 * len(PHASES)))


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a decoder and of its cache.

    Attributes:
        num_positions: the longest sequence.
        page_size: positions per page, a multiple of 16.
        kv_bits: 16 (halves), 8 or 4 bits per cached number.
        max_rows: tokens computed together; longer chunks go in several passes.
        num_threads: the largest pool that a step may get.
        exact: float32 activations, and weights as the checkpoint means them; slow.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_positions: int
    num_pages: int
    rms_norm_eps: float
    page_size: int = 16
    kv_bits: int = 16
    max_rows: int = 128
    num_threads: int = 1
    exact: bool = False

    def to_struct(self) -> ConfigStruct:
        names = [name for name, *_ in ConfigStruct._fields_]
        return ConfigStruct(**{name: getattr(self, name) for name in names})


@dataclass(frozen=True, eq=False)
class Rotation:
    """R = diag(signs) (I kron base kron H_2^power) / sqrt(order 2^power) on vectors of len(signs).

    Attributes:
        signs: int8 (n,), +-1.
        base: int8 (order, order), +-1; the factor of x[a] in output c is base[a, c].
        power: H_2^power is Sylvester's matrix.
    """

    signs: Bytes
    base: Bytes
    power: int


@dataclass(frozen=True, eq=False)
class DecoderLayer:
    """One block.

    Attributes:
        input_norm, post_attention_norm: float32 (hidden_size,).
        qkv: one to three matrices whose outputs, in order, are all queries, keys and values.
        output: the projection of the heads.
        gate_up: one or two matrices, gates before ups.
        down: the projection of their product.
        sliding_window: positions that a position sees, itself included; 0 is all.
    """

    input_norm: Floats
    post_attention_norm: Floats
    qkv: Sequence[MatrixHandle]
    output: MatrixHandle
    gate_up: Sequence[MatrixHandle]
    down: MatrixHandle
    sliding_window: int = 0


@dataclass(frozen=True, eq=False)
class DecoderWeights:
    """All weights of a decoder.

    Attributes:
        final_norm: float32 (hidden_size,).
        embedding: (vocab_size, hidden_size) float32, float16, uint16 for bfloat16 halves, or
            int8 codes.
        embedding_scales: float32 (vocab_size,), a factor per row of int8 codes; else None.
        head: matrix of the logits.
        cosines, sines: float32 (num_positions, head_dim / 2).
        residual: rotation of the hidden state after the look-up, undone before the final norm.
        down: rotation of the input of `down`.
    """

    layers: Sequence[DecoderLayer]
    final_norm: Floats
    embedding: npt.NDArray[Any]
    head: MatrixHandle
    cosines: Floats
    sines: Floats
    residual: Rotation | None = None
    down: Rotation | None = None
    embedding_scales: Floats | None = None


class DecodeChunk(Protocol):
    """New tokens of one sequence."""

    @property
    def pages(self) -> Sequence[int]:
        """The sequence's page table, up to the last new token."""
        ...

    @property
    def start(self) -> int:
        """Position of the first new token."""
        ...

    @property
    def token_ids(self) -> Sequence[int]:
        """The new tokens, at least one."""
        ...

    @property
    def num_logits(self) -> int:
        """After how many of the last tokens logits are wanted."""
        ...

    @property
    def largest_of(self) -> int:
        """n > 0: only the largest of every token's first n logits is wanted, as exact as ever, and
        no other of them above it. With a head of `LayeredWeights` the others may then come from the
        upper four bits of their weights; the largest is among those with a probability of 3e-7."""
        ...


class DecodeBatch:
    """Chunks of sequences as ``vq_decode_batch`` wants them.

    All its numbers lie in one array: making seven of numpy's takes longer than a draw of a token.

    Attributes:
        num_logits: of all chunks.

    Raises:
        OverflowError: a number does not fit into 32 bits.
    """

    def __init__(self, chunks: Sequence[DecodeChunk]) -> None:
        tokens: list[int] = []
        pages: list[int] = []
        token_offsets, page_offsets = [0], [0]
        for chunk in chunks:
            tokens += chunk.token_ids
            token_offsets.append(len(tokens))
            pages += chunk.pages
            page_offsets.append(len(pages))
        wanted = [chunk.num_logits for chunk in chunks]
        self.num_logits = sum(wanted)
        self._num_chunks = len(chunks)
        starts = [chunk.start for chunk in chunks]
        largest_of = [chunk.largest_of for chunk in chunks]
        runs = tokens, token_offsets, pages, page_offsets, starts, wanted, largest_of
        self._lengths = [len(run) for run in runs]
        self._values = array("i", itertools.chain(*runs))

    def to_struct(self, logits: int) -> BatchStruct:
        """For the native call, which writes to the address `logits`; valid while this lives."""
        begin, _ = self._values.buffer_info()
        begins = itertools.accumulate(self._lengths[:-1], initial=0)
        *addresses, flags = (begin + self._values.itemsize * at for at in begins)
        return BatchStruct(self._num_chunks, self.num_logits, *addresses, logits, flags)


@dataclass(frozen=True)
class DecoderProfile:
    """Time by operation class since the last look.

    Attributes:
        steps: calls of `step`.
        seconds: by name of the operation class, see `PHASES`.
    """

    steps: int
    seconds: dict[str, float]


class Decoder(Closing):
    """A native decoder; `step` runs a batch of chunks.

    One step at a time. Not usable with a pool from before a fork.

    Raises:
        ShapeError, DtypeError: sizes are out of range or do not fit together; names the array.
        NativeUnavailableError: there is no native library.
    """

    def __init__(self, config: DecoderConfig, weights: DecoderWeights) -> None:
        _check_weights(config, weights)
        self._library = _decoder_library()
        self.config = config
        self._keep = weights  # norms are copied, the rest is used where it lies
        structs = _WeightStructs(weights)
        handle = ctypes.c_void_p()
        status = self._library.vq_decoder_create(
            ctypes.byref(config.to_struct()), ctypes.byref(structs.weights), ctypes.byref(handle)
        )
        check_status(status, f"decoder of {config}")
        self._handle: int | None = handle.value
        self._structs = structs
        self._finalizer = weakref.finalize(self, self._library.vq_decoder_free, handle.value)
        self.page_bytes = int(self._library.vq_decoder_page_bytes(handle.value))

    def step(
        self, batch: DecodeBatch, pool: ThreadPool | None = None, out: Floats | None = None
    ) -> Floats:
        """Append every chunk to its sequence; logits (sum of num_logits, vocab_size).

        `out` may be a larger float32 array whose first rows are written and returned.

        Raises:
            ShapeError: a chunk is empty, or the pool is larger than `num_threads`.
            IndexError: a token, position or page does not exist; nothing was computed.
            NonFiniteError: an activation overflowed; the sequences' caches are useless.
        """
        logits = self._logits(batch.num_logits, out)
        struct = batch.to_struct(int(logits.ctypes.data))
        status = self._library.vq_decoder_step(
            self._address, ctypes.byref(struct), None if pool is None else pool.handle
        )
        if status:
            self._fail(status)
        return logits

    def copy_page(self, source: int, target: int) -> None:
        """Copy the keys and values of one page over another's.

        Raises:
            IndexError: a page does not exist.
        """
        status = self._library.vq_decoder_copy_page(self._address, source, target)
        if status:
            self._fail(status)

    def take_profile(self) -> DecoderProfile:
        """Times since the last call; the first call only starts the clock."""
        struct = ProfileStruct()
        check_status(
            self._library.vq_decoder_take_profile(self._address, ctypes.byref(struct)), "profile"
        )
        seconds = {name: 1e-9 * struct.nanoseconds[i] for i, name in enumerate(PHASES)}
        return DecoderProfile(struct.steps, seconds)

    def close(self) -> None:
        """Free cache and scratch. Safe to call twice; no step may be running."""
        self._handle = None
        self._finalizer()

    @property
    def _address(self) -> int:
        if self._handle is None:
            raise NativeCallError("the decoder is closed; create a new one")
        return self._handle

    def _logits(self, rows: int, out: Floats | None) -> Floats:
        if out is None:
            return np.empty((rows, self.config.vocab_size), dtype=np.float32)
        if out.ndim != 2 or out.shape[0] < rows or out.shape[1] != self.config.vocab_size:
            raise ShapeError(
                f"out has shape {out.shape}, must be (at least {rows}, {self.config.vocab_size})"
            )
        if out.dtype != _FLOATS or not out.flags.c_contiguous or not out.flags.writeable:
            raise DtypeError("out must be float32, C-contiguous and writeable")
        return out[:rows]

    def _fail(self, status: int) -> None:
        if status == _STATUS_RANGE:
            raise IndexError(
                f"a token, position or page lies outside the decoder's {self.config.vocab_size} "
                f"tokens, {self.config.num_positions} positions or {self.config.num_pages} pages"
            )
        check_status(status, "decoder step")


def read_all(data: npt.NDArray[np.uint8], pool: ThreadPool | None = None) -> float:
    """Read a 64-byte aligned array once, as fast as the tier can: what weights can stream at.

    Raises:
        ShapeError: the length is no multiple of 64, or the array is not aligned.
    """
    if data.size % 64 or data.ctypes.data % 64 or not data.flags.c_contiguous:
        raise ShapeError("data must be contiguous, 64-byte aligned and a multiple of 64 bytes")
    checksum = ctypes.c_float()
    status = _decoder_library().vq_read_all(
        data.ctypes.data, data.size, None if pool is None else pool.handle, ctypes.byref(checksum)
    )
    check_status(status, "read_all")
    return checksum.value


@functools.cache
def _decoder_library() -> ctypes.CDLL:
    library = load_library()
    declare(library, _SIGNATURES)
    return library


class _WeightStructs:
    """``vq_decoder_weights`` and the arrays of structs behind it."""

    def __init__(self, weights: DecoderWeights) -> None:
        self.layers = (LayerStruct * len(weights.layers))(*map(_layer_struct, weights.layers))
        self.weights = WeightsStruct(
            self.layers,
            _address(weights.final_norm),
            _address(weights.embedding),
            _address(weights.embedding_scales),
            weights.head.handle,
            _address(weights.cosines),
            _address(weights.sines),
            _rotation_struct(weights.residual),
            _rotation_struct(weights.down),
            _EMBEDDING_TYPES[weights.embedding.dtype.name],
            0,
        )


def _layer_struct(layer: DecoderLayer) -> LayerStruct:
    return LayerStruct(
        _address(layer.input_norm),
        _address(layer.post_attention_norm),
        _projection_struct(layer.qkv),
        _projection_struct([layer.output]),
        _projection_struct(layer.gate_up),
        _projection_struct([layer.down]),
        layer.sliding_window,
        0,
    )


def _projection_struct(matrices: Sequence[MatrixHandle]) -> ProjectionStruct:
    if not 1 <= len(matrices) <= _MAX_PARTS:
        raise ShapeError(f"{len(matrices)} matrices share an input, must be 1..{_MAX_PARTS}")
    handles = [matrix.handle for matrix in matrices]
    return ProjectionStruct((ctypes.c_void_p * _MAX_PARTS)(*handles))


def _rotation_struct(rotation: Rotation | None) -> RotationStruct:
    if rotation is None:
        return RotationStruct()
    return RotationStruct(
        rotation.signs.size,
        rotation.base.shape[0],
        rotation.power,
        0,
        _address(rotation.signs),
        _address(rotation.base),
    )


def _check_weights(config: DecoderConfig, weights: DecoderWeights) -> None:
    hidden, half = config.hidden_size, config.head_dim // 2
    if len(weights.layers) != config.num_layers:
        raise ShapeError(f"{len(weights.layers)} layers given, the config has {config.num_layers}")
    _check_vector("final_norm", weights.final_norm, _FLOATS, hidden)
    _check_embedding(config, weights)
    for name in ("cosines", "sines"):
        table = getattr(weights, name)
        _check_table(name, table, (config.num_positions, half))
        if table.dtype != _FLOATS:
            raise DtypeError(f"{name} has dtype {table.dtype}, must be float32")
    for rotation in (weights.residual, weights.down):
        _check_rotation(rotation)
    for layer in weights.layers:
        _check_layer(config, layer)


def _check_embedding(config: DecoderConfig, weights: DecoderWeights) -> None:
    table, scales = weights.embedding, weights.embedding_scales
    if table.dtype.name not in _EMBEDDING_TYPES:
        raise DtypeError(
            f"embedding has dtype {table.dtype}, must be one of {', '.join(_EMBEDDING_TYPES)}"
        )
    _check_table("embedding", table, (config.vocab_size, config.hidden_size))
    if (table.dtype.name == "int8") != (scales is not None):
        raise DtypeError("embedding_scales belong to an embedding of int8 codes, and to no other")
    if scales is not None:
        _check_vector("embedding_scales", scales, _FLOATS, config.vocab_size)


def _check_layer(config: DecoderConfig, layer: DecoderLayer) -> None:
    _check_vector("input_norm", layer.input_norm, _FLOATS, config.hidden_size)
    _check_vector("post_attention_norm", layer.post_attention_norm, _FLOATS, config.hidden_size)


def _check_rotation(rotation: Rotation | None) -> None:
    if rotation is None:
        return
    _check_vector("signs", rotation.signs, np.dtype(np.int8), None)
    base = rotation.base
    if base.dtype != np.dtype(np.int8) or base.ndim != 2 or base.shape[0] != base.shape[1]:
        raise ShapeError(f"base is {base.dtype} {base.shape}, must be int8 and square")
    _check_table("base", base, (base.shape[0], base.shape[1]))


def _check_vector(
    name: str, values: npt.NDArray[Any], dtype: np.dtype[Any], size: int | None
) -> None:
    if not isinstance(values, np.ndarray) or values.dtype != dtype:
        found = getattr(values, "dtype", type(values).__name__)
        raise DtypeError(f"{name} is {found}, must be a numpy array of {dtype}")
    if values.ndim != 1 or size not in (None, values.size) or not values.flags.c_contiguous:
        raise ShapeError(f"{name} has shape {values.shape}, must be ({size},) and contiguous")


def _check_table(name: str, table: npt.NDArray[Any], shape: tuple[int, int]) -> None:
    if table.shape != shape or not table.flags.c_contiguous:
        raise ShapeError(f"{name} has shape {table.shape}, must be {shape} and contiguous")


def _address(array: npt.NDArray[Any] | None) -> int | None:
    return None if array is None else int(array.ctypes.data)
