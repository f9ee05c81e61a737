"""What the scheduler asks of an executor whose KV cache is cut into pages, and an adapter.

A page holds the keys and values of `page_size` consecutive positions of one sequence, in every
layer. The scheduler decides which pages a sequence has; the executor only reads and writes them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vqllm.runtime.executors.base import Executor, Logits


@dataclass(frozen=True)
class Chunk:
    """New tokens of one sequence in one step.

    Attributes:
        pages: the sequence's page table; page i holds positions i * page_size and on. It covers
            every position up to the last new token.
        start: position of the first new token; all earlier positions are computed already.
        token_ids: the new tokens, at least one.
        num_logits: after how many of the last tokens logits are wanted, 0 to len(token_ids).
        largest_of: n > 0 where only the largest of every token's first n logits matters; the
            executor may then take less care with the others, but none comes out above it.
    """

    pages: Sequence[int]
    start: int
    token_ids: Sequence[int]
    num_logits: int = 1
    largest_of: int = 0


class PagedExecutor(ABC):
    """Runs one model over pages. Not thread-safe: one owner calls it.

    Attributes:
        page_size: positions per page.
        num_pages: pages that exist, numbered from 0.
        can_share_pages: whether sequences with the same beginning may use the same full pages.
        can_rewind: whether a chunk may start before the end of what was computed, overwriting it.
        can_cut_anywhere: whether a prompt gives the same bits wherever it is cut into chunks.
    """

    name: str
    vocab_size: int
    context_length: int
    page_size: int
    num_pages: int
    can_share_pages: bool = True
    can_rewind: bool = True
    can_cut_anywhere: bool = True

    @property
    @abstractmethod
    def providers(self) -> tuple[str, ...]:
        """What computes, as the library itself reports it, for logs and health pages."""

    @abstractmethod
    def step(self, chunks: Sequence[Chunk]) -> Logits:
        """Append every chunk to its sequence.

        Returns the logits (sum of num_logits, vocab_size) float32, chunk by chunk in order. They
        are valid until the next call.
        """

    def forget(self, page: int) -> None:  # noqa: B027  most executors have nothing to forget
        """Called when no sequence uses a page any more, before it is given to another."""


class WholeSequencePages(PagedExecutor):
    """Shows an executor with one cache per sequence as one whose pages are whole sequences."""

    can_share_pages = False
    can_rewind = False
    can_cut_anywhere = False  # a library's product may sum differently for another number of rows

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._cache_of: dict[int, int] = {}
        self.name = executor.name
        self.vocab_size = executor.vocab_size
        self.context_length = executor.context_length
        self.page_size = executor.context_length
        self.num_pages = executor.max_num_sequences

    @property
    def providers(self) -> tuple[str, ...]:
        return self._executor.providers

    def step(self, chunks: Sequence[Chunk]) -> Logits:
        decoded = [chunk for chunk in chunks if chunk.start > 0 and len(chunk.token_ids) == 1]
        rows: dict[int, Logits] = {}
        if decoded:
            caches = [self._cache_of[chunk.pages[0]] for chunk in decoded]
            logits = self._executor.decode(caches, [chunk.token_ids[0] for chunk in decoded])
            rows = {chunk.pages[0]: row for chunk, row in zip(decoded, logits, strict=True)}
        for chunk in chunks:
            if chunk.pages[0] not in rows:
                rows[chunk.pages[0]] = self._prefill(chunk)
        wanted = [rows[chunk.pages[0]] for chunk in chunks if chunk.num_logits]
        return np.stack(wanted) if wanted else np.empty((0, self.vocab_size), dtype=np.float32)

    def forget(self, page: int) -> None:
        """Free the cache behind the page."""
        cache = self._cache_of.pop(page, None)
        if cache is not None:
            self._executor.free(cache)

    def _prefill(self, chunk: Chunk) -> Logits:
        page = chunk.pages[0]
        if chunk.start == 0:
            self.forget(page)
            self._cache_of[page] = self._executor.allocate()
        return self._executor.prefill(self._cache_of[page], chunk.token_ids)
