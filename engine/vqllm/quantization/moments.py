"""Second moments of a group's inputs over the calibration rows, some windows held out.

Knows rows and weights, no model and no method.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vqllm.quantization.correction import CrossMoment
from vqllm.quantization.hessian import Hessian
from vqllm.quantization.walks import TapPair

HOLD_OUT_EVERY = 8


@dataclass(frozen=True)
class Moments:
    """What is known of the inputs of a group of linears.

    Attributes:
        hessian: (in, in) float64, Xq' Xq / n.
        cross: (out, in) float64 by part, W (Xfp - Xq)' Xq / n; empty without correction.
    """

    hessian: Tensor
    cross: Mapping[str, Tensor]


class MomentSums:
    """Running moments of a group of linears, training rows and held-out rows apart.

    Every HOLD_OUT_EVERY-th window is held out, the last one where there are fewer.

    Attributes:
        weights: (out, in) float32 by part, in full precision.
    """

    def __init__(
        self, weights: Mapping[str, Tensor], num_windows: int, correct: bool, hold_out: bool
    ) -> None:
        self._windows = torch.arange(num_windows) % HOLD_OUT_EVERY == HOLD_OUT_EVERY - 1
        if num_windows < HOLD_OUT_EVERY:
            self._windows[-1] = True
        self.weights = weights
        self._training = _Sums(weights, correct)
        self._held_out = _Sums(weights, correct) if hold_out else None

    def add(self, taps: TapPair) -> None:
        """Count one batch."""
        if self._held_out is None:
            self._training.add(taps.inputs, taps.reference)
            return
        is_held_out = self._windows[taps.window]
        for sums, chosen in ((self._training, ~is_held_out), (self._held_out, is_held_out)):
            if chosen.any():
                reference = None if taps.reference is None else taps.reference[chosen]
                sums.add(taps.inputs[chosen], reference)

    @property
    def training(self) -> Moments:
        return self._training.moments()

    @property
    def held_out(self) -> Moments | None:
        """None where nothing was to be held out."""
        return None if self._held_out is None else self._held_out.moments()

    @property
    def all(self) -> Moments:
        """Over training and held-out rows."""
        return self._training.moments(self._held_out)


class _Sums:
    def __init__(self, weights: Mapping[str, Tensor], correct: bool) -> None:
        self._hessian = Hessian(next(iter(weights.values())).shape[1])
        self._cross: CrossMoment | None = CrossMoment(weights) if correct else None
        self._parts = tuple(weights)

    def add(self, inputs: Tensor, reference: Tensor | None) -> None:
        self._hessian.add(inputs)
        if self._cross is not None and reference is not None:
            self._cross.add(reference, inputs)

    def moments(self, other: _Sums | None = None) -> Moments:
        """Over these rows, and those of `other`."""
        hessian, cross = self._hessian, self._cross
        if other is not None:
            hessian = hessian.merged(other._hessian)
            cross = None if cross is None or other._cross is None else cross.merged(other._cross)
        by_part = {} if cross is None else {part: cross.of(part) for part in self._parts}
        return Moments(hessian.value, by_part)
