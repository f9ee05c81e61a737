"""JSON logs on stderr, one line per event and one line per request.

Configured by `__main__` only. Lines carry names, sizes, codes and durations; never prompt
text, images or codes.
"""

from __future__ import annotations

import json
import logging
import sys
import uuid
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

REQUEST_LOGGER = logging.getLogger("vqserve.request")
MAX_REQUEST_ID_LENGTH = 128


@dataclass
class RequestRecord:
    """What the request line will say; handlers add facts with `annotate`."""

    request_id: str
    protocol: str
    method: str
    facts: dict[str, Any] = field(default_factory=dict)


_current: ContextVar[RequestRecord | None] = ContextVar("vqserve_request", default=None)


def begin_request(record: RequestRecord) -> None:
    """Make `record` the current request of this task and of the tasks it starts."""
    _current.set(record)


def current_request_id() -> str:
    """Id of the request being served, or an empty string outside one."""
    record = _current.get()
    return record.request_id if record else ""


def annotate(**facts: Any) -> None:
    """Add facts (model, bytes, tokens ...) to the current request's log line."""
    record = _current.get()
    if record is not None:
        record.facts.update(facts)


def request_id_from(offered: str | None) -> str:
    """The client's x-request-id when it is short printable ASCII, else a new one."""
    is_short = offered is not None and 0 < len(offered) <= MAX_REQUEST_ID_LENGTH
    if offered and is_short and offered.isascii() and offered.isprintable():
        return offered
    return uuid.uuid4().hex


def log_event(logger: logging.Logger, level: int, event: str, **facts: Any) -> None:
    """One structured line: `event` is the message, `facts` become fields."""
    logger.log(level, event, extra={"facts": facts})


def log_request(record: RequestRecord, code: str, seconds: float) -> None:
    """The one line of a finished request."""
    log_event(
        REQUEST_LOGGER,
        logging.INFO,
        "request",
        request_id=record.request_id,
        protocol=record.protocol,
        method=record.method,
        code=code,
        seconds=round(seconds, 6),
        **record.facts,
    )


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time, level, logger, event, then the facts."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "service": self._service,
            "logger": record.name,
            "event": record.getMessage(),
        }
        line.update(getattr(record, "facts", {}))
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure(service: str, level: str) -> None:
    """Send every logger's lines to stderr as JSON; quiet uvicorn's own access log."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(service))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.getLogger("uvicorn.access").disabled = True
    logging.getLogger("uvicorn").setLevel(max(logging.WARNING, root.level))
