"""Decides what the next step computes: which sequences, how many tokens of each, on which pages.

First come, first served. Every running sequence gets its next token before any prompt advances;
prompts share what is left of the step's token budget, so that a long one never makes the others
wait for it whole. When pages run out the youngest sequence gives up its own and starts over later.
Knows no logits and no text.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from vqllm.errors import InvalidConfig
from vqllm.runtime.drafting import DraftConfig, draft
from vqllm.runtime.executors.paged import Chunk
from vqllm.runtime.pages import PageManager
from vqllm.runtime.sequence import Sequence


@dataclass(frozen=True)
class SchedulerConfig:
    """Limits of one step: sequences, tokens, and tokens that one sequence may ever have.

    Attributes:
        has_fixed_chunks: prompts are cut at multiples of `max_tokens_per_step` alone, never at
            what the others left of a step, which may then take up to twice as many tokens.
        vocab_size: logits that tokens are drawn from, the first ones; 0 if not known.
    """

    max_num_sequences: int
    max_tokens_per_step: int
    context_length: int
    has_fixed_chunks: bool = False
    vocab_size: int = 0
    draft: DraftConfig = field(default_factory=DraftConfig)

    def __post_init__(self) -> None:
        for name in ("max_num_sequences", "max_tokens_per_step", "context_length"):
            if getattr(self, name) < 1:
                raise InvalidConfig(name, getattr(self, name), "at least 1")


@dataclass(eq=False)
class Scheduled:
    """A sequence with its place in the KV cache.

    Attributes:
        pages: page table; empty while the sequence waits.
        num_computed: positions whose keys and values are in the pages.
        num_published: leading pages that were offered for sharing.
    """

    sequence: Sequence
    pages: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_published: int = 0

    @property
    def token_ids(self) -> list[int]:
        return self.sequence.prompt_token_ids + self.sequence.output_token_ids

    @property
    def num_pending(self) -> int:
        """Tokens that are known but not computed; 1 while the sequence decodes."""
        return self.sequence.num_tokens - self.num_computed


@dataclass(frozen=True)
class Work:
    """One sequence's part of a step; `drafts` are the guessed tokens at the end of the chunk."""

    scheduled: Scheduled
    chunk: Chunk
    drafts: tuple[int, ...] = ()


class Scheduler:
    """Waiting and running sequences. Not thread-safe."""

    def __init__(self, pages: PageManager, config: SchedulerConfig) -> None:
        """Raises InvalidConfig when one sequence of full length would not fit the pages."""
        needed = pages.pages_for(config.context_length)
        if needed > pages.num_pages:
            raise InvalidConfig(
                "num_pages", pages.num_pages, f"at least {needed}, what one whole context takes"
            )
        self.pages = pages
        self.config = config
        self.waiting: deque[Scheduled] = deque()
        self.running: list[Scheduled] = []
        self.num_preemptions = 0
        self._preemptions_before = 0

    def add(self, sequence: Sequence) -> Scheduled:
        """Queue a sequence behind all others."""
        scheduled = Scheduled(sequence)
        self.waiting.append(scheduled)
        return scheduled

    def remove(self, scheduled: Scheduled) -> list[int]:
        """Drop a sequence, running or waiting; returns the pages that became free."""
        if scheduled in self.running:
            self.running.remove(scheduled)
        else:
            self.waiting.remove(scheduled)
        return self._release(scheduled)

    def plan(self) -> list[Work]:
        """What to compute now. Sequences gain the pages for it; some may lose theirs."""
        budget = self.config.max_tokens_per_step
        works: dict[Scheduled, Work] = {}
        self._preemptions_before = self.num_preemptions
        decoding = self._decoding()
        budget -= len(decoding)  # may go below 0: decoding is never held up
        for scheduled in decoding:
            work = self._work(scheduled, 1, budget)
            if work is not None:
                works[scheduled] = work
                budget -= len(work.drafts)
        for scheduled in self._prefilling():
            if budget <= 0:
                break
            limit = self.config.max_tokens_per_step if self.config.has_fixed_chunks else budget
            work = self._work(scheduled, min(scheduled.num_pending, limit), 0)
            if work is not None:
                works[scheduled] = work
                budget -= len(work.chunk.token_ids)
        return [work for scheduled, work in works.items() if scheduled in self.running]

    def computed(self, work: Work, num_accepted: int) -> None:
        """A step has run: count its tokens, with `num_accepted` right guesses among them."""
        scheduled, chunk = work.scheduled, work.chunk
        num_certain = len(chunk.token_ids) - len(work.drafts)
        scheduled.num_computed = chunk.start + num_certain + num_accepted
        num_full = scheduled.num_computed // self.pages.page_size
        if num_full > scheduled.num_published:
            tokens = scheduled.sequence.tokens(0, scheduled.num_computed)
            self.pages.publish(scheduled.pages, tokens, scheduled.num_published)
            scheduled.num_published = num_full

    def _decoding(self) -> list[Scheduled]:
        return [scheduled for scheduled in self.running if scheduled.num_pending == 1]

    def _prefilling(self) -> Iterator[Scheduled]:
        """Running sequences with tokens to catch up, then newcomers as they are admitted."""
        yield from [scheduled for scheduled in self.running if scheduled.num_pending > 1]
        while (newcomer := self._admit()) is not None:
            yield newcomer

    def _admit(self) -> Scheduled | None:
        is_short_of_pages = self.num_preemptions > self._preemptions_before
        is_full = len(self.running) >= self.config.max_num_sequences
        if not self.waiting or is_full or is_short_of_pages:
            return None
        scheduled = self.waiting[0]
        tokens = scheduled.token_ids
        shared = self.pages.share_prefix(tokens)
        # One page more than the tokens need, or the newcomer would be thrown out again at once.
        needed = self.pages.pages_for(min(len(tokens) + 1, self.config.context_length))
        if needed - len(shared) > self.pages.num_available:
            self.pages.release(shared)
            return None
        self.pages.count_prefix(len(shared), len(tokens))
        scheduled.pages = shared
        scheduled.num_computed = len(shared) * self.pages.page_size
        scheduled.num_published = len(shared)
        self.waiting.popleft()
        self.running.append(scheduled)
        return scheduled

    def _work(self, scheduled: Scheduled, num_tokens: int, num_guesses: int) -> Work | None:
        """A chunk of `num_tokens` and at most `num_guesses` guessed ones; None if preempted."""
        if scheduled not in self.running:
            return None
        start = scheduled.num_computed
        drafts = self._drafts(scheduled, num_guesses)
        if not self._reserve(scheduled, start + num_tokens + len(drafts)):
            return None
        is_last = num_tokens == scheduled.num_pending
        tokens = [*scheduled.sequence.tokens(start, start + num_tokens), *drafts]
        num_logits = 1 + len(drafts) if is_last else 0
        largest_of = self.config.vocab_size if scheduled.sequence.params.is_argmax else 0
        chunk = Chunk(tuple(scheduled.pages), start, tokens, num_logits, largest_of)
        return Work(scheduled, chunk, drafts)

    def _drafts(self, scheduled: Scheduled, limit: int) -> tuple[int, ...]:
        sequence, config = scheduled.sequence, self.config
        if config.draft.num_tokens == 0 or limit <= 0:
            return ()
        room = min(
            config.context_length - sequence.num_tokens,
            sequence.params.max_tokens - len(sequence.output_token_ids) - 1,
            limit,
        )
        return tuple(draft(scheduled.token_ids, config.draft, room))

    def _reserve(self, scheduled: Scheduled, num_positions: int) -> bool:
        """Pages up to `num_positions`, taken from younger sequences if need be."""
        while len(scheduled.pages) < self.pages.pages_for(num_positions):
            page = self.pages.allocate()
            if page is not None:
                scheduled.pages.append(page)
                continue
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is scheduled:
                return False
        return True

    def _preempt(self, scheduled: Scheduled) -> None:
        self.running.remove(scheduled)
        self._release(scheduled)
        self.waiting.appendleft(scheduled)
        self.num_preemptions += 1

    def _release(self, scheduled: Scheduled) -> list[int]:
        gone = self.pages.release(scheduled.pages)
        scheduled.pages = []
        scheduled.num_computed = scheduled.num_published = 0
        return gone
