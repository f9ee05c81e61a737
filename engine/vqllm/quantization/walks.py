"""Walks two streams of activations through a block, from one group of linears to the next.

The quantized stream reads the linears that are finished, the full-precision one the originals.
Knows blocks by their trace alone, no method.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from vqllm.decoder.trace import Tap, Trace, finish
from vqllm.quantization.blocks import Block
from vqllm.quantization.spill import SpilledTensor
from vqllm.quantization.workers import Workers
from vqllm.sources import WeightSource

BATCH_TOKENS = 2048


def windows_per_batch(num_tokens: int) -> int:
    """Windows of `num_tokens` that go through a block together."""
    return max(1, BATCH_TOKENS // num_tokens)


class Streams:
    """Hidden states between two blocks, and how many windows move together.

    Attributes:
        hidden: (windows, t, d) float32 behind the quantized prefix.
        reference: the same behind the original prefix, or None where nothing corrects towards it.
    """

    def __init__(
        self,
        source: WeightSource,
        windows: NDArray[Any],
        with_reference: bool,
        spill: Path | None = None,
    ) -> None:
        """Both streams at the first block's input, in files in the folder `spill` if given."""
        self._shape: tuple[int, ...] = (*windows.shape, source.config.hidden_size)
        self._spilled: list[SpilledTensor] = []
        self.hidden = self._empty("hidden", spill)
        self.reference = self._empty("reference", spill) if with_reference else None
        for rows in self.batches:
            self.hidden[rows] = source.embed(torch.from_numpy(windows[rows]))
            if self.reference is not None:
                self.reference[rows] = self.hidden[rows]
            self.release()

    @property
    def num_windows(self) -> int:
        return self._shape[0]

    @property
    def num_tokens(self) -> int:
        """Length of a window."""
        return self._shape[1]

    @property
    def batches(self) -> list[slice]:
        step = windows_per_batch(self.num_tokens)
        return [slice(i, min(i + step, self.num_windows)) for i in range(0, self.num_windows, step)]

    def release(self) -> None:
        """Let spilled pages go."""
        for spilled in self._spilled:
            spilled.release()

    def _empty(self, name: str, spill: Path | None) -> Tensor:
        if spill is None:
            return torch.empty(self._shape)
        self._spilled.append(SpilledTensor(spill / f"{name}.f32", self._shape))
        return self._spilled[-1].tensor


@dataclass(frozen=True)
class TapPair:
    """One batch's input of a group of linears, in both streams.

    Attributes:
        inputs: (n, in) float32 of the quantized stream.
        reference: (n, in) of the same tokens in full precision, or None. A token that only the
            quantized stream sends to these linears stands with its quantized input.
        window: (n,) int64, the window each row comes from.
        all_windows: the same for every token of the batch.
        every_token: as in `Tap`.
    """

    inputs: Tensor
    reference: Tensor | None
    window: Tensor
    all_windows: Tensor
    every_token: Callable[[], Tensor] | None = None

    def with_every_token(self) -> TapPair:
        """The batch as if all its tokens had been routed here; without a reference."""
        if self.every_token is None:
            return self
        inputs = self.every_token().flatten(0, -2)
        return TapPair(inputs, None, self.all_windows, self.all_windows)


@dataclass(frozen=True)
class Group:
    """Linears that share their input, and that input for every batch.

    Attributes:
        parts: the linears.
        taps: makes an iterator over the batches; may be called again.
        num_windows: of all batches together.
    """

    parts: tuple[str, ...]
    taps: Callable[[], Iterator[TapPair]]
    num_windows: int


class Walk(ABC):
    """The way of all batches through one block."""

    def __init__(
        self, block: Block, original: Block, streams: Streams, workers: Workers | None = None
    ) -> None:
        """`original` keeps its weights while those of `block` are replaced."""
        self._block, self._original, self._streams = block, original, streams
        self._workers = workers or Workers()

    @abstractmethod
    def groups(self) -> Iterator[Group]:
        """The groups in order; after the last one `streams` hold the block's output."""


class WaitingWalk(Walk):
    """All batches side by side: what each needs further on waits in its suspended trace."""

    def groups(self) -> Iterator[Group]:
        streams = self._streams
        pairs = [_Pair(self._block, self._original, streams, rows) for rows in streams.batches]
        for parts in self._block.groups:
            taps = list(self._workers.map(_Pair.advance, pairs))
            yield Group(parts, partial(iter, taps), streams.num_windows)
            del taps
        self._workers.run(_Pair.finish, pairs)


class ReplayWalk(Walk):
    """One batch at a time, from the block's input to each group anew: least memory."""

    def groups(self) -> Iterator[Group]:
        for index, parts in enumerate(self._block.groups):
            yield Group(parts, partial(self._taps, index), self._streams.num_windows)
        for rows in self._streams.batches:
            _Pair(self._block, self._original, self._streams, rows).finish()
            self._streams.release()

    def _taps(self, index: int) -> Iterator[TapPair]:
        for rows in self._streams.batches:
            pair = _Pair(self._block, self._original, self._streams, rows)
            for _ in range(index):
                pair.skip()
            yield pair.advance()
            self._streams.release()


class _Pair:
    """The traces of one batch in both streams."""

    def __init__(self, block: Block, original: Block, streams: Streams, rows: slice) -> None:
        self._streams, self._rows = streams, rows
        self._trace = block.trace(streams.hidden[rows])
        self._reference: Trace | None = None
        if streams.reference is not None:
            self._reference = original.trace(streams.reference[rows])

    def advance(self) -> TapPair:
        """The next tap."""
        tap = next(self._trace)
        reference = None if self._reference is None else next(self._reference)
        windows = torch.arange(self._rows.start, self._rows.stop)
        return _paired(tap, reference, windows.repeat_interleave(self._streams.num_tokens))

    def skip(self) -> None:
        """Pass over the next tap."""
        next(self._trace)
        if self._reference is not None:
            next(self._reference)

    def finish(self) -> None:
        """Run to the end of the block and write its output to the streams."""
        self._streams.hidden[self._rows] = finish(self._trace)
        if self._reference is not None and self._streams.reference is not None:
            self._streams.reference[self._rows] = finish(self._reference)


def _paired(tap: Tap, reference: Tap | None, windows: Tensor) -> TapPair:
    """`windows` (tokens,) is the window of every token of the batch."""
    inputs = tap.inputs.flatten(0, -2)
    rows = torch.arange(len(windows)) if tap.rows is None else tap.rows
    matched = None if reference is None else _matched(inputs, rows, reference)
    return TapPair(inputs, matched, windows[rows], windows, tap.every_token)


def _matched(inputs: Tensor, rows: Tensor, reference: Tap) -> Tensor:
    """Rows of the reference in the order of the quantized stream's."""
    values = reference.inputs.flatten(0, -2)
    if reference.rows is None:
        return values if len(rows) == len(values) else values[rows]
    mine, theirs = (rows[:, None] == reference.rows).nonzero(as_tuple=True)
    result = inputs.clone()
    result[mine] = values[theirs]
    return result
