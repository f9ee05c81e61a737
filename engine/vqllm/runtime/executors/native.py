"""The native executor: a whole decoder step in one call of our C library, over a paged KV cache.

Weights stay packed, activations are int8, and the output head has 8 bits. Runs the llama family:
llama, mistral, qwen2 and what is built like them. Knows nothing of requests, sampling or text.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vqkernels import ThreadPool, native_status
from vqkernels.decoder import (
    KV_BLOCK,
    DecodeBatch,
    Decoder,
    DecoderConfig,
    DecoderLayer,
    DecoderProfile,
    DecoderWeights,
    Rotation,
)
from vqkernels.matrix import Matrix
from vqllm.checkpoint import EMBEDDING, FINAL_NORM, HEAD, Checkpoint
from vqllm.errors import CorruptCheckpoint, ExecutorUnavailable, InvalidConfig, UnsupportedModel
from vqllm.model_config import LlamaConfig
from vqllm.runtime.executors.base import Executor, Logits
from vqllm.runtime.executors.paged import Chunk, PagedExecutor
from vqllm.runtime.native_packing import MatrixPacker

Floats = NDArray[np.float32]

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
OUTPUT = "self_attn.o_proj"
MLP = ("mlp.gate_proj", "mlp.up_proj")
DOWN = "mlp.down_proj"
SCORE_ROWS = 128  # logits that `score` asks for at a time


@dataclass(frozen=True)
class NativeOptions:
    """How the native executor computes.

    Attributes:
        kv_bits: 16 (halves), 8 or 4 bits per cached number.
        page_size: positions per page, a multiple of 16.
        max_rows: tokens computed together.
        num_pages: pages of the cache; None is room for all sequences at full length.
        is_exact: float32 activations and the weights as stored, for comparisons; very slow.

    Raises:
        InvalidConfig: a value is outside its range.
    """

    kv_bits: int = 16
    page_size: int = KV_BLOCK
    max_rows: int = 128
    num_pages: int | None = None
    is_exact: bool = False

    def __post_init__(self) -> None:
        if self.kv_bits not in (4, 8, 16):
            raise InvalidConfig("kv_bits", self.kv_bits, "4, 8 or 16")
        if self.page_size < KV_BLOCK or self.page_size % KV_BLOCK:
            raise InvalidConfig("page_size", self.page_size, f"a multiple of {KV_BLOCK}")
        if not 1 <= self.max_rows <= 4096:
            raise InvalidConfig("max_rows", self.max_rows, "1 to 4096")
        if self.num_pages is not None and self.num_pages < 1:
            raise InvalidConfig("num_pages", self.num_pages, "at least 1")


class _Limits(NamedTuple):
    num_positions: int
    num_pages: int
    num_threads: int


class NativeExecutor(Executor, PagedExecutor):
    """Runs quantized checkpoints on the native library's best instruction-set tier.

    Attributes:
        num_threads: that share a step.
        weight_bytes: packed weights that one token reads.
        spared_bytes: of them, what is read only in part where the largest logit is all that a
            step of one token wants: the lower four bits of the output head.

    Either a scheduler owns the pages and calls `step`, or a caller uses `allocate`, `prefill` and
    `decode`, which keep every sequence on pages of its own; not both at once.
    """

    name = "native"

    def __init__(
        self,
        checkpoint: Checkpoint,
        context_length: int,
        max_num_sequences: int = 8,
        num_threads: int = 0,
        options: NativeOptions | None = None,
    ) -> None:
        """`num_threads`: 0 is one per core that this process may use.

        Raises:
            ExecutorUnavailable: there is no native library; the message says why.
            UnsupportedModel: an architecture or a format that no kernel has; names it.
            CorruptCheckpoint: a tensor is missing, misshapen or not finite.
        """
        self._isa = _require_library()
        check_supported(checkpoint.config)
        options = options or NativeOptions()
        num_threads = num_threads or len(os.sched_getaffinity(0))
        self.vocab_size = checkpoint.config.vocab_size
        self.context_length = context_length
        self.max_num_sequences = max_num_sequences
        self.page_size = options.page_size
        self._pages_per_sequence = -(-context_length // options.page_size)
        self.num_pages = options.num_pages or max_num_sequences * self._pages_per_sequence
        limits = _Limits(context_length, self.num_pages, num_threads)
        self._pool = ThreadPool(num_threads) if num_threads > 1 else None
        self.num_threads = num_threads
        weights = _load_weights(checkpoint, context_length, num_threads)
        self.weight_bytes = _packed_bytes(weights)
        half_of_head = checkpoint.config.vocab_size * checkpoint.config.hidden_size // 2
        self.spared_bytes = 0 if options.is_exact else half_of_head
        self._decoder = Decoder(_decoder_config(checkpoint.config, limits, options), weights)
        checkpoint.store.release()  # all but the embedding is packed by now
        self._logits = np.empty((max_num_sequences, self.vocab_size), dtype=np.float32)
        self._lengths: dict[int, int] = {}

    @property
    def providers(self) -> tuple[str, ...]:
        return (f"vqkernels {self._isa}", f"{self.num_threads} threads")

    # ---- pages ----

    def step(self, chunks: Sequence[Chunk]) -> Logits:
        """Raises IndexError: a token, position or page does not exist; nothing was computed."""
        batch = DecodeBatch(chunks)
        out = self._logits if batch.num_logits <= len(self._logits) else None
        return self._decoder.step(batch, self._pool, out)

    def copy_page(self, source: int, target: int) -> None:
        """Copy one page's keys and values over another's, for copy on write."""
        self._decoder.copy_page(source, target)

    @property
    def page_bytes(self) -> int:
        """Memory of one page, all layers."""
        return self._decoder.page_bytes

    @property
    def token_bytes(self) -> int:
        """Cached keys and values of one position, all layers."""
        return self._decoder.page_bytes // self.page_size

    def take_profile(self) -> DecoderProfile:
        """Time per operation class since the last call; the first call starts the clock."""
        return self._decoder.take_profile()

    # ---- one cache per sequence ----

    def allocate(self) -> int:
        free = set(range(self.num_pages // self._pages_per_sequence)) - self._lengths.keys()
        if not free or len(self._lengths) == self.max_num_sequences:
            raise RuntimeError(f"all {len(self._lengths)} KV caches are taken")
        cache = min(free)
        self._lengths[cache] = 0
        return cache

    def free(self, cache: int) -> None:
        del self._lengths[cache]

    def prefill(self, cache: int, token_ids: Sequence[int]) -> Logits:
        logits: Logits = self._append([cache], [token_ids], 1)[0].copy()
        return logits

    def decode(self, caches: Sequence[int], token_ids: Sequence[int]) -> Logits:
        return self._append(caches, [[token_id] for token_id in token_ids], 1).copy()

    def score(self, token_ids: Sequence[int]) -> Logits:
        cache = self.allocate()
        parts = [token_ids[i : i + SCORE_ROWS] for i in range(0, len(token_ids), SCORE_ROWS)]
        rows = [self._append([cache], [part], len(part)).copy() for part in parts]
        self.free(cache)
        return np.concatenate(rows)

    def _append(
        self, caches: Sequence[int], tokens: Sequence[Sequence[int]], num_logits: int
    ) -> Logits:
        chunks = []
        for cache, token_ids in zip(caches, tokens, strict=True):
            first = cache * self._pages_per_sequence
            pages = range(first, first + self._pages_per_sequence)
            chunks.append(Chunk(pages, self._lengths[cache], token_ids, num_logits))
        logits = self.step(chunks)
        for cache, token_ids in zip(caches, tokens, strict=True):
            self._lengths[cache] += len(token_ids)
        return logits


def check_supported(config: LlamaConfig) -> None:
    """Raise UnsupportedModel unless the native step computes this architecture."""
    missing = {
        "latent attention": config.mla is not None,
        "experts": config.moe is not None,
        "interleaved rotary pairs": config.rope.interleaved,
        f"head_dim {config.head_dim}": config.head_dim % 2 != 0,
    }
    found = [feature for feature, is_needed in missing.items() if is_needed]
    if found:
        raise UnsupportedModel(
            f"the native executor has no {', '.join(found)} ({config.architecture}); "
            "use the executor torch"
        )


def _require_library() -> str:
    """Name of the tier in use. Raises ExecutorUnavailable."""
    status = native_status()
    if not status.available:
        raise ExecutorUnavailable(
            f"executor 'native' has no native library: {status.reason}; "
            f"use one of {', '.join(status.executors)}"
        )
    return status.isa


def _decoder_config(config: LlamaConfig, limits: _Limits, options: NativeOptions) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        num_positions=limits.num_positions,
        num_pages=limits.num_pages,
        rms_norm_eps=config.rms_norm_eps,
        page_size=options.page_size,
        kv_bits=options.kv_bits,
        max_rows=options.max_rows,
        num_threads=limits.num_threads,
        exact=options.is_exact,
    )


def _load_weights(checkpoint: Checkpoint, context_length: int, num_threads: int) -> DecoderWeights:
    config = checkpoint.config
    cosines, sines = _rotary_table(config, context_length)
    embedding, scales = _embedding(checkpoint)
    seeds = checkpoint.quantization.transform if checkpoint.quantization is not None else {}
    with MatrixPacker(checkpoint, num_threads) as packer:
        head = packer.pack_head(EMBEDDING if config.tie_word_embeddings else HEAD)
        linears = {name: packer.pack(name) for name in config.linear_names()}
        return DecoderWeights(
            layers=[_load_layer(checkpoint, layer, linears) for layer in range(config.num_layers)],
            final_norm=checkpoint.norm(FINAL_NORM),
            embedding=embedding,
            embedding_scales=scales,
            head=head.result(),
            cosines=cosines,
            sines=sines,
            residual=_rotation(config.hidden_size, seeds.get("residual_seed")),
            down=_rotation(config.intermediate_size, seeds.get("down_seed")),
        )


def _packed_bytes(weights: DecoderWeights) -> int:
    """What one token reads of the packed matrices."""
    matrices = [weights.head]
    for layer in weights.layers:
        matrices += [*layer.qkv, layer.output, *layer.gate_up, layer.down]
    return sum(matrix.nbytes for matrix in matrices)


def _load_layer(
    checkpoint: Checkpoint, layer: int, linears: dict[str, Future[Matrix]]
) -> DecoderLayer:
    prefix, config = f"model.layers.{layer}", checkpoint.config

    def matrix(part: str) -> Matrix:
        return linears[f"{prefix}.{part}"].result()

    return DecoderLayer(
        input_norm=checkpoint.norm(f"{prefix}.input_layernorm.weight"),
        post_attention_norm=checkpoint.norm(f"{prefix}.post_attention_layernorm.weight"),
        qkv=[matrix(part) for part in ATTENTION],
        output=matrix(OUTPUT),
        gate_up=[matrix(part) for part in MLP],
        down=matrix(DOWN),
        sliding_window=config.window(layer) or 0,
    )


def _embedding(checkpoint: Checkpoint) -> tuple[NDArray[np.generic], Floats | None]:
    """The table as it lies in the file, and the scales of its rows where it holds 8-bit codes."""
    store, coded = checkpoint.store, checkpoint.embedding_codes()
    if coded is not None:
        return coded
    if store.dtype(EMBEDDING) not in ("F32", "F16", "BF16"):
        return checkpoint.embedding(), None
    table = store.raw(EMBEDDING)
    shape = (checkpoint.config.vocab_size, checkpoint.config.hidden_size)
    if table.shape != shape:
        raise CorruptCheckpoint(
            f"{checkpoint.folder}: {EMBEDDING} has shape {table.shape}, config.json implies {shape}"
        )
    is_aligned = table.ctypes.data % table.itemsize == 0
    return (table if is_aligned else table.copy()), None


def _rotary_table(config: LlamaConfig, num_positions: int) -> tuple[Floats, Floats]:
    """Cosines and sines, each (num_positions, head_dim / 2)."""
    if config.rope.kind == "default":
        exponents = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
        angles = np.outer(np.arange(num_positions), config.rope.theta**-exponents)
        return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    from vqllm.decoder.rope import RotaryTable  # imports torch, which plain models do not need

    table = RotaryTable.build(config, num_positions)
    return table.cos.numpy(), table.sin.numpy()


def _rotation(size: int, seed: int | None) -> Rotation | None:
    if seed is None:
        return None
    from vqllm.outlier.hadamard import hadamard_matrix
    from vqllm.outlier.transform import rotation  # imports torch

    found = rotation(size, seed)
    base = np.ascontiguousarray(hadamard_matrix(found.order))
    return Rotation(found.signs, base, found.power)
