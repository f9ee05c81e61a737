"""What one model predicts on token windows, token by token, and how far that is from another's.

Works through executors, so what is scored is the packed checkpoint. One window of logits per
model is in memory at a time; what is kept is a few numbers per token. Knows no file format.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vqllm.errors import EvaluationError
from vqllm.evaluation.windows import Windows

CHUNK_ROWS = 128  # rows of logits that are turned into probabilities at a time

PerToken = NDArray[np.float32]
Flags = NDArray[np.bool_]


class Scorer(Protocol):
    """What evaluation asks of an executor: logits (t, vocab_size) after every token."""

    def score(self, token_ids: Sequence[int]) -> NDArray[np.float32]: ...


@dataclass(frozen=True)
class TokenScores:
    """Per predicted token, all of shape (windows, window_length - 1).

    Attributes:
        nll: negative log-likelihood of the token, nats.
        correct: whether the token was the model's most probable one.
    """

    nll: PerToken
    correct: Flags


@dataclass(frozen=True)
class PairedScores(TokenScores):
    """The same, beside a reference model on the same tokens.

    Attributes:
        reference_nll: the reference's negative log-likelihood, nats.
        reference_correct: whether the token was the reference's most probable one.
        kl: KL(reference || model) of the whole distribution, nats.
        agrees: whether both models have the same most probable token.
    """

    reference_nll: PerToken
    reference_correct: Flags
    kl: PerToken
    agrees: Flags

    @property
    def flips(self) -> Flags:
        """Where exactly one of the two models has the token on top (Dutta et al. 2024)."""
        return np.asarray(self.correct != self.reference_correct)


def score_windows(
    scorer: Scorer, windows: Windows, report: Callable[[], None] = lambda: None
) -> TokenScores:
    """Score windows (n, t); `report` is called after each.

    Raises:
        EvaluationError: a logit is not finite.
    """
    rows = []
    for window in windows:
        rows.append(_token_scores(_Predictions.of(scorer, window)))
        report()
    return TokenScores(**_stack(rows))


def compare_windows(
    scorer: Scorer, reference: Scorer, windows: Windows, report: Callable[[], None] = lambda: None
) -> PairedScores:
    """Score windows (n, t) beside a reference; `report` is called after each.

    Raises:
        EvaluationError: the vocabularies differ, or a logit is not finite.
    """
    rows = []
    for window in windows:
        ours = _Predictions.of(scorer, window)
        rows.append(_paired_scores(ours, _Predictions.of(reference, window)))
        report()
    return PairedScores(**_stack(rows))


@dataclass(frozen=True)
class _Predictions:
    """Logits (t - 1, vocab_size) for the tokens (t - 1,) that follow."""

    logits: Tensor
    targets: Tensor

    @classmethod
    def of(cls, scorer: Scorer, window: NDArray[np.int64]) -> _Predictions:
        logits = torch.from_numpy(scorer.score(window.tolist()))[:-1]
        return cls(logits, torch.from_numpy(window[1:].copy()))

    def chunks(self) -> list[tuple[Tensor, Tensor]]:
        """Log-probabilities are computed by the caller, chunk by chunk, to bound memory."""
        starts = range(0, len(self.targets), CHUNK_ROWS)
        rows = [slice(start, start + CHUNK_ROWS) for start in starts]
        return [(self.logits[chunk], self.targets[chunk]) for chunk in rows]


def _token_scores(predictions: _Predictions) -> dict[str, Tensor]:
    rows = [_nll_and_top(*chunk)[1:] for chunk in predictions.chunks()]
    nll, correct = (torch.cat(parts) for parts in zip(*rows, strict=True))
    return {"nll": nll, "correct": correct}


def _paired_scores(ours: _Predictions, theirs: _Predictions) -> dict[str, Tensor]:
    if ours.logits.shape != theirs.logits.shape:
        raise EvaluationError(
            f"the model has {ours.logits.shape[1]} tokens in its vocabulary, the reference "
            f"{theirs.logits.shape[1]}; compare models of one vocabulary"
        )
    pairs = zip(ours.chunks(), theirs.chunks(), strict=True)
    rows = [_pair(*our_chunk, their_logits) for our_chunk, (their_logits, _) in pairs]
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def _pair(our_logits: Tensor, targets: Tensor, their_logits: Tensor) -> dict[str, Tensor]:
    our_logs, our_nll, our_correct = _nll_and_top(our_logits, targets)
    their_logs, their_nll, their_correct = _nll_and_top(their_logits, targets)
    return {
        "nll": our_nll,
        "correct": our_correct,
        "reference_nll": their_nll,
        "reference_correct": their_correct,
        "kl": (their_logs.exp() * (their_logs - our_logs)).sum(dim=-1),
        "agrees": our_logits.argmax(dim=-1) == their_logits.argmax(dim=-1),
    }


def _nll_and_top(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities (r, vocab_size), the targets' negative ones and whether they are top."""
    logs = torch.log_softmax(logits, dim=-1)
    nll = -logs.gather(-1, targets[:, None])[:, 0]
    if not torch.isfinite(nll).all():
        raise EvaluationError("the model's logits hold NaN or infinite values")
    return logs, nll, logits.argmax(dim=-1) == targets


def _stack(rows: list[dict[str, Tensor]]) -> dict[str, Any]:
    names = {field.name for field in fields(PairedScores)} & rows[0].keys()
    return {name: torch.stack([row[name] for row in rows]).numpy() for name in names}
