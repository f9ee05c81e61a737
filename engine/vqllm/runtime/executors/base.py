"""What the engine asks of an executor: caches to put sequences in, and logits for tokens.

An executor knows nothing of requests, sampling or text.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.float32]


class Executor(ABC):
    """Runs one model. Not thread-safe: one owner calls it.

    A cache is named by a small integer that `allocate` returns. Each cache holds up to
    `context_length` tokens of one sequence.
    """

    name: str
    vocab_size: int
    context_length: int
    max_num_sequences: int

    @property
    @abstractmethod
    def providers(self) -> tuple[str, ...]:
        """What computes, as the library itself reports it, for logs and health pages."""

    @abstractmethod
    def allocate(self) -> int:
        """Reserve an empty cache.

        Raises:
            RuntimeError: all `max_num_sequences` caches are taken (the engine never does this).
        """

    @abstractmethod
    def free(self, cache: int) -> None:
        """Give a cache back; its tokens are forgotten at once."""

    @abstractmethod
    def prefill(self, cache: int, token_ids: Sequence[int]) -> Logits:
        """Append a prompt to a cache; logits after its last token, (vocab_size,) float32."""

    @abstractmethod
    def decode(self, caches: Sequence[int], token_ids: Sequence[int]) -> Logits:
        """Append one token to each cache; logits (len(caches), vocab_size) float32."""

    @abstractmethod
    def score(self, token_ids: Sequence[int]) -> Logits:
        """Logits after every token of a text, (len(token_ids), vocab_size) float32.

        Uses a cache for the time of the call, so one must be free.
        """
