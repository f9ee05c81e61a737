"""What became of each request, with times in seconds on one monotonic clock."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Fate(StrEnum):
    """How a request ended. All but OK miss every objective."""

    OK = "ok"
    REJECTED = "rejected"
    DROPPED = "dropped"
    ERROR = "error"
    UNFINISHED = "unfinished"


class RequestFailed(Exception):
    """A request that ended otherwise than OK; `reason` groups it in the report."""

    def __init__(self, fate: Fate, reason: str) -> None:
        super().__init__(f"{fate}: {reason}")
        self.fate = fate
        self.reason = reason


@dataclass(frozen=True)
class Reply:
    """What a driver saw of a finished request.

    `piece_times` are when text pieces arrived (empty where the answer is one message), sizes in
    bytes of payload, `num_tokens` as the server counted them.
    """

    sent_bytes: int = 0
    received_bytes: int = 0
    piece_times: tuple[float, ...] = ()
    num_tokens: int = 0


@dataclass(frozen=True)
class Outcome:
    """One request: when it was due, when it left, when it ended, and how."""

    due: float
    started: float
    finished: float
    fate: Fate
    reason: str = ""
    reply: Reply = Reply()

    @property
    def slip(self) -> float:
        """How late this generator was, in seconds."""
        return self.started - self.due

    @property
    def latency(self) -> float:
        """From the due time to the end, in seconds."""
        return self.finished - self.due

    @property
    def time_to_first_token(self) -> float | None:
        """From the due time to the first piece, in seconds; None without pieces."""
        return self.reply.piece_times[0] - self.due if self.reply.piece_times else None
