"""What a client may ask of llmd, free of any protocol.

gRPC and the OpenAI routes both build these, so that one check gives both the same answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

SamplingValue = int | float | bool | tuple[str, ...] | tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True)
class TextPrompt:
    """Plain text to continue."""

    text: str


@dataclass(frozen=True)
class ChatPrompt:
    """A conversation, oldest turn first, to be formatted by the model's chat template."""

    messages: tuple[Message, ...]


@dataclass(frozen=True)
class TokenPrompt:
    """Token ids to continue as they are."""

    token_ids: tuple[int, ...]


Prompt = TextPrompt | ChatPrompt | TokenPrompt


@dataclass(frozen=True)
class GenerationRequest:
    """One continuation to compute.

    Attributes:
        model: name of a loaded model; empty for the only one.
        prompt: what to continue; None when the client sent nothing.
        sampling: the parameters that the client set, by the names of `SamplingParams`; unchecked.
        fills_context: without `max_tokens`, generate until the context is full.
        aliases: what the client calls a parameter, where that is another name.
    """

    model: str
    prompt: Prompt | None
    sampling: Mapping[str, SamplingValue] = field(default_factory=dict)
    fills_context: bool = False
    aliases: Mapping[str, str] = field(default_factory=dict)

    def client_name(self, parameter: str) -> str:
        """What the client calls a sampling parameter."""
        return self.aliases.get(parameter, parameter)
