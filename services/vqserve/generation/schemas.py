"""The bodies of the HTTP routes: what OpenAI's API defines, refused where we differ.

Types only; ranges are the engine's to check, so that gRPC and HTTP refuse the same values.
Unknown fields are refused, as OpenAI refuses them. Fields that OpenAI has and this server does
not support pass only at the value that asks for nothing.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from vqserve.generation.errors import EmptyPrompt, InvalidSampling, UnsupportedField
from vqserve.generation.request import (
    ChatPrompt,
    GenerationRequest,
    Message,
    Prompt,
    SamplingValue,
    TextPrompt,
    TokenPrompt,
)

# What OpenAI documents for /v1/completions when max_tokens is not given.
COMPLETION_MAX_TOKENS = 16

# No id is longer, and Python refuses to read numbers of thousands of digits.
MAX_TOKEN_ID_DIGITS = 10

_SAMPLING_FIELDS = (
    *("max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
    *("presence_penalty", "frequency_penalty", "seed", "ignore_eos"),
)


def _check_characters(text: str) -> str:
    """JSON can spell half a surrogate pair, which no encoding and no tokenizer accepts."""
    if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
        raise PydanticCustomError("invalid_text", "holds half of a surrogate pair")
    return text


Text = Annotated[str, AfterValidator(_check_characters)]


class Body(BaseModel):
    """A JSON object without surprises: no unknown fields, no coerced types."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())


class StreamOptions(Body):
    """What to add to a stream."""

    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class GenerationBody(Body):
    """What both generation routes take. The last four fields are extensions of ours."""

    # Accepted only at one of these values, besides null.
    neutral: ClassVar[dict[str, tuple[object, ...]]] = {}

    model: str = ""
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: Text | list[Text] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logit_bias: dict[str, float] | None = Field(None, description="By token id, -100 to 100")
    user: str | None = Field(None, description="Accepted for compatibility, not used")
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        for name, neutral in cls.neutral.items():
            value = body.get(name)
            if value is not None and not any(_same(value, other) for other in neutral):
                raise unsupported(name)
        return {name: value for name, value in body.items() if name not in cls.neutral}

    @model_validator(mode="after")
    def _options_need_stream(self) -> GenerationBody:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError(
                "invalid_value",
                "stream_options is only allowed when stream is true",
                {"param": "stream_options"},
            )
        return self

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self) -> dict[str, SamplingValue]:
        """The sampling parameters that were set."""
        values: dict[str, SamplingValue] = {
            name: value for name in _SAMPLING_FIELDS if (value := getattr(self, name)) is not None
        }
        if self.stop is not None:
            values["stop"] = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if self.logit_bias:
            values["logit_bias"] = tuple(_bias(self.logit_bias))
        return values


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    neutral: ClassVar[dict[str, tuple[object, ...]]] = {
        "best_of": (1,),
        "echo": (False,),
        "n": (1,),
        "suffix": (),
    }

    logprobs: int | None = Field(None, description="How many most probable tokens to report")
    prompt: Text | list[Text] | list[int] | list[list[int]] | None = None

    def request(self) -> GenerationRequest:
        """The same, free of HTTP."""
        sampling = {"max_tokens": COMPLETION_MAX_TOKENS} | self.sampling()
        if self.logprobs is not None:
            sampling["logprobs"] = self.logprobs
        return GenerationRequest(self.model, self._one_prompt(), sampling)

    def _one_prompt(self) -> Prompt | None:
        prompt = self.prompt
        if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
            if len(prompt) > 1:
                raise UnsupportedField(
                    f"prompt holds {len(prompt)} prompts; send one per request", field="prompt"
                )
            prompt = prompt[0]
        if isinstance(prompt, str):
            return TextPrompt(prompt)
        if not prompt:
            raise EmptyPrompt("prompt is empty; send text or token ids", field="prompt")
        return TokenPrompt(tuple(token for token in prompt if isinstance(token, int)))


class TextPart(Body):
    """One part of a message's content."""

    type: Literal["text"]
    text: Text


def _refuse_named_extras(message: Any) -> Any:
    """Fields of OpenAI messages that mean nothing here pass as null, which its client sends."""
    if not isinstance(message, dict):
        return message
    for name in MessageBody.neutral:
        if message.get(name) not in (None, []):
            raise unsupported(f"messages.{name}")
    return {name: value for name, value in message.items() if name not in MessageBody.neutral}


class MessageBody(Body):
    """One turn of a conversation."""

    neutral: ClassVar[tuple[str, ...]] = (
        *("name", "refusal", "annotations", "audio", "function_call", "tool_calls"),
        "tool_call_id",
    )

    role: str
    content: Text | list[TextPart]

    def message(self) -> Message:
        """The same, free of HTTP; OpenAI's newer name for the system role is understood."""
        role = "system" if self.role == "developer" else self.role
        if isinstance(self.content, str):
            return Message(role, self.content)
        return Message(role, "".join(part.text for part in self.content))


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    neutral: ClassVar[dict[str, tuple[object, ...]]] = {
        "audio": (),
        "function_call": ("none",),
        "functions": ([],),
        "metadata": ({},),
        "modalities": (["text"],),
        "n": (1,),
        "parallel_tool_calls": (True, False),
        "prediction": (),
        "prompt_cache_key": (),
        "reasoning_effort": (),
        "response_format": ({"type": "text"},),
        "safety_identifier": (),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "tool_choice": ("none", "auto"),
        "tools": ([],),
        "verbosity": (),
        "web_search_options": (),
    }

    messages: list[Annotated[MessageBody, BeforeValidator(_refuse_named_extras)]]
    max_completion_tokens: int | None = Field(None, description="Newer name of max_tokens")
    logprobs: bool | None = Field(None, description="Report the probability of every token")
    top_logprobs: int | None = Field(None, description="How many most probable ones beside it")

    @model_validator(mode="after")
    def _one_limit(self) -> ChatBody:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise PydanticCustomError(
                "invalid_value",
                "set max_completion_tokens or max_tokens, not both",
                {"param": "max_tokens"},
            )
        return self

    @model_validator(mode="after")
    def _top_logprobs_need_logprobs(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError(
                "invalid_value",
                "top_logprobs is only allowed when logprobs is true",
                {"param": "top_logprobs"},
            )
        return self

    def request(self) -> GenerationRequest:
        """The same, free of HTTP; without a limit the answer may fill the context."""
        sampling, aliases = self.sampling(), {"logprobs": "top_logprobs"}
        if self.logprobs:
            sampling["logprobs"] = self.top_logprobs or 0
        if self.max_completion_tokens is not None:
            sampling["max_tokens"] = self.max_completion_tokens
            aliases["max_tokens"] = "max_completion_tokens"
        prompt = ChatPrompt(tuple(turn.message() for turn in self.messages))
        return GenerationRequest(self.model, prompt, sampling, fills_context=True, aliases=aliases)


class TokenizeBody(Body):
    """POST /v1/tokenize."""

    model: str = ""
    text: Text


class DetokenizeBody(Body):
    """POST /v1/detokenize."""

    model: str = ""
    token_ids: list[int]


def _bias(logit_bias: dict[str, float]) -> list[tuple[int, float]]:
    """Pairs by token id, which JSON can only spell as text."""
    pairs = []
    for token_id, addend in logit_bias.items():
        is_number = token_id.isascii() and token_id.isdigit()
        if not is_number or len(token_id) > MAX_TOKEN_ID_DIGITS:
            raise InvalidSampling(
                f"logit_bias has the key {token_id[:40]!r}, allowed are token ids",
                field="sampling.logit_bias",
            )
        pairs.append((int(token_id), addend))
    return sorted(pairs)


def unsupported(name: str) -> PydanticCustomError:
    """The refusal of a field that OpenAI has and this server does not support."""
    return PydanticCustomError(
        "unsupported_parameter",
        "{param} is not supported by this server; leave it out",
        {"param": name},
    )


def _same(value: object, other: object) -> bool:
    """Equal and of one type: JSON's `true` is not 1."""
    return type(value) is type(other) and value == other
