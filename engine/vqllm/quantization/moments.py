"""Second moments of a group's inputs over the calibration rows, some windows held out.

Knows rows and weights, no model and no method.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial

import torch
from torch import Tensor

from vqllm.quantization.correction import CrossMoment
from vqllm.quantization.hessian import Hessian
from vqllm.quantization.walks import TapPair
from vqllm.quantization.workers import Workers

HOLD_OUT_EVERY = 8


class Moments:
    """What is known of the inputs of a group of linears over some rows.

    Attributes:
        hessian: Xq' Xq.
        cross: W (Xfp - Xq)' Xq by part, or None without correction.
    """

    def __init__(self, weights: Mapping[str, Tensor], correct: bool) -> None:
        self.hessian = Hessian(next(iter(weights.values())).shape[1])
        self.cross = CrossMoment(weights) if correct else None

    def add(self, inputs: Tensor, reference: Tensor | None) -> None:
        """Count rows (n, in) of the quantized stream and, to correct, of the original one."""
        self.hessian.add(inputs)
        if self.cross is not None and reference is not None:
            self.cross.add(reference, inputs)

    def merge(self, other: Moments) -> None:
        """Count the rows of `other` as well."""
        if not other.hessian.num_rows:
            return
        self.hessian.merge(other.hessian)
        if self.cross is not None and other.cross is not None:
            self.cross.merge(other.cross)

    def cross_of(self, part: str, rows: slice | Tensor = slice(None)) -> Tensor | None:
        """`CrossMoment.of`, or None without correction."""
        return None if self.cross is None else self.cross.of(part, rows)


class MomentSums:
    """Moments of a group of linears, training rows and held-out rows apart.

    Every HOLD_OUT_EVERY-th window is held out, the last one where there are fewer.

    Attributes:
        training: over the rows that are not held out; over all where none are.
        held_out: None where nothing was to be held out.
    """

    def __init__(
        self, weights: Mapping[str, Tensor], num_windows: int, correct: bool, hold_out: bool
    ) -> None:
        """`weights` (out, in) float32 by part, in full precision."""
        self._empty = partial(MomentSums, weights, num_windows, correct, hold_out)
        self._windows = torch.arange(num_windows) % HOLD_OUT_EVERY == HOLD_OUT_EVERY - 1
        if num_windows < HOLD_OUT_EVERY:
            self._windows[-1] = True
        self.training = Moments(weights, correct)
        self.held_out = Moments(weights, correct) if hold_out else None

    def add_all(self, batches: Iterable[TapPair], workers: Workers) -> None:
        """Count batches, several at a time; the sums are those of `add` one after the other."""
        if workers.count == 1:
            for taps in batches:
                self.add(taps)
            return
        for part in workers.map(self._counted, batches):
            self.training.merge(part.training)
            if self.held_out is not None and part.held_out is not None:
                self.held_out.merge(part.held_out)

    def _counted(self, taps: TapPair) -> MomentSums:
        sums = self._empty()
        sums.add(taps)
        return sums

    def add(self, taps: TapPair) -> None:
        """Count one batch."""
        if self.held_out is None:
            self.training.add(taps.inputs, taps.reference)
            return
        is_held_out = self._windows[taps.window]
        for sums, chosen in ((self.training, ~is_held_out), (self.held_out, is_held_out)):
            if chosen.all():
                sums.add(taps.inputs, taps.reference)
            elif chosen.any():
                reference = None if taps.reference is None else taps.reference[chosen]
                sums.add(taps.inputs[chosen], reference)

    @property
    def num_columns(self) -> int:
        """Inputs of the group."""
        return len(self.training.hessian.total)

    @property
    def num_rows(self) -> int:
        """Rows counted so far, held out or not."""
        held_out = 0 if self.held_out is None else self.held_out.hessian.num_rows
        return self.training.hessian.num_rows + held_out

    def merged(self) -> Moments:
        """Over all rows; held-out ones are not apart any more."""
        if self.held_out is not None:
            self.training.merge(self.held_out)
            self.held_out = None
        return self.training
