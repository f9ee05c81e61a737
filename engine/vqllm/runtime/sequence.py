"""The decoding state of one request: its tokens, its parameters and how it ended.

Holds no logits and no KV cache; the engine and the executor own those.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from vqllm.runtime.sampling import SamplingParams


class FinishReason(StrEnum):
    """Why a sequence produces no more tokens."""

    STOP = "stop"  # an end-of-sequence token or a stop string
    LENGTH = "length"  # max_tokens or the context length
    ABORT = "abort"  # the owner called Engine.abort


@dataclass
class Sequence:
    """One prompt and the answer so far.

    `output_token_ids` includes an end-of-sequence token that ended the answer; its text does not.
    """

    id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    output_token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    def tokens(self, start: int, stop: int) -> list[int]:
        """Those of prompt and answer at the positions [start, stop)."""
        answer = len(self.prompt_token_ids)
        if start >= answer:
            return self.output_token_ids[start - answer : stop - answer]
        return self.prompt_token_ids[start:stop] + self.output_token_ids[: max(stop - answer, 0)]

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None
