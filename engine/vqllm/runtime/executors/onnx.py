"""Runs a model in ONNX Runtime, with a KV cache that lives in place for the whole generation.

The caches of all sequences are rows of one preallocated array per layer and the running ones fill
its first rows without gaps, so that a batched decode step is one call on a contiguous slice and
copies nothing. Pages of memory are touched only as sequences grow.
"""

from __future__ import annotations

import errno
import importlib.metadata
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from platformdirs import user_cache_path

from vqllm.checkpoint import Checkpoint
from vqllm.errors import ExecutorUnavailable
from vqllm.export.onnx_graph import GraphOptions, cache_names, export_onnx
from vqllm.model_config import LlamaConfig
from vqllm.runtime.executors.base import Executor, Logits
from vqllm.runtime.executors.support import refuse_beyond

PREFILL_CHUNK = 512  # tokens per call, which bounds the attention scores held at once
_GRAPH_FILE = "model.onnx"
_DISTRIBUTIONS = ("onnxruntime", "onnxruntime-gpu")


def check_onnxruntime_distribution() -> str:
    """The one installed ONNX Runtime distribution, for example `onnxruntime`.

    Raises:
        ExecutorUnavailable: none is installed, or both: they share their files, so that the one
            installed last silently wins.
    """
    installed = [name for name in _DISTRIBUTIONS if _is_installed(name)]
    if len(installed) > 1:
        raise ExecutorUnavailable(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other: "
            "uninstall both, then install vqstack[cpu] or vqstack[gpu]"
        )
    if not installed:
        raise ExecutorUnavailable(
            "ONNX Runtime is not installed: install vqstack[cpu], or vqstack[gpu] for CUDA"
        )
    return installed[0]


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


class OnnxExecutor(Executor):
    """ONNX Runtime on the CPU."""

    name = "onnx"

    def __init__(
        self,
        checkpoint: Checkpoint,
        context_length: int,
        max_num_sequences: int = 8,
        num_threads: int = 0,
        options: GraphOptions | None = None,
    ) -> None:
        """Build the graph, or take it from the cache, and reserve the KV cache.

        Raises:
            ExecutorUnavailable: see `check_onnxruntime_distribution`.
            UnsupportedModel, CorruptCheckpoint: the checkpoint cannot be exported.
        """
        check_onnxruntime_distribution()
        refuse_beyond(checkpoint, self.name)
        config = checkpoint.config
        path = cached_graph(checkpoint, options or GraphOptions())
        self.vocab_size = config.vocab_size
        self.context_length = context_length
        self.max_num_sequences = max_num_sequences
        self._session = _open_session(path, num_threads)
        self._caches = _CacheRows(config, max_num_sequences, context_length)
        self._bindings: dict[int, _Call] = {}

    @property
    def providers(self) -> tuple[str, ...]:
        return tuple(self._session.get_providers())

    def allocate(self) -> int:
        return self._caches.allocate()

    def free(self, cache: int) -> None:
        self._caches.free(cache)

    def prefill(self, cache: int, token_ids: Sequence[int]) -> Logits:
        last: Logits = np.empty(0, dtype=np.float32)
        for start in range(0, len(token_ids), PREFILL_CHUNK):
            chunk = token_ids[start : start + PREFILL_CHUNK]
            last = self._append(cache, chunk, [len(chunk) - 1])[0]
        return last

    def score(self, token_ids: Sequence[int]) -> Logits:
        cache = self.allocate()
        chunks = []
        for start in range(0, len(token_ids), PREFILL_CHUNK):
            chunk = token_ids[start : start + PREFILL_CHUNK]
            chunks.append(self._append(cache, chunk, range(len(chunk))))
        self.free(cache)
        return np.concatenate(chunks)

    def decode(self, caches: Sequence[int], token_ids: Sequence[int]) -> Logits:
        rows = [self._caches.row(cache) for cache in caches]
        order = np.argsort(rows)
        logits = np.empty((len(rows), self.vocab_size), dtype=np.float32)
        for run in _contiguous_runs([rows[i] for i in order]):
            members = order[run.start : run.stop]
            first_row = rows[members[0]]
            logits[members] = self._decode_rows(first_row, [token_ids[i] for i in members])
        return logits

    def _append(self, cache: int, token_ids: Sequence[int], rows: Sequence[int]) -> Logits:
        row = self._caches.row(cache)
        call = _Call(self._session, self._caches, row, (1, len(token_ids)), len(rows))
        return call.run([token_ids], rows)

    def _decode_rows(self, first_row: int, token_ids: list[int]) -> Logits:
        """One decode step of neighbouring rows."""
        if len(token_ids) > 1 or not self._caches.has_room(first_row + 1):
            return self._run_rows(first_row, token_ids)
        # MatMulNBits rounds a lone row differently (KL 0.009) than a row of any larger batch, and
        # those bit for bit alike. So a lone row gets company, whose token is then forgotten: an
        # answer must not depend on who else is being served. It costs a lone sequence a fifth.
        logits = self._run_rows(first_row, [*token_ids, 0])
        self._caches.lengths[first_row + 1] -= 1
        return logits[:1]

    def _run_rows(self, first_row: int, token_ids: list[int]) -> Logits:
        """Append one token per row; bound buffers of the usual case, rows from 0 on, are kept."""
        count = len(token_ids)
        call = self._bindings.get(count) if first_row == 0 else None
        if call is None:
            call = _Call(self._session, self._caches, first_row, (count, 1), count)
            if first_row == 0:
                self._bindings[count] = call
        return call.run([[token_id] for token_id in token_ids], range(count))


class _CacheRows:
    """KV memory: arrays (rows, kv_heads, context_length, head_dim), two per layer.

    Used rows are always the first ones; freeing moves the last of them into the gap. One row more
    than there may be sequences keeps company to a lone one.
    """

    def __init__(self, config: LlamaConfig, max_num_sequences: int, context_length: int) -> None:
        shape = (max_num_sequences + 1, config.num_kv_heads, context_length, config.head_dim)
        self.arrays = [np.zeros(shape, dtype=np.float32) for _ in range(2 * config.num_layers)]
        self.lengths = np.zeros(max_num_sequences + 1, dtype=np.int64)
        self._row_of: dict[int, int] = {}
        self._next_cache = 0

    def allocate(self) -> int:
        row = len(self._row_of)
        if row == len(self.lengths) - 1:
            raise RuntimeError(f"all {row} KV caches are taken")
        cache, self._next_cache = self._next_cache, self._next_cache + 1
        self._row_of[cache] = row
        self.lengths[row] = 0
        return cache

    def row(self, cache: int) -> int:
        return self._row_of[cache]

    def has_room(self, row: int) -> bool:
        """Whether one more token fits into a row, be it in use or not."""
        return bool(self.lengths[row] < self.arrays[0].shape[2])

    def free(self, cache: int) -> None:
        gap = self._row_of.pop(cache)
        last = len(self._row_of)
        length, self.lengths[last] = self.lengths[last], 0
        if gap == last:
            return
        for array in self.arrays:
            array[gap, :, :length] = array[last, :, :length]
        self.lengths[gap] = length
        moved = next(other for other, row in self._row_of.items() if row == last)
        self._row_of[moved] = gap


class _Call:
    """Buffers of one call of the graph, bound once; `run` may be repeated."""

    def __init__(
        self,
        session: Any,
        caches: _CacheRows,
        first_row: int,
        shape: tuple[int, int],
        num_logit_rows: int,
    ) -> None:
        self._session = session
        self._caches = caches
        self._rows = slice(first_row, first_row + shape[0])
        self._token_ids = np.zeros(shape, dtype=np.int64)
        self._last_position = np.zeros(shape[0], dtype=np.int32)
        self._total_length = np.zeros((), dtype=np.int32)
        self._logit_rows = np.zeros(num_logit_rows, dtype=np.int64)
        vocab_size = session.get_outputs()[0].shape[1]
        self._logits = np.empty((num_logit_rows, vocab_size), dtype=np.float32)
        self._binding = session.io_binding()
        self._bind()

    def run(self, token_ids: Sequence[Sequence[int]], logit_rows: Sequence[int]) -> Logits:
        """Append tokens (b, s) to the rows' caches; the result is overwritten by the next run."""
        num_new = self._token_ids.shape[1]
        lengths = self._caches.lengths[self._rows] + num_new
        self._token_ids[:] = token_ids
        self._last_position[:] = lengths - 1
        self._total_length[...] = lengths.max()
        self._logit_rows[:] = logit_rows
        self._session.run_with_iobinding(self._binding)
        self._caches.lengths[self._rows] = lengths
        return self._logits

    def _bind(self) -> None:
        inputs: dict[str, NDArray[Any]] = {
            "input_ids": self._token_ids,
            "last_position": self._last_position,
            "total_length": self._total_length,
            "logit_rows": self._logit_rows,
        }
        for name, values in inputs.items():
            self._binding.bind_input(name, *_location(values))
        self._binding.bind_output("logits", *_location(self._logits))
        num_layers = len(self._caches.arrays) // 2
        past, present = cache_names("past", num_layers), cache_names("present", num_layers)
        for array, past_name, present_name in zip(self._caches.arrays, past, present, strict=True):
            location = _location(array[self._rows])
            self._binding.bind_input(past_name, *location)
            self._binding.bind_output(present_name, *location)


def _location(values: NDArray[Any]) -> tuple[str, int, Any, tuple[int, ...], int]:
    """Device, device id, element type, shape and address, as IO binding takes them."""
    return "cpu", 0, values.dtype.type, values.shape, values.ctypes.data


def _contiguous_runs(rows: Sequence[int]) -> list[range]:
    """Positions of maximal runs of consecutive numbers in a sorted list."""
    runs: list[range] = []
    start = 0
    for position in range(1, len(rows) + 1):
        if position == len(rows) or rows[position] != rows[position - 1] + 1:
            runs.append(range(start, position))
            start = position
    return runs


def _open_session(path: Path, num_threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(
        str(path), sess_options=options, providers=["CPUExecutionProvider"]
    )


def cached_graph(checkpoint: Checkpoint, options: GraphOptions) -> Path:
    """Path of the exported graph, which the first call makes.

    It lies in the model folder under `onnx/`, or in the user's cache where that folder cannot be
    written to. The key covers the weights, the options and the graph's own version.

    Raises:
        ExecutorUnavailable: neither place can be written to.
    """
    key = f"{checkpoint.info().revision}-{options.key}"
    places = [checkpoint.folder / "onnx", user_cache_path("vqstack", appauthor=False) / "onnx"]
    for place in places:
        if (place / key / _GRAPH_FILE).is_file():
            return place / key / _GRAPH_FILE
    failures = []
    for place in places:
        try:
            return _export_into(place, key, checkpoint, options)
        except PermissionError as error:
            failures.append(str(error))
        except OSError as error:
            if error.errno != errno.EROFS:
                raise
            failures.append(str(error))
    raise ExecutorUnavailable(f"the ONNX graph can be written nowhere: {'; '.join(failures)}")


def _export_into(place: Path, key: str, checkpoint: Checkpoint, options: GraphOptions) -> Path:
    """Export under a scratch name and rename, so that a graph in its place is always complete."""
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place, prefix=".export-") as scratch:
        made = Path(scratch) / key
        made.mkdir()
        export_onnx(checkpoint, made / _GRAPH_FILE, options, checkpoint.config.context_length)
        try:
            made.rename(place / key)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # another process was faster
                raise
    return place / key / _GRAPH_FILE
