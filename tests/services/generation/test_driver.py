"""The engine's thread: streams, aborts within one step, admission, failures, and the end."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest
from prometheus_client import CollectorRegistry

from support.llmd import ANSWER, FakeExecutor, byte_tokenizer
from vqllm.runtime.engine import Engine, EngineConfig
from vqllm.runtime.executors.base import Logits
from vqllm.runtime.sampling import SamplingParams
from vqllm.runtime.sequence import FinishReason
from vqserve.common.admission import AdmissionGate
from vqserve.common.errors import ResourceExhausted
from vqserve.common.metrics import ServerMetrics
from vqserve.generation.driver import EngineDriver, SequenceStream
from vqserve.generation.errors import EmptyPrompt, EngineFailed, EngineStopped
from vqserve.generation.metrics import LlmMetrics, ModelMetrics


class SteppedExecutor(FakeExecutor):
    """Waits for the test before every step, so that the test decides what happens in between."""

    def __init__(self) -> None:
        tokenizer = byte_tokenizer()
        super().__init__(tokenizer.encode(ANSWER), tokenizer.vocab_size, 0.0)
        self.may_step = threading.Semaphore(0)

    def prefill(self, cache: int, token_ids: Sequence[int]) -> Logits:
        self.may_step.acquire()
        return super().prefill(cache, token_ids)

    def decode(self, caches: Sequence[int], token_ids: Sequence[int]) -> Logits:
        self.may_step.acquire()
        return super().decode(caches, token_ids)


class World:
    """A driver with everything around it."""

    def __init__(self, executor: FakeExecutor, limit: int, running: int) -> None:
        config = EngineConfig(max_num_sequences=running, max_waiting=limit)
        self.executor = executor
        self.registry = CollectorRegistry()
        self.engine = Engine(executor, byte_tokenizer(), config)
        gate = AdmissionGate(limit, running, ServerMetrics("llmd", "0"))
        metrics = ModelMetrics(LlmMetrics(self.registry), "fake")
        self.is_lost = False
        self.driver = EngineDriver(self.engine, gate, metrics, self._lose)

    def _lose(self) -> None:
        self.is_lost = True

    async def submit(self, max_tokens: int = 8, prompt: Sequence[int] = (1, 2)) -> SequenceStream:
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
        return await self.driver.submit(list(prompt), params, arrived_at=0.0)

    def metric(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(name, {"model": "fake", **labels}) or 0.0


@asynccontextmanager
async def world(
    executor: FakeExecutor | None = None, limit: int = 4, running: int = 2
) -> AsyncIterator[World]:
    tokenizer = byte_tokenizer()
    default = FakeExecutor(tokenizer.encode(ANSWER), tokenizer.vocab_size, 0.0)
    made = World(executor or default, limit, running)
    try:
        yield made
    finally:
        if isinstance(made.executor, SteppedExecutor):
            made.executor.may_step.release(1000)
        await made.driver.close()


async def collect(stream: SequenceStream) -> str:
    async with stream:
        return "".join([output.text async for output in stream])


async def test_a_stream_yields_the_answer_and_ends() -> None:
    async with world() as w:
        stream = await w.submit(max_tokens=6)
        outputs = [output async for output in stream]
        assert "".join(output.text for output in outputs) == ANSWER[:6]
        assert outputs[-1].finish_reason is FinishReason.LENGTH
        assert w.metric("llm_requests_total", finish_reason="length") == 1
        assert w.metric("llm_generation_tokens_total") == 6
        assert w.metric("llm_prompt_tokens_total") == 2
        assert w.metric("llm_inter_token_latency_seconds_count") == 5
        assert w.metric("llm_time_to_first_token_seconds_count") == 1


async def test_sequences_run_together_and_each_gets_its_own_tokens() -> None:
    async with world(limit=4, running=2) as w:
        streams = [await w.submit(max_tokens=length) for length in (3, 7, 1, 5)]
        texts = await asyncio.gather(*map(collect, streams))
    assert texts == [ANSWER[:length] for length in (3, 7, 1, 5)]


async def test_leaving_a_stream_frees_its_sequence_before_the_next_step() -> None:
    executor = SteppedExecutor()
    async with world(executor) as w:
        executor.may_step.release(3)
        async with await w.submit(max_tokens=100) as stream:
            for _ in range(3):
                await anext(stream)
        # One step may have been under way when the stream was left; it is the last one.
        executor.may_step.release(100)
        await w.driver.wait_idle()
        assert executor.num_steps <= 4
        assert not w.engine.has_work
        assert w.metric("llm_requests_running") == 0
        assert w.metric("llm_kv_cache_usage_ratio") == 0
        assert w.metric("llm_requests_total", finish_reason="abort") == 1


async def test_a_cancelled_submit_leaves_nothing_behind() -> None:
    executor = SteppedExecutor()
    async with world(executor) as w:
        first = await w.submit(max_tokens=100)
        second = asyncio.create_task(w.submit(max_tokens=100))
        await asyncio.sleep(0)
        second.cancel()
        first.close()
        executor.may_step.release(100)
        await w.driver.wait_idle()
        assert not w.engine.has_work
        assert second.cancelled()


async def test_a_full_queue_refuses_and_says_when_to_retry() -> None:
    executor = SteppedExecutor()
    async with world(executor, limit=2, running=1) as w:
        streams = [await w.submit(max_tokens=2)]
        waiting = asyncio.create_task(w.submit(max_tokens=2))
        await asyncio.sleep(0)
        with pytest.raises(ResourceExhausted) as refusal:
            await w.submit()
        assert refusal.value.retry_after_seconds is not None
        assert w.metric("llm_requests_rejected_total", reason="queue_full") == 1
        executor.may_step.release(100)
        streams.append(await waiting)
        assert await asyncio.gather(*map(collect, streams)) == [ANSWER[:2]] * 2
        assert await collect(await w.submit(max_tokens=3)) == ANSWER[:3]


async def test_a_refused_prompt_holds_no_place() -> None:
    async with world(limit=1, running=1) as w:
        for _ in range(3):
            with pytest.raises(EmptyPrompt):
                await w.submit(prompt=())
        await w.driver.wait_idle()
        assert await collect(await w.submit(max_tokens=1)) == ANSWER[:1]


async def test_a_failed_step_answers_everyone_and_the_engine_goes_on() -> None:
    tokenizer = byte_tokenizer()
    # Steps so slow that the second request is there before the one that fails.
    executor = FakeExecutor(tokenizer.encode(ANSWER), tokenizer.vocab_size, 0.05)
    async with world(executor) as w:
        executor.fails_at_step = 20
        streams = [await w.submit(max_tokens=50) for _ in range(2)]
        results = await asyncio.gather(*map(collect, streams), return_exceptions=True)
        assert [type(result) for result in results] == [EngineFailed, EngineFailed]
        await w.driver.wait_idle()
        assert w.metric("llm_engine_failures_total") == 1
        assert w.metric("llm_requests_total", finish_reason="error") == 2
        assert await collect(await w.submit(max_tokens=4)) == ANSWER[:4]


async def test_an_engine_that_cannot_abort_is_given_up() -> None:
    async with world() as w:
        w.executor.fails_at_step = 2
        w.executor.can_free = False
        with pytest.raises(EngineFailed):
            await collect(await w.submit(max_tokens=50))
        with pytest.raises(EngineStopped):
            await w.submit()
        assert not w.driver.is_alive
        await w.driver.wait_idle()
        assert w.is_lost


async def test_closing_ends_open_streams_with_abort() -> None:
    executor = SteppedExecutor()
    async with world(executor) as w:
        stream = await w.submit(max_tokens=100)
        closing = asyncio.create_task(w.driver.close())
        await asyncio.sleep(0)
        executor.may_step.release(2)
        outputs = [output async for output in stream]
        await closing
        assert outputs[-1].finish_reason is FinishReason.ABORT
        with pytest.raises(EngineStopped):
            await w.submit()
