"""What llmd does, whatever the protocol: check a request, tokenize it, hand it to an engine.

Both protocols call these coroutines, so both refuse the same requests for the same reasons.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from vqllm.errors import InvalidSampling, VqllmError
from vqllm.runtime.sampling import SamplingParams
from vqserve.common.errors import ServiceError
from vqserve.common.logging import annotate
from vqserve.generation import errors
from vqserve.generation.convert import translate
from vqserve.generation.driver import SequenceStream
from vqserve.generation.models import ModelTable, ServedModel
from vqserve.generation.request import (
    ChatPrompt,
    GenerationRequest,
    Prompt,
    TextPrompt,
    TokenPrompt,
)

ROLES = ("system", "user", "assistant")
MAX_STOP_STRINGS = 4
_PROMPT_ERRORS = (errors.EmptyPrompt, errors.InvalidPrompt, errors.PromptTooLong)
_PROMPT_FIELDS: dict[type[Prompt], str] = {
    TextPrompt: "prompt",
    ChatPrompt: "chat.messages",
    TokenPrompt: "tokens.ids",
}


@dataclass(frozen=True)
class Generation:
    """An accepted request: the model that answers it and the stream of its outputs."""

    model: ServedModel
    stream: SequenceStream


class GenerationCore:
    """The behaviour behind both protocols."""

    def __init__(self, models: ModelTable) -> None:
        self.models = models

    async def start(self, request: GenerationRequest) -> Generation:
        """Check a request and queue it; returns once an engine has accepted it.

        Raises:
            ServiceError: one of `vqserve.generation.errors`, or ResourceExhausted.
        """
        arrived_at = time.monotonic()
        model = self.models.get(request.model)
        try:
            params = _sampling_params(request, model.context_length)
            prompt = _checked_prompt(request.prompt, model)
            token_ids = await model.encode(prompt)
        except ServiceError as error:
            model.metrics.rejected(error.reason.lower())
            raise
        annotate(model=model.name, prompt_tokens=len(token_ids))
        try:
            stream = await model.driver.submit(token_ids, params, arrived_at)
        except ServiceError as error:
            # The engine sees tokens and cannot know which field they came from.
            if isinstance(error, _PROMPT_ERRORS):
                error.field = error.field or _PROMPT_FIELDS[type(prompt)]
            raise
        return Generation(model, stream)

    async def tokenize(self, model: str, text: str) -> list[int]:
        """Token ids of a text; none for an empty one."""
        served = self.models.get(model)
        token_ids = await served.encode(TextPrompt(text))
        annotate(model=served.name, tokens=len(token_ids))
        return token_ids

    async def detokenize(self, model: str, token_ids: list[int]) -> str:
        """Text of token ids, each below the vocabulary size."""
        served = self.models.get(model)
        annotate(model=served.name, tokens=len(token_ids))
        return await served.decode(token_ids)


def _sampling_params(request: GenerationRequest, context_length: int) -> SamplingParams:
    values: dict[str, Any] = dict(request.sampling)
    if request.fills_context:
        values.setdefault("max_tokens", context_length)
    if not 1 <= values.get("max_tokens", 1) <= context_length:
        name = request.client_name("max_tokens")
        raise errors.InvalidSampling(
            f"{name} is {values['max_tokens']}, allowed is 1 to {context_length}, the tokens "
            "that prompt and answer may have together",
            field=f"sampling.{name}",
        )
    if len(values.get("stop", ())) > MAX_STOP_STRINGS:
        raise errors.InvalidSampling(
            f"stop has {len(values['stop'])} strings, allowed are {MAX_STOP_STRINGS}",
            field="sampling.stop",
        )
    if not all(values.get("stop", ())):
        raise errors.InvalidSampling(
            "stop has an empty string, which every text holds; leave it out", field="sampling.stop"
        )
    try:
        return SamplingParams(**values)
    except InvalidSampling as error:
        raise translate(error.renamed(request.client_name(error.field))) from error
    except VqllmError as error:
        raise translate(error) from error


def _checked_prompt(prompt: Prompt | None, model: ServedModel) -> Prompt:
    """The prompt, if it is worth tokenizing."""
    match prompt:
        case None:
            raise errors.EmptyPrompt("the request has no prompt; send text, a chat or tokens")
        case TextPrompt(text):
            _check_size(len(text), model, "prompt")
        case ChatPrompt():
            _check_chat(prompt)
            _check_size(sum(len(turn.content) for turn in prompt.messages), model, "chat.messages")
    return prompt


def _check_chat(prompt: ChatPrompt) -> None:
    if not prompt.messages:
        raise errors.EmptyPrompt(
            "the conversation has no messages; send at least one", field="chat.messages"
        )
    for index, turn in enumerate(prompt.messages):
        if turn.role not in ROLES:
            raise errors.InvalidPrompt(
                f"message {index} has the role {turn.role[:40]!r}, allowed are {', '.join(ROLES)}",
                field=f"chat.messages[{index}].role",
            )


def _check_size(num_characters: int, model: ServedModel, field: str) -> None:
    """Refuse what cannot fit before spending seconds on tokenizing it."""
    if num_characters > model.max_prompt_characters:
        raise errors.PromptTooLong(
            f"the prompt has {num_characters} characters, far more than the context of "
            f"{model.context_length} tokens can hold",
            field=field,
        )
