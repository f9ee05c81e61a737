"""From logits to a token: sampling parameters, their validation, and one seeded sampler.

A sampler belongs to one sequence and owns that sequence's random stream, so that a seeded answer
does not depend on which other sequences share the batch.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vqllm.errors import InvalidSampling

MAX_STOP_STRINGS = 16
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 100.0
MAX_BIASED_TOKENS = 1024
_MAX_TOKENS = 2**31 - 1
_BLOCK = 256  # probabilities that are summed as one before a draw
_COLDEST = 1e-6  # colder ones are greedy as well, but zero in float32

Logits = NDArray[np.float32]


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens for one sequence, and when to stop.

    Filters apply in this order: logit_bias, penalties, temperature, top_k, top_p, min_p.
    `temperature=0` is greedy and ignores the filters. `top_k=0` and `min_p=0` are off.
    `logit_bias` holds (token id, addend) pairs. `logprobs=n` asks for the log-probabilities of the
    chosen token and of the n most probable ones, taken from the model's distribution before bias,
    penalties and filters.

    Raises:
        InvalidSampling: a value is outside its range; the message names field, value and range.
    """

    max_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        _check_int("max_tokens", self.max_tokens, 1, _MAX_TOKENS)
        _check_float("temperature", self.temperature, 0.0, 2.0)
        _check_float("top_p", self.top_p, 0.0, 1.0, low_open=True)
        _check_int("top_k", self.top_k, 0, _MAX_TOKENS)
        _check_float("min_p", self.min_p, 0.0, 1.0)
        _check_float("repetition_penalty", self.repetition_penalty, 0.0, 10.0, low_open=True)
        _check_float("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_float("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if self.seed is not None:
            _check_int("seed", self.seed, -(2**63), 2**64 - 1)
        if self.logprobs is not None:
            _check_int("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if len(self.stop) > MAX_STOP_STRINGS or not all(self.stop):
            raise InvalidSampling(
                "stop", self.stop, f"at most {MAX_STOP_STRINGS} strings, none of them empty"
            )
        self._check_logit_bias()

    def _check_logit_bias(self) -> None:
        if len(self.logit_bias) > MAX_BIASED_TOKENS:
            raise InvalidSampling(
                "logit_bias", f"{len(self.logit_bias)} tokens", f"at most {MAX_BIASED_TOKENS}"
            )
        for token_id, addend in self.logit_bias:
            _check_int("logit_bias", token_id, 0, _MAX_TOKENS)
            _check_float("logit_bias", addend, -MAX_LOGIT_BIAS, MAX_LOGIT_BIAS)

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def is_argmax(self) -> bool:
        """Whether a draw is the largest logit as it is, and no other is reported."""
        is_plain = self.logprobs is None and not self.logit_bias and not self.has_penalties
        return self.is_greedy and is_plain

    @property
    def has_filters(self) -> bool:
        """Whether some tokens may not be drawn at all."""
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0

    @property
    def has_penalties(self) -> bool:
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural-log probabilities at one position: of the chosen token, and of the `top` ones."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Sampler:
    """Chooses the tokens of one sequence; not shared, because it owns the random stream."""

    def __init__(self, params: SamplingParams) -> None:
        self._params = params
        # numpy wants a non-negative seed; the mask maps int64 seeds one to one into uint64.
        seed = None if params.seed is None else params.seed & (2**64 - 1)
        self._random = np.random.Generator(np.random.PCG64(seed))

    def choose(self, logits: Logits, prompt_ids: list[int], output_ids: list[int]) -> int:
        """Return the next token id for `logits` of shape (vocab_size,), float32.

        Prompt and output count for the repetition penalty, only the output for the presence and
        frequency penalties (the OpenAI definition).
        """
        params = self._params
        if params.logit_bias:
            logits = _biased(logits, params.logit_bias)
        if params.has_penalties:
            logits = _penalize(logits, params, prompt_ids, output_ids)
        if params.is_greedy:
            return int(logits.argmax())
        if not params.has_filters:
            return _draw(_probabilities(logits, params), self._random.random())
        token_ids, probabilities = _distribution(logits, params)
        return int(token_ids[_draw(probabilities, self._random.random())])

    def logprobs(self, logits: Logits, token_id: int) -> TokenLogprobs | None:
        """Log-probabilities to report for this step, or None when they were not asked for."""
        if self._params.logprobs is None:
            return None
        log_probabilities = _log_softmax(logits)
        top = _largest(log_probabilities, self._params.logprobs)
        return TokenLogprobs(
            token_id=token_id,
            logprob=float(log_probabilities[token_id]),
            top=tuple((int(i), float(log_probabilities[i])) for i in top),
        )


def _draw(probabilities: NDArray[np.float32], fraction: float) -> int:
    """The index at which the running sum exceeds `fraction` (in [0, 1)) of the whole.

    Sums of blocks come first, then the running sum within one: a running sum over a whole
    vocabulary would take most of the time of a draw.
    """
    begins = np.arange(0, len(probabilities), _BLOCK)
    ends = np.cumsum(np.add.reduceat(probabilities, begins, dtype=np.float64))
    threshold = min(fraction * float(ends[-1]), math.nextafter(float(ends[-1]), 0.0))
    block = int(np.searchsorted(ends, threshold, side="right"))
    inside = probabilities[block * _BLOCK : (block + 1) * _BLOCK]
    running = np.cumsum(inside, dtype=np.float64)
    before = float(ends[block - 1]) if block else 0.0
    # The two sums round differently; below its end, the running sum is exceeded somewhere.
    rest = min(threshold - before, math.nextafter(float(running[-1]), 0.0))
    return block * _BLOCK + int(np.searchsorted(running, rest, side="right"))


def _biased(logits: Logits, logit_bias: tuple[tuple[int, float], ...]) -> Logits:
    logits = logits.copy()
    for token_id, addend in logit_bias:
        logits[token_id] += addend
    return logits


def _penalize(
    logits: Logits, params: SamplingParams, prompt_ids: list[int], output_ids: list[int]
) -> Logits:
    logits = logits.copy()
    seen = np.array(sorted({*prompt_ids, *output_ids}), dtype=np.int64)
    scores = logits[seen]
    penalty = params.repetition_penalty
    logits[seen] = np.where(scores > 0, scores / penalty, scores * penalty)
    counts = Counter(output_ids)
    if counts:
        used = np.fromiter(counts.keys(), dtype=np.int64)
        times = np.fromiter(counts.values(), dtype=np.float32)
        logits[used] -= params.presence_penalty + params.frequency_penalty * times
    return logits


def _distribution(
    logits: Logits, params: SamplingParams
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Token ids that survive the filters, and their (unnormalized) probabilities."""
    token_ids = np.arange(len(logits), dtype=np.int64)
    if 0 < params.top_k < len(logits):
        token_ids = _largest(logits, params.top_k)
        logits = logits[token_ids]
    probabilities = _probabilities(logits, params)
    if params.top_p < 1.0:
        token_ids, probabilities = _nucleus(token_ids, probabilities, params.top_p)
    if params.min_p > 0.0:
        kept = probabilities >= params.min_p * probabilities.max()
        token_ids, probabilities = token_ids[kept], probabilities[kept]
    return token_ids, probabilities


def _probabilities(logits: Logits, params: SamplingParams) -> NDArray[np.float32]:
    """Unnormalized; float32, because float64 is only needed where they are summed."""
    values: NDArray[np.float32] = logits - logits.max()
    values /= np.float32(max(params.temperature, _COLDEST))
    np.exp(values, out=values)
    return values


def _nucleus(
    token_ids: NDArray[np.int64], probabilities: NDArray[np.float32], top_p: float
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The smallest set of most probable tokens that holds `top_p` of the mass.

    Tokens below (1 - top_p) / n of the mass together hold less than 1 - top_p, so none of them is
    in the set: sorting the few others instead of a vocabulary of 49152 takes 5 ms off a token.
    """
    total = float(probabilities.sum(dtype=np.float64))
    floor = (1.0 - top_p) * total / len(probabilities)
    candidates = np.flatnonzero(probabilities >= floor)
    order = candidates[np.argsort(-probabilities[candidates], kind="stable")]
    cumulative = np.cumsum(probabilities[order], dtype=np.float64)
    num_kept = int(np.searchsorted(cumulative, top_p * total)) + 1
    kept = order[:num_kept]
    return token_ids[kept], probabilities[kept]


def _largest(values: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Indices of the `count` largest values, largest first, ties by index."""
    if count == 0:
        return np.empty(0, dtype=np.int64)
    candidates = np.sort(np.argpartition(values, -count)[-count:])
    return candidates[np.argsort(-values[candidates], kind="stable")].astype(np.int64)


def _log_softmax(logits: Logits) -> Logits:
    shifted = logits - logits.max()
    log_total = math.log(float(np.exp(shifted, dtype=np.float64).sum()))
    return np.asarray(shifted - log_total, dtype=np.float32)


def _check_int(field: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise InvalidSampling(field, value, f"an integer in [{low}, {high}]")


def _check_float(
    field: str, value: object, low: float, high: float, *, low_open: bool = False
) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    in_range = is_number and low <= float(value) <= high and not (low_open and value == low)  # type: ignore[arg-type]
    if not in_range:
        raise InvalidSampling(field, value, f"a number in {'(' if low_open else '['}{low}, {high}]")
