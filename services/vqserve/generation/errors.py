"""What can be wrong with a request to llmd, each with its machine-readable reason.

Code and HTTP status follow from the parent class in `vqserve.common.errors`.
"""

from __future__ import annotations

from vqserve.common.errors import (
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    Unavailable,
)


class EmptyPrompt(InvalidArgument):
    """Nothing to continue."""

    reason = "EMPTY_PROMPT"


class PromptTooLong(InvalidArgument):
    """No room in the context for a single new token."""

    reason = "PROMPT_TOO_LONG"


class InvalidPrompt(InvalidArgument):
    """A token id outside the vocabulary, or a conversation that the template refuses."""

    reason = "INVALID_PROMPT"


class InvalidSampling(InvalidArgument):
    """A sampling parameter outside its range."""

    reason = "INVALID_SAMPLING"


class AmbiguousModel(InvalidArgument):
    """Several models are loaded and the request names none."""

    reason = "AMBIGUOUS_MODEL"


class InvalidModelPath(InvalidArgument):
    """An admin load of something that is not a readable model inside the model root."""

    reason = "INVALID_MODEL"


class UnknownField(InvalidArgument):
    """A field that the API does not have."""

    reason = "UNKNOWN_FIELD"


class UnsupportedField(InvalidArgument):
    """A field that OpenAI's API has and this server does not support."""

    reason = "UNSUPPORTED_FIELD"


class UnknownModel(NotFound):
    """No loaded model has this name."""

    reason = "UNKNOWN_MODEL"


class NoChatTemplate(FailedPrecondition):
    """A conversation for a model that has no chat template."""

    reason = "NO_CHAT_TEMPLATE"


class LastModel(FailedPrecondition):
    """The only loaded model cannot be unloaded."""

    reason = "LAST_MODEL"


class ExecutorUnavailable(FailedPrecondition):
    """The configured executor's library is missing, installed twice, or unknown."""

    reason = "EXECUTOR_UNAVAILABLE"


class EngineFailed(Internal):
    """A step of the engine raised; the log says what."""

    reason = "ENGINE_FAILED"


class EngineStopped(Unavailable):
    """The model is being unloaded, or its engine's thread has ended."""

    reason = "ENGINE_STOPPED"


class Aborted(Unavailable):
    """The server stopped before the answer was complete."""

    reason = "ABORTED"
