"""Walks two streams of activations through a block, from one group of linears to the next.

The quantized stream reads the linears that are finished, the full-precision one the originals.
Knows blocks by their protocol alone, no method.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vqllm.decoder.trace import Tap, Trace
from vqllm.quantization.blocks import Block

BATCH_WINDOWS = 4


@dataclass
class Streams:
    """Hidden states between two blocks.

    Attributes:
        hidden: (windows, t, d) float32 behind the quantized prefix.
        reference: the same behind the original prefix, or None where nothing corrects towards it.
    """

    hidden: Tensor
    reference: Tensor | None

    @classmethod
    def start(cls, embedded: Tensor, with_reference: bool) -> Streams:
        """Both streams at the first block's input."""
        return cls(embedded, embedded.clone() if with_reference else None)

    @property
    def batches(self) -> list[slice]:
        num_windows = self.hidden.shape[0]
        return [slice(i, i + BATCH_WINDOWS) for i in range(0, num_windows, BATCH_WINDOWS)]


@dataclass(frozen=True)
class TapPair:
    """One batch's input of a group of linears, in both streams.

    Attributes:
        parts: the linears.
        inputs: (n, in) float32 of the quantized stream.
        reference: (n, in) of the same tokens in full precision, or None. A token that only the
            quantized stream sends to these linears stands with its quantized input.
        window: (n,) int64, the window each row comes from.
    """

    parts: tuple[str, ...]
    inputs: Tensor
    reference: Tensor | None
    window: Tensor


class Walk:
    """All batches of a block side by side, stopped at the same group.

    What a batch needs further on waits in its suspended trace, so nothing is computed twice.
    """

    def __init__(self, block: Block, original: Block, streams: Streams) -> None:
        """`original` keeps its weights while those of `block` are replaced."""
        self._streams = streams
        self._pairs = [
            _Pair(
                rows,
                block.trace(streams.hidden[rows]),
                None if streams.reference is None else original.trace(streams.reference[rows]),
            )
            for rows in streams.batches
        ]

    def next_group(self) -> Group | None:
        """The next group, or None when `streams` hold the block's output."""
        taps = [pair.advance(self._streams) for pair in self._pairs]
        found = [tap for tap in taps if tap is not None]
        return Group(found, self._streams.hidden.shape[0]) if found else None


@dataclass(frozen=True)
class Group:
    """Linears that share their input, and that input for every batch.

    Attributes:
        num_windows: of all batches together.
    """

    taps: list[TapPair]
    num_windows: int

    @property
    def parts(self) -> tuple[str, ...]:
        return self.taps[0].parts

    def __iter__(self) -> Iterator[TapPair]:
        return iter(self.taps)


class _Pair:
    """The traces of one batch in both streams."""

    def __init__(self, rows: slice, trace: Trace, reference: Trace | None) -> None:
        self._rows, self._trace, self._reference = rows, trace, reference

    def advance(self, streams: Streams) -> TapPair | None:
        """The next tap; or None after writing the block's output to the streams."""
        tap = _advance(self._trace, streams.hidden, self._rows)
        reference = None
        if self._reference is not None and streams.reference is not None:
            reference = _advance(self._reference, streams.reference, self._rows)
        if tap is None:
            return None
        return _paired(tap, reference, self._rows.start, streams.hidden.shape[1])


def _advance(trace: Trace, states: Tensor, rows: slice) -> Tap | None:
    try:
        return next(trace)
    except StopIteration as stop:
        states[rows] = stop.value
        return None


def _paired(tap: Tap, reference: Tap | None, first_window: int, num_tokens: int) -> TapPair:
    inputs = tap.inputs.flatten(0, -2)
    rows = torch.arange(inputs.shape[0]) if tap.rows is None else tap.rows
    matched = None if reference is None else _matched(inputs, rows, reference)
    return TapPair(tap.parts, inputs, matched, first_window + rows // num_tokens)


def _matched(inputs: Tensor, rows: Tensor, reference: Tap) -> Tensor:
    """Rows of the reference in the order of the quantized stream's."""
    values = reference.inputs.flatten(0, -2)
    if reference.rows is None:
        return values if len(rows) == len(values) else values[rows]
    matches = rows[:, None] == reference.rows
    result = inputs.clone()
    mine, theirs = matches.nonzero(as_tuple=True)
    result[mine] = values[theirs]
    return result
