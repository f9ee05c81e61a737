"""Fits a run into a memory limit, and measures what it really took.

Estimates come before any work, from shapes alone; the peak comes from the kernel. Knows sizes, no
tensor and no method.
"""

from __future__ import annotations

import ctypes
import re
import resource
from dataclasses import dataclass
from pathlib import Path

from vqllm.decoder.config import DecoderConfig
from vqllm.errors import InvalidConfig, OverBudget
from vqllm.quantization.hessian import BLOCKED_FROM
from vqllm.quantization.recipe import Recipe
from vqllm.quantization.walks import windows_per_batch

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}
_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_FLOAT, _DOUBLE = 4, 8
_SLACK = 300 * 10**6  # allocator, libraries' buffers, tokenizer


def parse_bytes(text: str) -> int:
    """Bytes of `3GB`, `20 GiB`, `800M` or a plain number.

    Raises:
        InvalidConfig: it is none of these.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]i?|)B?\s*", text)
    if match is None or not float(match[1]):
        raise InvalidConfig("max_memory", text, "a size such as 3GB or 20GiB")
    return int(float(match[1]) * _UNITS[match[2]])


def resident_bytes() -> int:
    """Memory of this process that is in RAM now, mapped files included; 0 where unknown."""
    return _status_bytes("VmRSS")


def peak_bytes() -> int:
    """The most memory of this process that was in RAM at one time."""
    return _status_bytes("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak() -> None:
    """Let the peak start anew, where the system can do that."""
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return


def trim_heap() -> None:
    """Give freed memory back to the system; glibc keeps what was in the middle of its heap."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        return


def _status_bytes(field: str) -> int:
    if not _STATUS.is_file():
        return 0
    match = re.search(rf"^{field}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    return int(match[1]) * 1024 if match else 0


@dataclass(frozen=True)
class MemoryPlan:
    """How to run.

    Attributes:
        is_lean: weights and hidden states lie on disk between uses and every group of linears is
            reached by running the block anew, batch by batch; else all of it stays in memory.
        num_workers: how many pieces of work may be in memory at a time.
        expected_bytes: estimate of the peak.
        limit: what must not be exceeded, or None.
    """

    is_lean: bool = False
    expected_bytes: int = 0
    limit: int | None = None
    num_workers: int = 1

    def check(self, name: str) -> None:
        """Raise OverBudget when the limit was exceeded; `name` is the linear just finished."""
        peak = peak_bytes()
        if self.limit is not None and peak > self.limit:
            raise OverBudget(
                f"memory peaked at {_gigabytes(peak)} at {name}, over the limit of "
                f"{_gigabytes(self.limit)}; finished layers are kept, use fewer or shorter "
                "calibration windows or a larger --max-memory"
            )


def plan_memory(
    config: DecoderConfig,
    windows_shape: tuple[int, int],
    recipe: Recipe,
    limit: int | None,
    num_workers: int = 1,
) -> MemoryPlan:
    """The fastest way to run that fits into `limit` bytes, with `num_workers` or with one.

    Raises:
        OverBudget: no way fits; names what would be needed.
    """
    estimate = _Estimate(config, windows_shape, recipe)
    for workers in (num_workers, 1):
        fast = estimate.fast(workers)
        if limit is None or fast <= limit:
            return MemoryPlan(False, fast, limit, workers)
    lean, limit = estimate.lean(), limit or 0
    if lean <= limit:
        return MemoryPlan(True, lean, limit)
    raise OverBudget(
        f"the run needs about {_gigabytes(lean)} and --max-memory is {_gigabytes(limit)}; use "
        f"--max-memory {lean / 1e9:.1f}GB{_savings(recipe, windows_shape)}"
    )


def _savings(recipe: Recipe, windows_shape: tuple[int, int]) -> str:
    advice = []
    if len(recipe.dampings) > 1:
        advice.append("a single --damping")
    if windows_shape[1] > 512:
        advice.append("a shorter --window-length")
    return ", or " + " and ".join(advice) if advice else ""


class _Estimate:
    """Bytes of a run from the shapes of its largest block."""

    def __init__(
        self, config: DecoderConfig, windows_shape: tuple[int, int], recipe: Recipe
    ) -> None:
        self._config = config
        self._num_tokens = windows_shape[0] * windows_shape[1]
        self._batch_tokens = windows_per_batch(windows_shape[1]) * windows_shape[1]
        self._streams = 2 if recipe.alpha > 0 else 1
        self._dampings = len(recipe.dampings)
        self._halves = 2 if self._dampings > 1 else 1
        self._base = resident_bytes() + _SLACK

    def fast(self, num_workers: int) -> int:
        """Everything in memory."""
        hidden = _FLOAT * self._num_tokens * self._config.hidden_size * self._streams
        blocks = [self._fast_block(layer, num_workers) for layer in self._layers()]
        return self._base + hidden + max(blocks)

    def lean(self) -> int:
        """Weights and hidden states on disk, one batch of activations."""
        return self._base + max(map(self._lean_block, self._layers()))

    def _layers(self) -> range:
        """One dense block and one with experts stand for all."""
        moe = self._config.moe
        last = 0 if moe is None else min(moe.first_layer, self._config.num_layers - 1)
        return range(last + 1)

    def _weights(self, layer: int) -> int:
        shapes = self._config.linear_shapes(layer).values()
        return _FLOAT * sum(rows * columns for rows, columns in shapes)

    def _fast_block(self, layer: int, num_workers: int) -> int:
        weights = self._weights(layer) * self._streams
        widths = [columns for _, columns in self._config.linear_shapes(layer).values()]
        waiting = _FLOAT * self._num_tokens * self._streams
        waiting *= max(widths) + self._config.hidden_size
        others = (num_workers - 1) * (self._forward(layer) + max(self._groups(layer)))
        return weights + waiting + self._forward(layer) + max(self._groups(layer)) + others

    def _lean_block(self, layer: int) -> int:
        reading = self._weights(layer)
        forward = self._forward(layer) * self._streams
        largest = max(
            rows * columns for rows, columns in self._config.linear_shapes(layer).values()
        )
        return max(reading, 2 * _FLOAT * largest + forward, *self._groups(layer))

    def _forward(self, layer: int) -> int:
        """Activations of one batch inside the block."""
        shapes = self._config.linear_shapes(layer)
        widest = max(sum(rows for rows, _ in shapes.values() if rows), 1)
        if self._config.has_experts(layer):
            widest = max(rows for rows, _ in shapes.values()) * 4
        return _FLOAT * self._batch_tokens * widest

    def _groups(self, layer: int) -> list[int]:
        shapes = self._config.linear_shapes(layer)
        return [
            self._group([shapes[part] for part in group])
            for group in self._config.linear_groups(layer)
        ]

    def _group(self, shapes: list[tuple[int, int]]) -> int:
        """The larger of counting moments with one batch of inputs, and quantizing from them."""
        columns = shapes[0][1]
        outputs, largest = sum(s[0] for s in shapes), max(s[0] for s in shapes)
        square, weights = columns * columns, _FLOAT * columns * outputs
        cross = _DOUBLE * columns * min(columns, outputs) if self._streams == 2 else 0
        sums = self._halves * (_DOUBLE * square + cross)
        if columns < BLOCKED_FROM:
            factor = self._dampings * (_FLOAT + _DOUBLE) * square + 3 * _DOUBLE * square
        else:
            factor = _FLOAT * square + (_DOUBLE * square if self._halves == 2 else 0)
        correcting = _DOUBLE * columns * largest if self._streams == 2 and columns <= outputs else 0
        working = _FLOAT * square + 4 * _FLOAT * columns * largest  # of a method
        counting = sums + _FLOAT * square + _FLOAT * self._batch_tokens * columns * self._streams
        quantizing = sums - (cross if self._halves == 1 else 0) + factor + working
        return weights + max(counting, sums + factor + correcting, quantizing)


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB"
