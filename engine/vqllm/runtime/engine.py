"""The generation engine: admits sequences, steps them together, and hands out text deltas.

Not thread-safe: one owner calls every method. Knows no transport, no clock and no model file; a
scheduler decides what a step computes, an executor computes logits, a tokenizer says which bytes
a token stands for.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from vqllm.errors import (
    DuplicateSequence,
    EmptyPrompt,
    InvalidConfig,
    InvalidPrompt,
    InvalidSampling,
    PromptTooLong,
    QueueFull,
)
from vqllm.runtime.detokenizer import Detokenizer, TokenBytes
from vqllm.runtime.drafting import DraftConfig
from vqllm.runtime.executors.base import Executor, Logits
from vqllm.runtime.executors.paged import PagedExecutor, WholeSequencePages
from vqllm.runtime.pages import PageManager
from vqllm.runtime.sampling import Sampler, SamplingParams, TokenLogprobs
from vqllm.runtime.scheduler import Scheduled, Scheduler, SchedulerConfig, Work
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

    Attributes:
        max_num_sequences: sequences that one step advances together.
        max_waiting: sequences that may wait for a place.
        context_length: prompt and answer tokens of one sequence; None is the model's own length,
            at most `DEFAULT_CONTEXT_LENGTH`.
        max_tokens_per_step: tokens that one step computes at most, which bounds how long running
            sequences wait for newcomers' prompts.
        num_pages: pages of the KV cache; None is enough for every sequence at full length.
        draft: guessing ahead in repetitive text; needs an executor that can rewind.

    Raises:
        InvalidConfig: a value is below 1.
    """

    max_num_sequences: int = 8
    max_waiting: int = 64
    context_length: int | None = None
    max_tokens_per_step: int = 512
    num_pages: int | None = None
    draft: DraftConfig = field(default_factory=DraftConfig)

    def __post_init__(self) -> None:
        for name in ("max_num_sequences", "max_waiting", "max_tokens_per_step"):
            if getattr(self, name) < 1:
                raise InvalidConfig(name, getattr(self, name), "at least 1")
        if self.context_length is not None and self.context_length < 2:
            raise InvalidConfig("context_length", self.context_length, "at least 2")
        if self.num_pages is not None and self.num_pages < 1:
            raise InvalidConfig("num_pages", self.num_pages, "at least 1")

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
    """Load of the engine now, and totals since it started (the last four)."""

    running: int
    waiting: int
    kv_tokens_used: int
    kv_tokens_capacity: int
    pages_used: int
    pages_total: int
    prefix_hit_tokens: int
    preemptions: int
    drafted_tokens: int
    accepted_tokens: int


class _Answer:
    """What the engine keeps of one sequence beside its place in the KV cache."""

    def __init__(self, scheduled: Scheduled, tokenizer: TokenBytes) -> None:
        params = scheduled.sequence.params
        self.scheduled = scheduled
        self.sequence = scheduled.sequence
        self.sampler = Sampler(params)
        self.detokenizer = Detokenizer(tokenizer, params.stop)


@dataclass
class _Gain:
    """Tokens that one step gave one sequence; `num_accepted` of them had been guessed."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    text: str = ""
    num_accepted: int = 0


class Engine:
    """Continuous batching over one executor. See the module docstring for the threading rule."""

    def __init__(
        self,
        executor: Executor | PagedExecutor,
        tokenizer: EngineTokenizer,
        config: EngineConfig | None = None,
    ) -> None:
        """Raises InvalidConfig when the executor cannot hold what the config allows."""
        self.config = config or EngineConfig()
        self.executor = executor
        # The native executor is both; then pages it is.
        self._paged = (
            executor if isinstance(executor, PagedExecutor) else WholeSequencePages(executor)
        )
        self.context_length = self.config.resolve_context_length(executor.context_length)
        _check(self.config, executor, self._paged)
        self._tokenizer = tokenizer
        pages = PageManager(
            self._paged.num_pages, self._paged.page_size, self._paged.can_share_pages
        )
        self._scheduler = Scheduler(pages, self._scheduler_config())
        self._answers: dict[str, _Answer] = {}
        self._num_drafted = self._num_accepted = 0

    @property
    def num_running(self) -> int:
        return len(self._scheduler.running)

    @property
    def num_waiting(self) -> int:
        return len(self._scheduler.waiting)

    @property
    def has_work(self) -> bool:
        return bool(self._answers)

    @property
    def stats(self) -> EngineStats:
        pages = self._scheduler.pages.stats
        return EngineStats(
            running=self.num_running,
            waiting=self.num_waiting,
            kv_tokens_used=sum(s.sequence.num_tokens for s in self._scheduler.running),
            kv_tokens_capacity=pages.total * self._paged.page_size,
            pages_used=pages.held,
            pages_total=pages.total,
            prefix_hit_tokens=pages.prefix_hit_tokens,
            preemptions=self._scheduler.num_preemptions,
            drafted_tokens=self._num_drafted,
            accepted_tokens=self._num_accepted,
        )

    def add(
        self, sequence_id: str, prompt_token_ids: list[int], params: SamplingParams
    ) -> Sequence:
        """Queue a prompt; its first token comes from a later `step`.

        Raises:
            EmptyPrompt, PromptTooLong, InvalidPrompt: the prompt cannot be run.
            InvalidSampling: a token of `logit_bias` does not exist.
            DuplicateSequence: the id is in use.
            QueueFull: `max_waiting` sequences are waiting.
        """
        self._check_prompt(prompt_token_ids)
        self._check_bias(params)
        if sequence_id in self._answers:
            raise DuplicateSequence(sequence_id)
        if self.num_waiting >= self.config.max_waiting:
            raise QueueFull(self.config.max_waiting)
        sequence = Sequence(sequence_id, list(prompt_token_ids), params)
        self._answers[sequence_id] = _Answer(self._scheduler.add(sequence), self._tokenizer)
        return sequence

    def abort(self, sequence_id: str) -> bool:
        """Drop a sequence and free its pages at once; False if it is not here (any more).

        An aborted sequence appears in no later `StepOutput`.
        """
        answer = self._answers.get(sequence_id)
        if answer is None:
            return False
        self._finish(answer, FinishReason.ABORT)
        return True

    def step(self) -> list[StepOutput]:
        """Advance every running sequence; prompts advance by what the token budget leaves.

        A sequence whose prompt is not finished yet has no output.
        """
        works = self._scheduler.plan()
        if not works:
            return []
        logits = self._paged.step([work.chunk for work in works])
        outputs, row = [], 0
        for work in works:
            rows = logits[row : row + work.chunk.num_logits]
            row += work.chunk.num_logits
            output = self._advance(work, rows)
            if output is not None:
                outputs.append(output)
        return outputs

    def _scheduler_config(self) -> SchedulerConfig:
        return SchedulerConfig(
            max_num_sequences=self.config.max_num_sequences,
            max_tokens_per_step=self.config.max_tokens_per_step,
            context_length=self.context_length,
            has_fixed_chunks=not self._paged.can_cut_anywhere,
            vocab_size=min(self._tokenizer.vocab_size, self.executor.vocab_size),
            draft=self.config.draft,
        )

    def _check_prompt(self, token_ids: list[int]) -> None:
        if not token_ids:
            raise EmptyPrompt
        if len(token_ids) >= self.context_length:
            raise PromptTooLong(len(token_ids), self.context_length)
        vocab_size = self.executor.vocab_size
        for token_id in token_ids:
            if not 0 <= token_id < vocab_size:
                raise InvalidPrompt(f"token id {token_id} is outside [0, {vocab_size})")

    def _check_bias(self, params: SamplingParams) -> None:
        vocab_size = self._tokenizer.vocab_size
        for token_id, _ in params.logit_bias:
            if token_id >= vocab_size:
                raise InvalidSampling("logit_bias", token_id, f"a token id below {vocab_size}")

    def _advance(self, work: Work, logits: Logits) -> StepOutput | None:
        """Draw the tokens that a step's logits (num_logits, vocab_size) allow."""
        answer = self._answers[work.scheduled.sequence.id]
        gain, reason = _Gain(), None
        for index, row in enumerate(logits):
            reason = self._accept(answer, row, gain)
            is_guessed = index < len(work.drafts) and work.drafts[index] == gain.token_ids[-1]
            if reason is not None or not is_guessed:
                break
            gain.num_accepted += 1
        self._num_drafted += len(work.drafts)
        self._num_accepted += gain.num_accepted
        self._scheduler.computed(work, gain.num_accepted)
        if not gain.token_ids:
            return None
        if reason is not None:
            gain.text += answer.detokenizer.flush()
            self._finish(answer, reason)
        return _output(answer.sequence, gain, reason)

    def _accept(self, answer: _Answer, logits: Logits, gain: _Gain) -> FinishReason | None:
        """Sample one token from (vocab_size,) logits and append it."""
        sequence = answer.sequence
        # Models pad their vocabulary; an id that stands for no text must never be drawn.
        logits = logits[: self._tokenizer.vocab_size]
        token_id = answer.sampler.choose(
            logits, sequence.prompt_token_ids, sequence.output_token_ids
        )
        logprobs = answer.sampler.logprobs(logits, token_id)
        sequence.output_token_ids.append(token_id)
        gain.token_ids.append(token_id)
        if logprobs is not None:
            gain.logprobs.append(logprobs)
        is_eos = token_id in self._tokenizer.eos_token_ids and not sequence.params.ignore_eos
        if not is_eos:
            gain.text += answer.detokenizer.push(token_id)
        return self._finish_reason(answer, is_eos)

    def _finish_reason(self, answer: _Answer, is_eos: bool) -> FinishReason | None:
        sequence = answer.sequence
        if is_eos or answer.detokenizer.is_stopped:
            return FinishReason.STOP
        is_full = sequence.num_tokens >= self.context_length
        if is_full or len(sequence.output_token_ids) >= sequence.params.max_tokens:
            return FinishReason.LENGTH
        return None

    def _finish(self, answer: _Answer, reason: FinishReason) -> None:
        answer.sequence.finish_reason = reason
        del self._answers[answer.sequence.id]
        for page in self._scheduler.remove(answer.scheduled):
            self._paged.forget(page)


def _check(config: EngineConfig, executor: Executor | PagedExecutor, paged: PagedExecutor) -> None:
    if isinstance(executor, Executor) and config.max_num_sequences > executor.max_num_sequences:
        raise InvalidConfig(
            "max_num_sequences",
            config.max_num_sequences,
            f"at most {executor.max_num_sequences}, the executor's number of caches",
        )
    if config.draft.num_tokens and not paged.can_rewind:
        raise InvalidConfig(
            "draft.num_tokens",
            config.draft.num_tokens,
            f"0 with the executor {executor.name!r}, which cannot take tokens back",
        )


def _output(sequence: Sequence, gain: _Gain, reason: FinishReason | None) -> StepOutput:
    num_output_tokens = len(sequence.output_token_ids)
    return StepOutput(
        sequence_id=sequence.id,
        token_ids=tuple(gain.token_ids),
        text=gain.text,
        finish_reason=reason,
        num_prompt_tokens=len(sequence.prompt_token_ids),
        num_output_tokens=num_output_tokens,
        is_first=num_output_tokens == len(gain.token_ids),
        logprobs=tuple(gain.logprobs),
    )
