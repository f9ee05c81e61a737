"""The RPCs of GenerationService against a real process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from support.llmd import ANSWER, LlmServer
from vqstack.generation.v1 import generation_pb2 as pb

if TYPE_CHECKING:
    from vqstack.generation.v1.generation_pb2_grpc import GenerationServiceAsyncStub

GREEDY = pb.SamplingParams(max_tokens=10, temperature=0)


async def answer(
    stub: GenerationServiceAsyncStub, request: pb.GenerateRequest
) -> list[pb.GenerateResponse]:
    return [response async for response in stub.Generate(request)]


async def test_generate_streams_whole_characters_and_ends_with_the_usage(
    stub: GenerationServiceAsyncStub,
) -> None:
    request = pb.GenerateRequest(prompt="Once", sampling=GREEDY)
    responses = await answer(stub, request)
    assert "".join(response.text for response in responses) == "A road, gr"
    assert sum(len(response.token_ids) for response in responses) == 10
    *others, last = responses
    assert all(response.finish_reason == pb.FINISH_REASON_UNSPECIFIED for response in others)
    assert not any(response.HasField("usage") for response in others)
    assert last.finish_reason == pb.FINISH_REASON_LENGTH
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (4, 10)
    assert 0 < last.usage.time_to_first_token_seconds <= last.usage.total_seconds


async def test_generate_answers_a_conversation(stub: GenerationServiceAsyncStub) -> None:
    turns = [pb.ChatMessage(role="user", content="What is this?")]
    request = pb.GenerateRequest(chat=pb.ChatMessages(messages=turns), sampling=GREEDY)
    responses = await answer(stub, request)
    assert "".join(response.text for response in responses) == ANSWER[:10]
    assert responses[-1].usage.prompt_tokens == len("user: What is this?\nassistant: ")


async def test_generate_stops_at_a_stop_string(stub: GenerationServiceAsyncStub) -> None:
    sampling = pb.SamplingParams(temperature=0, stop=["größ"])
    request = pb.GenerateRequest(tokens=pb.TokenIds(ids=[1, 2]), sampling=sampling)
    responses = await answer(stub, request)
    assert "".join(response.text for response in responses) == "A road, "
    assert responses[-1].finish_reason == pb.FINISH_REASON_STOP


async def test_generate_reports_log_probabilities_and_obeys_a_bias(
    stub: GenerationServiceAsyncStub,
) -> None:
    (z,) = (await stub.Tokenize(pb.TokenizeRequest(text="z"))).token_ids
    bias = pb.LogitBias(token_id=z, bias=100)
    sampling = pb.SamplingParams(temperature=0, max_tokens=2, logprobs=1, logit_bias=[bias])
    responses = await answer(stub, pb.GenerateRequest(prompt="Once", sampling=sampling))
    reported = [entry for response in responses for entry in response.logprobs]
    expected = (await stub.Tokenize(pb.TokenizeRequest(text=ANSWER[:2]))).token_ids
    assert [entry.chosen.token_id for entry in reported] == [z, z]
    for entry, token_id in zip(reported, expected, strict=True):
        assert [top.token_id for top in entry.top] == [token_id]
        assert entry.chosen.logprob < entry.top[0].logprob <= 0


async def test_max_tokens_is_128_when_unset(stub: GenerationServiceAsyncStub) -> None:
    responses = await answer(stub, pb.GenerateRequest(prompt="Once"))
    assert responses[-1].usage.completion_tokens == 128


async def test_text_makes_the_round_trip(stub: GenerationServiceAsyncStub) -> None:
    text = "größer, 더 크다"
    tokens = await stub.Tokenize(pb.TokenizeRequest(text=text))
    back = await stub.Detokenize(pb.DetokenizeRequest(token_ids=tokens.token_ids))
    assert back.text == text
    assert list((await stub.Tokenize(pb.TokenizeRequest())).token_ids) == []


async def test_models_are_described(stub: GenerationServiceAsyncStub) -> None:
    listed = await stub.ListModels(pb.ListModelsRequest())
    found = await stub.GetModel(pb.GetModelRequest(model="fast"))
    assert list(listed.models) == [found.model]
    assert found.model == pb.ModelInfo(
        name="fast",
        architecture="llama",
        method="gptq",
        bits=4,
        bpw=4.16,
        group_size=128,
        model_hash="0" * 16,
        context_length=256,
        num_parameters=1000,
        vocab_size=257,
        executor="fake",
    )


async def test_health_knows_the_service(fast: LlmServer) -> None:
    async with grpc.aio.insecure_channel(fast.grpc_address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        for name in ("", "vqstack.generation.v1.GenerationService"):
            status = await stub.Check(health_pb2.HealthCheckRequest(service=name))
            assert status.status == health_pb2.HealthCheckResponse.SERVING


async def test_reflection_lists_the_service(fast: LlmServer) -> None:
    async with grpc.aio.insecure_channel(fast.grpc_address) as channel:
        make_stub: Any = reflection_pb2_grpc.ServerReflectionStub
        question = reflection_pb2.ServerReflectionRequest(list_services="")
        call = make_stub(channel).ServerReflectionInfo(iter([question]))
        answer = await call.read()
        call.cancel()
    names = {service.name for service in answer.list_services_response.service}
    assert "vqstack.generation.v1.GenerationService" in names
    assert "grpc.health.v1.Health" in names
