"""Token ids to text, one token at a time, never splitting a character or leaking a stop string.

Knows tokens only as byte strings: the tokenizer says which bytes a token stands for.
"""

from __future__ import annotations

import codecs
from typing import Protocol


class TokenBytes(Protocol):
    """What the detokenizer needs of a tokenizer."""

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes that the token adds to a text; empty for control tokens."""
        ...


class Detokenizer:
    """Turns the tokens of one sequence into text deltas.

    Text is held back while it ends inside a UTF-8 character or may still become a stop string.
    """

    def __init__(self, tokenizer: TokenBytes, stop: tuple[str, ...] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self.is_stopped = False

    def push(self, token_id: int) -> str:
        """Text that became certain with this token; sets `is_stopped` on a stop string."""
        return self._release(self._decoder.decode(self._tokenizer.token_bytes(token_id)))

    def flush(self) -> str:
        """The rest of the text, when no token follows; half a character becomes U+FFFD."""
        text = self._release(self._decoder.decode(b"", final=True))
        rest, self._held = self._held, ""
        return text if self.is_stopped else text + rest

    def _release(self, text: str) -> str:
        if self.is_stopped:
            return ""
        text = self._held + text
        found = [position for stop in self._stop if (position := text.find(stop)) >= 0]
        if found:
            self.is_stopped = True
            self._held = ""
            return text[: min(found)]
        num_held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper prefix of `stop` that `text` ends with."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
