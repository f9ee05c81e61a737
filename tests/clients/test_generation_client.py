"""GenerationClient against an in-process fake of the service."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest
from grpc import StatusCode

from vqclient import (
    ClientOptions,
    DeadlineExceededError,
    FinishReason,
    GenerationClient,
    InternalError,
    InvalidArgumentError,
    Message,
    RetryPolicy,
    Sampling,
    TextPiece,
    collect,
)
from vqclient.testing import FakeGenerationService, refusal, serve

QUICK = ClientOptions(retry=RetryPolicy(initial_backoff=0.001, max_backoff=0.002))


@pytest.fixture
def service() -> FakeGenerationService:
    return FakeGenerationService()


@pytest.fixture
async def client(service: FakeGenerationService) -> AsyncIterator[GenerationClient]:
    async with serve(generation=service) as address, GenerationClient(address, QUICK) as client:
        yield client


async def test_text_streams_and_ends_with_the_usage(client: GenerationClient) -> None:
    pieces = [piece async for piece in client.generate("count")]
    assert [piece.text for piece in pieces] == ["one ", "two ", "three", ""]
    assert [piece.finish_reason for piece in pieces[:-1]] == [None, None, None]
    assert pieces[-1].finish_reason is FinishReason.STOP
    assert pieces[-1].usage is not None
    assert pieces[-1].usage.completion_tokens == 3


async def test_collect_joins_a_whole_answer(client: GenerationClient) -> None:
    answer = await collect(client.chat("count", sampling=Sampling(max_tokens=2)))
    assert answer.text == "one two "
    assert answer.token_ids == (0, 1)
    assert answer.finish_reason is FinishReason.LENGTH


async def test_collect_refuses_an_answer_without_an_end() -> None:
    async def torn() -> AsyncIterator[TextPiece]:
        yield TextPiece("half")

    with pytest.raises(InternalError, match="without finish_reason"):
        await collect(torn())


async def test_only_given_sampling_values_are_sent(
    client: GenerationClient, service: FakeGenerationService
) -> None:
    await collect(client.generate("x", sampling=Sampling(temperature=0.0, stop=("\n",))))
    sampling = service.requests[0].sampling
    assert sampling.HasField("temperature")
    assert not sampling.HasField("max_tokens")
    assert list(sampling.stop) == ["\n"]


async def test_a_question_is_one_user_turn(
    client: GenerationClient, service: FakeGenerationService
) -> None:
    await collect(client.chat("why?"))
    await collect(client.chat([Message("system", "be short"), Message("user", "why?")]))
    first, second = ([turn.role for turn in sent.chat.messages] for sent in service.requests)
    assert (first, second) == (["user"], ["system", "user"])


async def test_token_ids_are_a_prompt(
    client: GenerationClient, service: FakeGenerationService
) -> None:
    await collect(client.generate([5, 6]))
    assert list(service.requests[0].tokens.ids) == [5, 6]


async def test_negative_max_tokens_is_refused_before_sending(
    client: GenerationClient, service: FakeGenerationService
) -> None:
    with pytest.raises(InvalidArgumentError, match="cannot be written"):
        await collect(client.generate("x", sampling=Sampling(max_tokens=-1)))
    assert service.calls.num_started == 0


async def test_full_queue_is_retried_before_the_first_token(
    client: GenerationClient, service: FakeGenerationService
) -> None:
    service.calls.failures.append(
        refusal(StatusCode.RESOURCE_EXHAUSTED, "full", reason="QUEUE_FULL", retry_after=0.01)
    )
    assert (await collect(client.generate("x"))).text == "one two three"
    assert service.calls.num_started == 2


async def test_leaving_the_loop_early_cancels_the_call(
    client: GenerationClient, service: FakeGenerationService
) -> None:
    service.calls.delay = 0.01
    service.words = ("word ",) * 10_000
    async with aclosing(client.generate("go on")) as pieces:
        assert (await anext(pieces)).text == "word "
    async with asyncio.timeout(60):
        while not service.calls.num_cancelled:
            await asyncio.sleep(0.01)


async def test_deadline_covers_the_whole_answer(
    client: GenerationClient, service: FakeGenerationService
) -> None:
    service.calls.delay = 0.02
    service.words = ("word ",) * 10_000
    with pytest.raises(DeadlineExceededError):
        await collect(client.generate("go on", timeout=2))
    assert service.requests  # the answer had begun


async def test_tokens_go_there_and_back(client: GenerationClient) -> None:
    token_ids = await client.tokenize("Füße")
    assert await client.detokenize(token_ids) == "Füße"


async def test_models_are_described(client: GenerationClient) -> None:
    (listed,) = await client.models()
    assert listed == await client.model("fake")
    assert (listed.method, listed.bits, listed.bpw) == ("gptq", 4, 4.25)
