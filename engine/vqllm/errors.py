"""Every error vqllm raises on purpose, in one hierarchy.

A service maps these classes to gRPC codes and HTTP statuses; nothing here knows about either.
Each message names the offending value and, where there is one, the remedy.
"""

from __future__ import annotations


class VqllmError(ValueError):
    """Root of all errors that vqllm raises deliberately."""


class InvalidSampling(VqllmError):
    """A sampling parameter lies outside its range.

    Attributes:
        field: name of the parameter, as in `SamplingParams`.
        value: what it was.
        allowed: what it may be, in words.
    """

    def __init__(self, field: str, value: object, allowed: str) -> None:
        super().__init__(f"{field} is {value!r}, allowed is {allowed}")
        self.field, self.value, self.allowed = field, value, allowed

    def renamed(self, field: str) -> InvalidSampling:
        """The same to a client that knows the parameter by another name."""
        return InvalidSampling(field, self.value, self.allowed)


class InvalidPrompt(VqllmError):
    """The prompt holds a token id that the model does not have, or a malformed chat message."""


class EmptyPrompt(InvalidPrompt):
    """The prompt has no tokens."""

    def __init__(self) -> None:
        super().__init__("the prompt has no tokens; send at least one")


class PromptTooLong(InvalidPrompt):
    """The prompt leaves no room for a single new token in the context.

    Attributes:
        num_prompt_tokens: length of the prompt.
        context_length: tokens, prompt and answer together, that one sequence may hold.
    """

    def __init__(self, num_prompt_tokens: int, context_length: int) -> None:
        super().__init__(
            f"the prompt has {num_prompt_tokens} tokens, the context holds {context_length} "
            f"with at least one for the answer; send at most {context_length - 1} tokens"
        )
        self.num_prompt_tokens = num_prompt_tokens
        self.context_length = context_length


class DuplicateSequence(VqllmError):
    """A sequence of the same id is already waiting or running."""

    def __init__(self, sequence_id: str) -> None:
        super().__init__(f"a sequence with id {sequence_id!r} is already waiting or running")


class QueueFull(VqllmError):
    """The engine holds as many waiting sequences as it may.

    Attributes:
        max_waiting: the limit that was reached.
    """

    def __init__(self, max_waiting: int) -> None:
        super().__init__(f"{max_waiting} sequences are waiting already; retry later")
        self.max_waiting = max_waiting


class InvalidConfig(VqllmError):
    """A configuration value lies outside its range; the message names field, value and range."""

    def __init__(self, field: str, value: object, allowed: str) -> None:
        super().__init__(f"{field} is {value!r}, allowed is {allowed}")
        self.field = field


class UnknownModel(VqllmError):
    """No model folder lies at the given path, or no model has the given name."""


class UnsupportedModel(VqllmError):
    """The model exists but uses an architecture or a feature that is not implemented."""


class CorruptCheckpoint(VqllmError):
    """A checkpoint file is missing, damaged or inconsistent; names the file and the tensor."""


class FetchError(VqllmError):
    """A download failed or what came back is not what was pinned."""


class CalibrationError(VqllmError):
    """The calibration text cannot be used, for example because it is too short."""


class EvaluationError(VqllmError):
    """A text, task file or model cannot be scored; names it and what would help."""


class ExecutorUnavailable(VqllmError):
    """The executor's library is absent, doubled, or lacks a needed provider."""


class CorruptArtefact(VqllmError):
    """A file of an unfinished run is damaged; names it and the remedy."""


class ResumeMismatch(VqllmError):
    """An unfinished run in the way was started with other settings; names what differs."""


class DiskFull(VqllmError):
    """The disk filled up; names the file. What was finished before is kept."""


class OverBudget(VqllmError):
    """The work cannot be done within the memory or the bits allowed; names what it would need."""
