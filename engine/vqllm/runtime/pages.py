"""Who holds which page of the KV cache, and which full pages a new sequence may share.

A full page is known by the digest of all tokens up to its end, so two sequences with the same
beginning find the same pages. A page that nobody holds keeps its content until it is needed for
something else, oldest first. Knows no executor and no scheduling.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vqllm.errors import InvalidConfig

_ROOT = b""


@dataclass(frozen=True)
class PageStats:
    """Pages by state (held + reusable + free = total) and the fate of prompt tokens so far."""

    total: int
    held: int
    reusable: int
    prefix_hit_tokens: int
    prefix_miss_tokens: int


class PageManager:
    """Counts references to pages. Not thread-safe."""

    def __init__(self, num_pages: int, page_size: int, can_share: bool = True) -> None:
        """Raises InvalidConfig when a size is below 1."""
        for field, value in (("num_pages", num_pages), ("page_size", page_size)):
            if value < 1:
                raise InvalidConfig(field, value, "at least 1")
        self.num_pages = num_pages
        self.page_size = page_size
        self._can_share = can_share
        self._free = list(reversed(range(num_pages)))
        self._holders = [0] * num_pages
        self._digest_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}
        self._reusable: OrderedDict[int, None] = OrderedDict()
        self._hits = self._misses = 0

    @property
    def num_available(self) -> int:
        """Pages that `allocate` can still give."""
        return len(self._free) + len(self._reusable)

    @property
    def num_held(self) -> int:
        return self.num_pages - self.num_available

    @property
    def stats(self) -> PageStats:
        return PageStats(
            total=self.num_pages,
            held=self.num_held,
            reusable=len(self._reusable),
            prefix_hit_tokens=self._hits,
            prefix_miss_tokens=self._misses,
        )

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold `num_tokens` positions."""
        return -(-num_tokens // self.page_size)

    def share_prefix(self, token_ids: Sequence[int]) -> list[int]:
        """Take hold of known pages that start `token_ids`, leaving at least one token to compute.

        The last token is never shared: its logits are what the sequence needs next.
        """
        pages: list[int] = []
        digest = _ROOT
        for index in range((len(token_ids) - 1) // self.page_size if self._can_share else 0):
            digest = self._digest(digest, token_ids, index)
            page = self._page_of.get(digest)
            if page is None:
                break
            self._hold(page)
            pages.append(page)
        return pages

    def count_prefix(self, num_shared: int, num_tokens: int) -> None:
        """Count an admitted sequence of `num_tokens`, of which `num_shared` pages were found."""
        self._hits += num_shared * self.page_size
        self._misses += num_tokens - num_shared * self.page_size

    def allocate(self) -> int | None:
        """A page of one's own, or None when every page is held."""
        if self._free:
            page = self._free.pop()
        elif self._reusable:
            page, _ = self._reusable.popitem(last=False)
            del self._page_of[self._digest_of.pop(page)]
        else:
            return None
        self._holders[page] = 1
        return page

    def publish(self, pages: Sequence[int], token_ids: Sequence[int], first: int) -> None:
        """Make full pages `first` and on known, whose sequence starts with `token_ids`.

        A page whose content is known under another number already stays private.
        """
        if not self._can_share:
            return
        digest = self._digest_of.get(pages[first - 1], _ROOT) if first else _ROOT
        if first and digest == _ROOT:
            return  # the page before is private, so the chain is known by other pages
        for index in range(first, len(token_ids) // self.page_size):
            digest = self._digest(digest, token_ids, index)
            if digest in self._page_of:
                return
            self._page_of[digest] = pages[index]
            self._digest_of[pages[index]] = digest

    def release(self, pages: Sequence[int]) -> list[int]:
        """Let go of pages; returns those whose content is gone for good.

        Later pages become reusable before earlier ones, so that a chain is eaten from its end.
        """
        gone = []
        for page in reversed(pages):
            self._holders[page] -= 1
            if self._holders[page] < 0:
                raise RuntimeError(f"page {page} was released more often than held")
            if self._holders[page] > 0:
                continue
            if page in self._digest_of:
                self._reusable[page] = None
            else:
                self._free.append(page)
                gone.append(page)
        return gone

    def _hold(self, page: int) -> None:
        self._reusable.pop(page, None)
        self._holders[page] += 1

    def _digest(self, previous: bytes, token_ids: Sequence[int], index: int) -> bytes:
        """Digest of all tokens up to the end of full page `index`."""
        start = index * self.page_size
        tokens = np.asarray(token_ids[start : start + self.page_size], dtype=np.int64)
        return hashlib.sha256(previous + tokens.tobytes()).digest()
