"""Scheduling, stopping and limits of the engine, on an executor that counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from vqllm.errors import (
    DuplicateSequence,
    EmptyPrompt,
    InvalidConfig,
    InvalidPrompt,
    PromptTooLong,
    QueueFull,
)
from vqllm.runtime.engine import Engine, EngineConfig, StepOutput
from vqllm.runtime.executors.base import Executor, Logits
from vqllm.runtime.sampling import SamplingParams
from vqllm.runtime.sequence import FinishReason

EOS = 0


class CountingExecutor(Executor):
    """The most probable token is always the last one plus one; caches only count tokens."""

    name = "counting"
    vocab_size = 128
    context_length = 32
    max_num_sequences = 4
    providers = ("none",)

    def __init__(self) -> None:
        self.lengths: dict[int, int] = {}
        self.batches: list[int] = []
        self._next = 0

    def allocate(self) -> int:
        self._next += 1
        self.lengths[self._next] = 0
        return self._next

    def free(self, cache: int) -> None:
        del self.lengths[cache]

    def prefill(self, cache: int, token_ids: Sequence[int]) -> Logits:
        self.lengths[cache] += len(token_ids)
        return self._logits(token_ids[-1])

    def decode(self, caches: Sequence[int], token_ids: Sequence[int]) -> Logits:
        self.batches.append(len(caches))
        for cache in caches:
            self.lengths[cache] += 1
        return np.stack([self._logits(token_id) for token_id in token_ids])

    def score(self, token_ids: Sequence[int]) -> Logits:
        return np.stack([self._logits(token_id) for token_id in token_ids])

    def _logits(self, last: int) -> Logits:
        logits = np.zeros(self.vocab_size, dtype=np.float32)
        logits[(last + 1) % self.vocab_size] = 3.0
        return logits


class AsciiTokenizer:
    """Token i is the character of code i; 0 ends."""

    eos_token_ids = frozenset({EOS})
    vocab_size = 128

    def token_bytes(self, token_id: int) -> bytes:
        return b"" if token_id == EOS else bytes([token_id])


GREEDY = SamplingParams(temperature=0, max_tokens=5)


def make_engine(**limits: int) -> Engine:
    config = replace(EngineConfig(max_num_sequences=4), **limits)  # type: ignore[arg-type]
    return Engine(CountingExecutor(), AsciiTokenizer(), config)


def run(engine: Engine) -> dict[str, list[StepOutput]]:
    """Step until idle; outputs by sequence."""
    outputs: dict[str, list[StepOutput]] = {}
    while engine.has_work:
        for output in engine.step():
            outputs.setdefault(output.sequence_id, []).append(output)
    return outputs


def text(outputs: list[StepOutput]) -> str:
    return "".join(output.text for output in outputs)


def test_one_sequence_runs_to_its_length_limit() -> None:
    engine = make_engine()
    sequence = engine.add("a", [ord("a")], GREEDY)
    outputs = run(engine)["a"]
    assert text(outputs) == "bcdef"
    assert [output.is_first for output in outputs] == [True] + [False] * 4
    assert [output.num_output_tokens for output in outputs] == [1, 2, 3, 4, 5]
    assert outputs[-1].finish_reason is FinishReason.LENGTH is sequence.finish_reason
    assert all(output.finish_reason is None for output in outputs[:-1])


def test_the_end_token_stops_without_showing() -> None:
    engine = make_engine()
    engine.add("a", [126], GREEDY)
    outputs = run(engine)["a"]
    assert text(outputs) == "\x7f"
    assert outputs[-1].finish_reason is FinishReason.STOP
    assert outputs[-1].token_ids == (EOS,)


def test_ignore_eos_goes_on() -> None:
    engine = make_engine()
    engine.add("a", [126], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
    assert run(engine)["a"][-1].finish_reason is FinishReason.LENGTH


def test_a_stop_string_ends_the_sequence_before_it() -> None:
    engine = make_engine()
    engine.add("a", [ord("a")], SamplingParams(temperature=0, stop=("de",)))
    outputs = run(engine)["a"]
    assert text(outputs) == "bc"
    assert outputs[-1].finish_reason is FinishReason.STOP


def test_the_context_length_ends_a_sequence() -> None:
    engine = make_engine(context_length=10)
    engine.add("a", [ord("a")] * 7, SamplingParams(temperature=0, max_tokens=100))
    outputs = run(engine)["a"]
    assert len(outputs) == 3
    assert outputs[-1].finish_reason is FinishReason.LENGTH


def test_padding_of_the_vocabulary_is_never_drawn() -> None:
    class PaddedExecutor(CountingExecutor):
        vocab_size = 160

        def _logits(self, last: int) -> Logits:
            logits = super()._logits(last)
            logits[AsciiTokenizer.vocab_size :] = 9.0
            return logits

    engine = Engine(PaddedExecutor(), AsciiTokenizer(), EngineConfig(max_num_sequences=4))
    engine.add("a", [64], GREEDY)
    assert text(run(engine)["a"]) == "ABCDE"


def test_sequences_decode_in_one_batch() -> None:
    engine = make_engine()
    for name in "xyz":
        engine.add(name, [ord(name)], GREEDY)
    run(engine)
    assert isinstance(engine.executor, CountingExecutor)
    assert engine.executor.batches == [3, 3, 3, 3]


def test_newcomers_join_while_others_run() -> None:
    engine = make_engine()
    engine.add("a", [ord("a")], GREEDY)
    engine.step()
    engine.add("b", [ord("b")], GREEDY)
    assert {output.sequence_id for output in engine.step()} == {"a", "b"}


def test_no_more_than_the_allowed_number_runs() -> None:
    engine = make_engine(max_num_sequences=2)
    for name in "abc":
        engine.add(name, [65], GREEDY)
    engine.step()
    assert (engine.num_running, engine.num_waiting) == (2, 1)
    assert set(run(engine)) == {"a", "b", "c"}


def test_abort_frees_the_cache_at_once() -> None:
    engine = make_engine()
    sequence = engine.add("a", [65, 66], GREEDY)
    engine.step()
    assert engine.stats.kv_tokens_used == 3
    assert engine.abort("a")
    assert isinstance(engine.executor, CountingExecutor)
    assert engine.executor.lengths == {}
    assert engine.stats.kv_tokens_used == 0
    assert sequence.finish_reason is FinishReason.ABORT
    assert not engine.has_work
    assert engine.step() == []


def test_abort_removes_a_waiting_sequence() -> None:
    engine = make_engine()
    engine.add("a", [65], GREEDY)
    assert engine.abort("a")
    assert not engine.abort("a")
    assert not engine.has_work


def test_abort_of_one_leaves_the_others_answers_alone() -> None:
    engine = make_engine()
    for name in "ab":
        engine.add(name, [ord(name)], GREEDY)
    first = engine.step()
    engine.abort("a")
    rest = run(engine)["b"]
    assert text([output for output in first if output.sequence_id == "b"] + rest) == "cdefg"


def test_a_seeded_answer_does_not_depend_on_batch_mates() -> None:
    seeded = SamplingParams(seed=5, max_tokens=12, ignore_eos=True)
    alone = make_engine()
    alone.add("a", [65], seeded)
    expected = [output.token_ids for output in run(alone)["a"]]
    crowded = make_engine()
    for name, params in (("x", SamplingParams(seed=9)), ("a", seeded), ("y", GREEDY)):
        crowded.add(name, [65], params)
    assert [output.token_ids for output in run(crowded)["a"]] == expected


def test_finished_ids_may_be_used_again() -> None:
    engine = make_engine()
    engine.add("a", [65], GREEDY)
    run(engine)
    engine.add("a", [65], GREEDY)
    assert engine.num_waiting == 1


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(EmptyPrompt, match="no tokens"):
        make_engine().add("a", [], GREEDY)


def test_a_prompt_as_long_as_the_context_is_refused_naming_both_lengths() -> None:
    with pytest.raises(PromptTooLong, match="10 tokens, the context holds 10") as caught:
        make_engine(context_length=10).add("a", [65] * 10, GREEDY)
    assert (caught.value.num_prompt_tokens, caught.value.context_length) == (10, 10)


@pytest.mark.parametrize("token_id", [-1, 128])
def test_a_token_outside_the_vocabulary_is_refused(token_id: int) -> None:
    with pytest.raises(InvalidPrompt, match=f"token id {token_id}"):
        make_engine().add("a", [65, token_id], GREEDY)


def test_a_full_queue_refuses() -> None:
    engine = make_engine(max_waiting=1)
    engine.add("a", [65], GREEDY)
    with pytest.raises(QueueFull, match="1 sequences"):
        engine.add("b", [65], GREEDY)


def test_an_id_in_use_is_refused() -> None:
    engine = make_engine()
    engine.add("a", [65], GREEDY)
    with pytest.raises(DuplicateSequence, match="'a'"):
        engine.add("a", [65], GREEDY)


def test_limits_beyond_the_model_are_refused() -> None:
    with pytest.raises(InvalidConfig, match="at most 32"):
        make_engine(context_length=33)
    with pytest.raises(InvalidConfig, match="at most 4"):
        make_engine(max_num_sequences=5)
    with pytest.raises(InvalidConfig, match="max_waiting is 0"):
        make_engine(max_waiting=0)
