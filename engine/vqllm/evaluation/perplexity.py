"""Perplexity of a text, and the distance of one model's predictions to another's.

Runs through an executor, so what is scored is the packed checkpoint as it will be served, int8
activations included. Knows no file format.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vqllm.runtime.executors.base import Executor


@dataclass(frozen=True)
class Score:
    """Result of `evaluate`; the last two compare with a reference and are None without one.

    Attributes:
        perplexity: exp of the mean negative log-likelihood, over the second to the last token
            of every window.
        num_tokens: how many tokens were predicted.
        divergence: mean KL(reference || model) in nats.
        top1_agreement: part of the positions at which both find the same token most probable.
    """

    perplexity: float
    num_tokens: int
    divergence: float | None = None
    top1_agreement: float | None = None


def evaluate(
    executor: Executor, windows: NDArray[np.int64], reference: Executor | None = None
) -> Score:
    """Score non-overlapping token windows (num_windows, window_length), no token added in front."""
    loss = divergence = 0.0
    agreements = 0
    for window in windows:
        log_p = _log_softmax(executor.score(window.tolist())[:-1])
        loss -= float(np.take_along_axis(log_p, window[1:, None], axis=1).sum(dtype=np.float64))
        if reference is not None:
            log_q = _log_softmax(reference.score(window.tolist())[:-1])
            divergence += float((np.exp(log_q) * (log_q - log_p)).sum(dtype=np.float64))
            agreements += int((log_q.argmax(axis=1) == log_p.argmax(axis=1)).sum())
    num_tokens = windows.shape[0] * (windows.shape[1] - 1)
    perplexity = math.exp(loss / num_tokens)
    if reference is None:
        return Score(perplexity, num_tokens)
    return Score(perplexity, num_tokens, divergence / num_tokens, agreements / num_tokens)


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    shifted = logits - logits.max(axis=1, keepdims=True)
    total = np.exp(shifted).sum(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(total), dtype=np.float32)
