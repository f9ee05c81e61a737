"""Accuracy on zero-shot tasks, defined as lm-evaluation-harness defines it.

`acc` picks the answer of largest log-likelihood, `acc_norm` divides it by the answer's characters
first. Works through executors; knows no task's format.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vqllm.errors import EvaluationError
from vqllm.evaluation.perplexity import Scorer
from vqllm.evaluation.statistics import NUM_RESAMPLES, SEED
from vqllm.evaluation.tasks import Choice, Item
from vqllm.evaluation.windows import TextEncoder

Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class TaskScores:
    """Which items of a task were answered right, each (items,).

    Attributes:
        by_choice: number of choices is one, so the answer had to be the greedy continuation.
    """

    correct: Flags
    correct_normalized: Flags
    by_choice: bool

    def to_dict(self, reference: TaskScores | None = None) -> dict[str, Any]:
        """Accuracies with bootstrap standard errors, and flips against a reference."""
        facts: dict[str, Any] = {"items": len(self.correct), **_accuracy("acc", self.correct)}
        if self.by_choice:
            facts |= _accuracy("acc_norm", self.correct_normalized)
        if reference is not None:
            facts["reference_acc"] = float(reference.correct.mean())
            facts["flips"] = float((self.correct != reference.correct).mean())
        return facts


def score_task(
    scorer: Scorer,
    tokenizer: TextEncoder,
    items: Sequence[Item],
    context_length: int,
    report: Callable[[], None] = lambda: None,
) -> TaskScores:
    """Answer every item; `report` is called after each.

    Raises:
        EvaluationError: an answer has no tokens of its own.
    """
    correct, normalized = [], []
    for item in items:
        results = [_score(scorer, tokenizer, c, context_length) for c in item.choices]
        if len(results) == 1:
            correct.append(results[0].is_greedy)
            normalized.append(results[0].is_greedy)
        else:
            logs = np.array([result.log_likelihood for result in results])
            lengths = np.array([max(choice.length, 1) for choice in item.choices])
            correct.append(int(logs.argmax()) == item.answer)
            normalized.append(int((logs / lengths).argmax()) == item.answer)
        report()
    return TaskScores(np.array(correct), np.array(normalized), len(items[0].choices) > 1)


@dataclass(frozen=True)
class _ChoiceScore:
    log_likelihood: float
    is_greedy: bool


def encode_choice(tokenizer: TextEncoder, choice: Choice) -> tuple[list[int], int]:
    """Token ids of context and continuation, and how many belong to the continuation.

    Spaces that end the context go to the continuation, and the two are encoded together, because
    a tokenizer joins a space to the word after it.

    Raises:
        EvaluationError: nothing is left for the continuation.
    """
    context = choice.context.rstrip()
    whole = tokenizer.encode(choice.context + choice.continuation)
    num_continuation = len(whole) - len(tokenizer.encode(context))
    if num_continuation < 1 or num_continuation >= len(whole):
        raise EvaluationError(f"{choice} has no tokens of its own after a context")
    return whole, num_continuation


def _score(
    scorer: Scorer, tokenizer: TextEncoder, choice: Choice, context_length: int
) -> _ChoiceScore:
    whole, count = encode_choice(tokenizer, choice)
    whole = whole[-(context_length + 1) :]
    count = min(count, len(whole) - 1)
    logits = torch.from_numpy(scorer.score(whole[:-1])[-count:])
    targets = torch.tensor(whole[-count:])
    logs = torch.log_softmax(logits.double(), dim=-1)
    chosen = logs.gather(-1, targets[:, None])
    return _ChoiceScore(float(chosen.sum()), bool((logits.argmax(-1) == targets).all()))


def _accuracy(name: str, correct: Flags) -> dict[str, float]:
    generator = np.random.default_rng(SEED)
    draws = generator.binomial(len(correct), correct.mean(), NUM_RESAMPLES) / len(correct)
    return {name: float(correct.mean()), f"{name}_stderr": float(draws.std())}
