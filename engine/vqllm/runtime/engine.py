"""The generation engine: admits sequences, steps them together, and hands out text deltas.

Not thread-safe: one owner calls every method. Knows no transport, no clock and no model file; an
executor computes logits, a tokenizer says which bytes a token stands for.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Protocol

from vqllm.errors import (
    DuplicateSequence,
    EmptyPrompt,
    InvalidConfig,
    InvalidPrompt,
    PromptTooLong,
    QueueFull,
)
from vqllm.runtime.detokenizer import Detokenizer, TokenBytes
from vqllm.runtime.executors.base import Executor, Logits
from vqllm.runtime.sampling import Sampler, SamplingParams, TokenLogprobs
from vqllm.runtime.sequence import FinishReason, Sequence

DEFAULT_CONTEXT_LENGTH = 2048


class EngineTokenizer(TokenBytes, Protocol):
    """What the engine needs of a tokenizer."""

    vocab_size: int
    """Number of tokens; the model's logits may be padded beyond it."""

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end an answer."""
        ...


@dataclass(frozen=True)
class EngineConfig:
    """Limits of an engine.

    `context_length` counts prompt and answer tokens of one sequence; None is the model's own
    length, at most `DEFAULT_CONTEXT_LENGTH`, because the KV cache is reserved up front.
    `max_prefills_per_step` bounds how long running sequences wait for newcomers' prompts.

    Raises:
        InvalidConfig: a value is below 1.
    """

    max_num_sequences: int = 8
    max_waiting: int = 64
    context_length: int | None = None
    max_prefills_per_step: int = 1

    def __post_init__(self) -> None:
        for field in ("max_num_sequences", "max_waiting", "max_prefills_per_step"):
            if getattr(self, field) < 1:
                raise InvalidConfig(field, getattr(self, field), "at least 1")
        if self.context_length is not None and self.context_length < 2:
            raise InvalidConfig("context_length", self.context_length, "at least 2")

    def resolve_context_length(self, model_context_length: int) -> int:
        """Tokens per sequence for a model of the given length.

        Raises:
            InvalidConfig: more was asked for than the model has positions.
        """
        if self.context_length is None:
            return min(model_context_length, DEFAULT_CONTEXT_LENGTH)
        if self.context_length > model_context_length:
            raise InvalidConfig(
                "context_length", self.context_length, f"at most {model_context_length}"
            )
        return self.context_length


@dataclass(frozen=True)
class StepOutput:
    """What one step added to one sequence.

    `text` is a delta of whole characters; it may lag behind the tokens, and the last output of a
    sequence flushes it. `is_first` marks the output that holds the first token of the answer.
    """

    sequence_id: str
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason | None
    num_prompt_tokens: int
    num_output_tokens: int
    is_first: bool
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True)
class EngineStats:
    """Load of the engine now; KV figures are in tokens."""

    running: int
    waiting: int
    kv_tokens_used: int
    kv_tokens_capacity: int


class _Running:
    """A sequence that owns a cache, with its sampler and detokenizer."""

    def __init__(self, sequence: Sequence, cache: int, tokenizer: TokenBytes) -> None:
        self.sequence = sequence
        self.cache = cache
        self.sampler = Sampler(sequence.params)
        self.detokenizer = Detokenizer(tokenizer, sequence.params.stop)


class Engine:
    """Continuous batching over one executor. See the module docstring for the threading rule."""

    def __init__(
        self, executor: Executor, tokenizer: EngineTokenizer, config: EngineConfig | None = None
    ) -> None:
        self.config = config or EngineConfig()
        if self.config.max_num_sequences > executor.max_num_sequences:
            raise InvalidConfig(
                "max_num_sequences",
                self.config.max_num_sequences,
                f"at most {executor.max_num_sequences}, the executor's number of caches",
            )
        self.executor = executor
        self.context_length = self.config.resolve_context_length(executor.context_length)
        self._tokenizer = tokenizer
        self._waiting: deque[Sequence] = deque()
        self._running: dict[str, _Running] = {}

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def has_work(self) -> bool:
        return bool(self._running or self._waiting)

    @property
    def stats(self) -> EngineStats:
        return EngineStats(
            running=self.num_running,
            waiting=self.num_waiting,
            kv_tokens_used=sum(r.sequence.num_tokens for r in self._running.values()),
            kv_tokens_capacity=self.config.max_num_sequences * self.context_length,
        )

    def add(
        self, sequence_id: str, prompt_token_ids: list[int], params: SamplingParams
    ) -> Sequence:
        """Queue a prompt; its first token comes from a later `step`.

        Raises:
            EmptyPrompt, PromptTooLong, InvalidPrompt: the prompt cannot be run.
            DuplicateSequence: the id is in use.
            QueueFull: `max_waiting` sequences are waiting.
        """
        self._check_prompt(prompt_token_ids)
        if sequence_id in self._running or any(s.id == sequence_id for s in self._waiting):
            raise DuplicateSequence(sequence_id)
        if len(self._waiting) >= self.config.max_waiting:
            raise QueueFull(self.config.max_waiting)
        sequence = Sequence(sequence_id, list(prompt_token_ids), params)
        self._waiting.append(sequence)
        return sequence

    def abort(self, sequence_id: str) -> bool:
        """Drop a sequence and free its KV cache at once; False if it is not here (any more).

        An aborted sequence appears in no later `StepOutput`.
        """
        running = self._running.get(sequence_id)
        if running is not None:
            self._finish(running, FinishReason.ABORT)
            return True
        for sequence in self._waiting:
            if sequence.id == sequence_id:
                sequence.finish_reason = FinishReason.ABORT
                self._waiting.remove(sequence)
                return True
        return False

    def step(self) -> list[StepOutput]:
        """Advance every running sequence by one token; newcomers get their first one."""
        outputs = self._decode(list(self._running.values()))
        return outputs + [self._prefill(sequence) for sequence in self._admit()]

    def _check_prompt(self, token_ids: list[int]) -> None:
        if not token_ids:
            raise EmptyPrompt
        if len(token_ids) >= self.context_length:
            raise PromptTooLong(len(token_ids), self.context_length)
        vocab_size = self.executor.vocab_size
        for token_id in token_ids:
            if not 0 <= token_id < vocab_size:
                raise InvalidPrompt(f"token id {token_id} is outside [0, {vocab_size})")

    def _admit(self) -> list[Sequence]:
        num_free = self.config.max_num_sequences - len(self._running)
        count = min(num_free, self.config.max_prefills_per_step, len(self._waiting))
        return [self._waiting.popleft() for _ in range(count)]

    def _prefill(self, sequence: Sequence) -> StepOutput:
        running = _Running(sequence, self.executor.allocate(), self._tokenizer)
        self._running[sequence.id] = running
        logits = self.executor.prefill(running.cache, sequence.prompt_token_ids)
        return self._accept(running, logits)

    def _decode(self, batch: list[_Running]) -> list[StepOutput]:
        if not batch:
            return []
        logits = self.executor.decode(
            [running.cache for running in batch],
            [running.sequence.output_token_ids[-1] for running in batch],
        )
        return [self._accept(running, row) for running, row in zip(batch, logits, strict=True)]

    def _accept(self, running: _Running, logits: Logits) -> StepOutput:
        """Sample one token, append it, and report what it added."""
        sequence = running.sequence
        # Models pad their vocabulary; an id that stands for no text must never be drawn.
        logits = logits[: self._tokenizer.vocab_size]
        token_id = running.sampler.choose(
            logits, sequence.prompt_token_ids, sequence.output_token_ids
        )
        logprobs = running.sampler.logprobs(logits, token_id)
        sequence.output_token_ids.append(token_id)
        is_eos = token_id in self._tokenizer.eos_token_ids and not sequence.params.ignore_eos
        text = "" if is_eos else running.detokenizer.push(token_id)
        reason = self._finish_reason(running, is_eos)
        if reason is not None:
            text += running.detokenizer.flush()
            self._finish(running, reason)
        return StepOutput(
            sequence_id=sequence.id,
            token_ids=(token_id,),
            text=text,
            finish_reason=reason,
            num_prompt_tokens=len(sequence.prompt_token_ids),
            num_output_tokens=len(sequence.output_token_ids),
            is_first=len(sequence.output_token_ids) == 1,
            logprobs=() if logprobs is None else (logprobs,),
        )

    def _finish_reason(self, running: _Running, is_eos: bool) -> FinishReason | None:
        sequence = running.sequence
        if is_eos or running.detokenizer.is_stopped:
            return FinishReason.STOP
        is_full = sequence.num_tokens >= self.context_length
        if is_full or len(sequence.output_token_ids) >= sequence.params.max_tokens:
            return FinishReason.LENGTH
        return None

    def _finish(self, running: _Running, reason: FinishReason) -> None:
        running.sequence.finish_reason = reason
        del self._running[running.sequence.id]
        self.executor.free(running.cache)
