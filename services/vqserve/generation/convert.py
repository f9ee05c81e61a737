"""Between the contract and the engine: the only file of llmd that sees both kinds of types."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vqllm import errors as engine_errors
from vqllm.runtime.engine import StepOutput
from vqllm.runtime.sampling import TokenLogprobs
from vqllm.runtime.sequence import FinishReason
from vqserve.common.errors import Internal, ResourceExhausted, ServiceError
from vqserve.generation import errors
from vqserve.generation.request import (
    ChatPrompt,
    GenerationRequest,
    Message,
    Prompt,
    SamplingValue,
    TextPrompt,
    TokenPrompt,
)
from vqstack.generation.v1 import generation_pb2

if TYPE_CHECKING:
    from vqserve.generation.models import ServedModel

_FINISH_REASONS = {
    FinishReason.STOP: generation_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: generation_pb2.FINISH_REASON_LENGTH,
    FinishReason.ABORT: generation_pb2.FINISH_REASON_ABORT,
}

_ERRORS: dict[type[engine_errors.VqllmError], type[ServiceError]] = {
    engine_errors.EmptyPrompt: errors.EmptyPrompt,
    engine_errors.PromptTooLong: errors.PromptTooLong,
    engine_errors.InvalidPrompt: errors.InvalidPrompt,
    engine_errors.InvalidSampling: errors.InvalidSampling,
    engine_errors.ExecutorUnavailable: errors.ExecutorUnavailable,
    engine_errors.QueueFull: ResourceExhausted,
    engine_errors.UnknownModel: errors.InvalidModelPath,
    engine_errors.UnsupportedModel: errors.InvalidModelPath,
    engine_errors.CorruptCheckpoint: errors.InvalidModelPath,
    engine_errors.InvalidConfig: errors.InvalidModelPath,
}


def translate(error: engine_errors.VqllmError, field: str | None = None) -> ServiceError:
    """The service error that tells a client about an engine error; `field` is the one at fault."""
    for engine_type, service_type in _ERRORS.items():
        if isinstance(error, engine_type):
            return service_type(str(error), field=_field(error) or field)
    return Internal("the engine refused the request for a reason of its own")


def _field(error: engine_errors.VqllmError) -> str | None:
    if isinstance(error, engine_errors.InvalidSampling):
        return f"sampling.{error.field}"
    return None


def generation_request(message: generation_pb2.GenerateRequest) -> GenerationRequest:
    """What a Generate call asks for."""
    return GenerationRequest(
        model=message.model, prompt=_prompt(message), sampling=_sampling(message.sampling)
    )


def _prompt(message: generation_pb2.GenerateRequest) -> Prompt | None:
    match message.WhichOneof("input"):
        case "prompt":
            return TextPrompt(message.prompt)
        case "chat":
            turns = message.chat.messages
            return ChatPrompt(tuple(Message(turn.role, turn.content) for turn in turns))
        case "tokens":
            return TokenPrompt(tuple(message.tokens.ids))
    return None


def _sampling(message: generation_pb2.SamplingParams) -> dict[str, SamplingValue]:
    values: dict[str, SamplingValue] = {
        field.name: value
        for field, value in message.ListFields()
        if field.name not in ("stop", "logit_bias")
    }
    if message.stop:
        values["stop"] = tuple(message.stop)
    if message.logit_bias:
        values["logit_bias"] = tuple((entry.token_id, entry.bias) for entry in message.logit_bias)
    return values


def generate_response(
    output: StepOutput, first_token_after: float | None, total: float
) -> generation_pb2.GenerateResponse:
    """One message of a Generate stream; the times in seconds go into the last one."""
    response = generation_pb2.GenerateResponse(
        text=output.text,
        token_ids=output.token_ids,
        logprobs=[_token_logprobs(logprobs) for logprobs in output.logprobs],
    )
    if output.finish_reason is not None:
        response.finish_reason = _FINISH_REASONS[output.finish_reason]
        response.usage.prompt_tokens = output.num_prompt_tokens
        response.usage.completion_tokens = output.num_output_tokens
        response.usage.time_to_first_token_seconds = first_token_after or 0.0
        response.usage.total_seconds = total
    return response


def _token_logprobs(logprobs: TokenLogprobs) -> generation_pb2.TokenLogprobs:
    pair = generation_pb2.TokenLogprob
    return generation_pb2.TokenLogprobs(
        chosen=pair(token_id=logprobs.token_id, logprob=logprobs.logprob),
        top=[pair(token_id=token_id, logprob=logprob) for token_id, logprob in logprobs.top],
    )


def model_info(model: ServedModel) -> generation_pb2.ModelInfo:
    """The contract's description of a model that is being served."""
    info = model.info
    return generation_pb2.ModelInfo(
        name=model.name,
        architecture=model.architecture,
        method=info.method,
        bits=info.bits,
        bpw=info.bpw,
        group_size=info.group_size,
        model_hash=info.revision,
        context_length=model.context_length,
        num_parameters=info.num_parameters,
        vocab_size=model.vocab_size,
        executor=model.executor,
    )
