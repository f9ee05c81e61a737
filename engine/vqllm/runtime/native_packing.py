"""Packs the matrices of a checkpoint for the native library, several at a time, in huge pages.

Knows where packed bytes lie; what a linear looks like is `native_weights`.
"""

from __future__ import annotations

import mmap
import threading
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from vqkernels.closing import Closing
from vqkernels.matrix import Matrix, aligned_empty, packed_size
from vqkernels.matrix_weights import LayeredWeights, Transform, Weights
from vqllm.checkpoint import HEAD, Checkpoint
from vqllm.runtime.native_weights import packable

BLOCK_BYTES = 32 << 20


class Arena:
    """Memory for packed matrices, taken from the system in large blocks of huge pages.

    Safe to use from several threads. A block lives as long as any array in it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rest = np.empty(0, dtype=np.uint8)

    def take(self, num_bytes: int) -> NDArray[np.uint8]:
        """Bytes on a 64-byte border; `num_bytes` is a multiple of 64."""
        with self._lock:
            if num_bytes > self._rest.size:
                self._rest = _huge_block(max(num_bytes, BLOCK_BYTES))
            taken, self._rest = self._rest[:num_bytes], self._rest[num_bytes:]
        return taken


def _huge_block(num_bytes: int) -> NDArray[np.uint8]:
    if not hasattr(mmap, "MADV_HUGEPAGE"):  # not Linux
        return aligned_empty(num_bytes)
    # Private: shared memory gets huge pages only where the system is set up for it.
    block = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    block.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(block, dtype=np.uint8)


class MatrixPacker(Closing):
    """Packs linears by name on threads of its own; use as a context manager.

    The errors of `native_weights.packable` come out of the futures.
    """

    def __init__(self, checkpoint: Checkpoint, num_threads: int) -> None:
        self._checkpoint = checkpoint
        self._arena = Arena()
        self._threads = ThreadPoolExecutor(num_threads, "pack")

    def pack(self, name: str) -> Future[Matrix]:
        """The linear `name`."""
        return self._threads.submit(self._pack, name)

    def pack_head(self, name: str) -> Future[Matrix]:
        """The table `name` (vocab, d) as an output head of 8 bits, one scale per row."""
        return self._threads.submit(self._pack_head, name)

    def close(self) -> None:
        """End the threads; what has not begun is never packed."""
        self._threads.shutdown(cancel_futures=True)

    def _pack(self, name: str) -> Matrix:
        return self._place(*packable(self._checkpoint, name))

    def _pack_head(self, name: str) -> Matrix:
        store, coded = self._checkpoint.store, self._checkpoint.embedding_codes(name)
        if coded is not None:
            codes, scales = coded
            return self._place(LayeredWeights(codes, scales.astype(np.float16)))
        if name in store and store.dtype(name) == "F16":
            return self._place(LayeredWeights(store.raw(name)))
        is_untied = name == HEAD
        table = self._checkpoint.head() if is_untied else self._checkpoint.embedding()
        return self._place(LayeredWeights(table))

    def _place(self, weights: Weights, transform: Transform | None = None) -> Matrix:
        return Matrix(weights, transform, self._arena.take(packed_size(weights)))
