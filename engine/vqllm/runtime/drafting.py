"""Guesses the next tokens of a text that repeats itself, for speculative decoding.

Prompt lookup: the last few tokens are searched for in what came before, and what followed there is
the guess. Costs no model; a wrong guess costs part of one step and never changes an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vqllm.errors import InvalidConfig


@dataclass(frozen=True)
class DraftConfig:
    """Guess up to `num_tokens` tokens where the last `max_match` to `min_match` tokens recur.

    `num_tokens` 0 turns guessing off; `window` bounds how many of the latest tokens are searched.
    """

    num_tokens: int = 0
    min_match: int = 2
    max_match: int = 4
    window: int = 1024

    def __post_init__(self) -> None:
        if self.num_tokens < 0:
            raise InvalidConfig("num_tokens", self.num_tokens, "0 (off) or more")
        if not 1 <= self.min_match <= self.max_match:
            raise InvalidConfig("min_match", self.min_match, f"1 to max_match {self.max_match}")
        if self.window <= self.max_match:
            raise InvalidConfig("window", self.window, f"more than max_match {self.max_match}")


def draft(token_ids: Sequence[int], config: DraftConfig, limit: int) -> list[int]:
    """The guess after `token_ids`, at most `limit` tokens, empty where nothing recurs."""
    num_wanted = min(config.num_tokens, limit)
    if num_wanted <= 0:
        return []
    recent = list(token_ids[-config.window :])
    for length in range(config.max_match, config.min_match - 1, -1):
        found = _last_occurrence(recent, length)
        if found is not None:
            return recent[found + length : found + length + num_wanted]
    return []


def _last_occurrence(tokens: list[int], length: int) -> int | None:
    """Start of the latest earlier occurrence of the last `length` tokens."""
    if len(tokens) <= length:
        return None
    pattern = tokens[-length:]
    for start in range(len(tokens) - length - 1, -1, -1):
        if tokens[start] == pattern[0] and tokens[start : start + length] == pattern:
            return start
    return None
