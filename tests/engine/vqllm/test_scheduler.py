"""Paging, sharing, preemption and guessing, on an executor that reads its own pages.

`HistoryExecutor` writes tokens into pages and makes every logit from the whole history as the page
table shows it, so a page that is shared, freed or overwritten wrongly changes the answer.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vqllm.errors import InvalidConfig
from vqllm.runtime.drafting import DraftConfig, draft
from vqllm.runtime.engine import Engine, EngineConfig
from vqllm.runtime.executors.base import Logits
from vqllm.runtime.executors.paged import Chunk, PagedExecutor
from vqllm.runtime.pages import PageManager
from vqllm.runtime.sampling import SamplingParams

PAGE_SIZE = 4
CONTEXT = 40
VOCABULARY = 24


class HistoryExecutor(PagedExecutor):
    """Draws the next token from a generator that is seeded by all tokens before it."""

    name = "history"
    vocab_size = VOCABULARY
    context_length = CONTEXT
    page_size = PAGE_SIZE
    providers = ("none",)

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.memory = np.full((num_pages, PAGE_SIZE), -1, dtype=np.int64)
        self.num_tokens = 0
        self.largest_step = 0
        self.largest_of: list[int] = []

    def step(self, chunks: Sequence[Chunk]) -> Logits:
        rows = []
        sizes = [len(chunk.token_ids) for chunk in chunks]
        self.num_tokens += sum(sizes)
        self.largest_step = max(self.largest_step, sum(sizes))
        self.largest_of += [chunk.largest_of for chunk in chunks]
        for chunk in chunks:
            stop = chunk.start + len(chunk.token_ids)
            for position, token_id in enumerate(chunk.token_ids, start=chunk.start):
                self.memory[chunk.pages[position // PAGE_SIZE], position % PAGE_SIZE] = token_id
            history = self.memory[list(chunk.pages)].ravel()
            rows += [_logits(history[: p + 1]) for p in range(stop - chunk.num_logits, stop)]
        return np.stack(rows) if rows else np.empty((0, VOCABULARY), dtype=np.float32)


def _logits(history: np.ndarray) -> Logits:
    # Text that repeats itself now and then, so that guesses are sometimes right.
    seed = [int(t) for t in history[-3:]] + [len(history) % 3, int(history.sum()) % 5]
    return np.random.default_rng(seed).normal(size=VOCABULARY).astype(np.float32) * 4


class Letters:
    """Token i is one letter; nothing ends an answer but its length."""

    eos_token_ids: frozenset[int] = frozenset()
    vocab_size = VOCABULARY

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([ord("a") + token_id])


@dataclass(frozen=True)
class Prompt:
    """A request of a random history."""

    token_ids: list[int]
    params: SamplingParams


def make_engine(num_pages: int, **values: object) -> tuple[Engine, HistoryExecutor]:
    executor = HistoryExecutor(num_pages)
    config = {"max_num_sequences": 4, "max_tokens_per_step": 8} | values
    return Engine(executor, Letters(), EngineConfig(**config)), executor  # type: ignore[arg-type]


def run_alone(prompt: Prompt) -> tuple[list[int], str]:
    engine, _ = make_engine(num_pages=CONTEXT // PAGE_SIZE)
    sequence = engine.add("a", prompt.token_ids, prompt.params)
    text = ""
    while engine.has_work:
        text += "".join(output.text for output in engine.step())
    return sequence.output_token_ids, text


def assert_no_page_is_held(engine: Engine) -> None:
    assert engine.stats.pages_used == 0
    assert engine.stats.kv_tokens_used == 0
    assert not engine.has_work


@st.composite
def prompts(draw: st.DrawFn) -> Prompt:
    """Prompts that often begin alike."""
    prefix = list(range(draw(st.integers(0, 16))))
    rest = draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=10))
    params = SamplingParams(
        max_tokens=draw(st.integers(1, 14)),
        temperature=draw(st.sampled_from([0.0, 1.0])),
        seed=draw(st.integers(0, 9)),
        repetition_penalty=draw(st.sampled_from([1.0, 1.2])),
    )
    return Prompt(prefix + rest, params)


@settings(max_examples=150, deadline=None)
@given(
    requests=st.lists(prompts(), min_size=1, max_size=7),
    num_pages=st.integers(CONTEXT // PAGE_SIZE, 16),
    draft_tokens=st.sampled_from([0, 3]),
    budget=st.integers(1, 20),
    seed=st.integers(0, 2**16),
)
def test_any_history_gives_each_sequence_the_tokens_it_has_alone(
    requests: list[Prompt], num_pages: int, draft_tokens: int, budget: int, seed: int
) -> None:
    choice = random.Random(seed)
    engine, executor = make_engine(
        num_pages,
        max_tokens_per_step=budget,
        draft=DraftConfig(num_tokens=draft_tokens, min_match=1, window=32),
    )
    waiting = list(enumerate(requests))
    sequences, texts, aborted = {}, dict.fromkeys(range(len(requests)), ""), set()
    while waiting or engine.has_work:
        if waiting and choice.random() < 0.5:
            number, prompt = waiting.pop()
            sequences[number] = engine.add(str(number), prompt.token_ids, prompt.params)
        if sequences and choice.random() < 0.08:
            number = choice.choice(list(sequences))
            if engine.abort(str(number)):
                aborted.add(number)
        for output in engine.step():
            texts[int(output.sequence_id)] += output.text
    assert_no_page_is_held(engine)
    assert executor.largest_step <= max(budget, 4)
    for number in set(sequences) - aborted:
        tokens, text = run_alone(requests[number])
        assert sequences[number].output_token_ids == tokens
        assert texts[number] == text


def test_pages_run_out_and_the_youngest_starts_over() -> None:
    engine, _ = make_engine(num_pages=10)
    prompts = [Prompt([i] * 12, SamplingParams(max_tokens=20, temperature=0)) for i in range(3)]
    sequences = [engine.add(str(i), p.token_ids, p.params) for i, p in enumerate(prompts)]
    while engine.has_work:
        engine.step()
    assert engine.stats.preemptions > 0
    for sequence, prompt in zip(sequences, prompts, strict=True):
        assert sequence.output_token_ids == run_alone(prompt)[0]


def test_a_known_beginning_is_not_computed_again() -> None:
    engine, executor = make_engine(num_pages=20, max_tokens_per_step=64)
    params = SamplingParams(max_tokens=1, temperature=0)
    system = list(range(16))
    engine.add("a", [*system, 20], params)
    while engine.has_work:
        engine.step()
    computed = executor.num_tokens
    engine.add("b", [*system, 21], params)
    while engine.has_work:
        engine.step()
    assert executor.num_tokens - computed == 1
    assert engine.stats.prefix_hit_tokens == 16


def test_sequences_that_run_together_share_pages() -> None:
    engine, _ = make_engine(num_pages=20, max_tokens_per_step=64)
    params = SamplingParams(max_tokens=8, temperature=0)
    engine.add("a", list(range(17)), params)
    engine.step()
    engine.add("b", list(range(17)), params)
    engine.step()
    assert engine.stats.pages_used == 4 + 1 + 1


def test_a_long_prompt_does_not_hold_up_the_others() -> None:
    engine, executor = make_engine(num_pages=20, max_tokens_per_step=6)
    engine.add("a", [1, 2], SamplingParams(max_tokens=20, temperature=0))
    engine.step()
    engine.add("b", [3] * 20, SamplingParams(max_tokens=1, temperature=0))
    for _ in range(3):
        assert [output.sequence_id for output in engine.step()] == ["a"]
    assert executor.largest_step <= 6


class CuttingExecutor(HistoryExecutor):
    """Notes where the prompts were cut, by their first token."""

    can_share_pages = False
    can_cut_anywhere = False

    def __init__(self, num_pages: int) -> None:
        super().__init__(num_pages)
        self.cuts: dict[int, list[int]] = {}

    def step(self, chunks: Sequence[Chunk]) -> Logits:
        logits = super().step(chunks)
        for chunk in chunks:
            first = int(self.memory[chunk.pages[0], 0])
            self.cuts.setdefault(first, []).append(chunk.start)
        return logits


def test_where_a_prompt_is_cut_may_not_depend_on_the_others() -> None:
    executor = CuttingExecutor(40)
    engine = Engine(executor, Letters(), EngineConfig(max_num_sequences=4, max_tokens_per_step=6))
    params = SamplingParams(max_tokens=2, temperature=0)
    for first in range(4):
        engine.add(str(first), [first] * (15 - first), params)
        engine.step()
    while engine.has_work:
        engine.step()
    expected = {first: [0, 6, 12, 15 - first] for first in range(3)} | {3: [0, 6, 12]}
    assert executor.cuts == expected
    assert executor.largest_step < 2 * 6


def test_the_executor_is_told_how_many_logits_a_greedy_draw_looks_at() -> None:
    engine, executor = make_engine(num_pages=20)
    engine.add("greedy", [1, 2, 3], SamplingParams(temperature=0.0, max_tokens=1))
    engine.step()
    engine.add("drawn", [1, 2, 3], SamplingParams(temperature=0.5, max_tokens=1))
    engine.step()
    assert executor.largest_of == [VOCABULARY, 0]
    assert not engine.has_work


def test_guesses_save_steps_and_change_nothing() -> None:
    class Parrot(HistoryExecutor):
        def step(self, chunks: Sequence[Chunk]) -> Logits:
            super().step(chunks)
            wanted = [
                chunk.token_ids[len(chunk.token_ids) - chunk.num_logits + i]
                for chunk in chunks
                for i in range(chunk.num_logits)
            ]
            return np.eye(VOCABULARY, dtype=np.float32)[[(t + 1) % 3 for t in wanted]]

    steps = {}
    for num_tokens in (0, 4):
        config = EngineConfig(draft=DraftConfig(num_tokens=num_tokens))
        engine = Engine(Parrot(20), Letters(), config)
        params = SamplingParams(max_tokens=20, temperature=0)
        sequence = engine.add("a", [0, 1, 2, 0, 1, 2, 0], params)
        steps[num_tokens] = 0
        while engine.has_work:
            engine.step()
            steps[num_tokens] += 1
        assert sequence.output_token_ids == [(i + 1) % 3 for i in range(20)]
    assert steps[4] < steps[0] / 3
    assert engine.stats.accepted_tokens > 10


def test_an_abort_between_steps_returns_every_page() -> None:
    engine, _ = make_engine(num_pages=20)
    for name in "abcdef":
        engine.add(name, [1] * 9, SamplingParams(max_tokens=9))
    engine.step()
    for name in "abcdef":
        assert engine.abort(name)
    assert_no_page_is_held(engine)


def test_too_few_pages_for_one_context_are_refused() -> None:
    with pytest.raises(InvalidConfig, match="num_pages is 9, allowed is at least 10"):
        make_engine(num_pages=9)


def test_a_page_may_not_be_released_twice() -> None:
    pages = PageManager(2, PAGE_SIZE)
    page = pages.allocate()
    assert page is not None
    pages.release([page])
    with pytest.raises(RuntimeError, match="released more often"):
        pages.release([page])


def test_reusable_pages_go_oldest_chain_end_first() -> None:
    pages = PageManager(3, 2)
    held = [page for _ in range(3) if (page := pages.allocate()) is not None]
    pages.publish(held, [1, 2, 3, 4, 5, 6], 0)
    pages.release(held)
    assert pages.allocate() == held[2]
    assert pages.share_prefix([1, 2, 3, 4, 9]) == held[:2]


@pytest.mark.parametrize(
    ("tokens", "limit", "guess"),
    [
        ([1, 2, 3, 1, 2], 8, [3, 1, 2]),
        ([1, 2, 3, 1, 2], 1, [3]),
        ([1, 2, 3, 4], 8, []),
        ([5], 8, []),
        ([1, 2, 3, 1, 2], 0, []),
    ],
)
def test_a_guess_is_what_followed_last_time(
    tokens: list[int], limit: int, guess: list[int]
) -> None:
    assert draft(tokens, DraftConfig(num_tokens=3), limit) == guess


@pytest.mark.parametrize(
    "values", [{"num_tokens": -1}, {"min_match": 0}, {"min_match": 5}, {"window": 4}]
)
def test_draft_settings_are_checked(values: dict[str, int]) -> None:
    with pytest.raises(InvalidConfig):
        DraftConfig(**values)
