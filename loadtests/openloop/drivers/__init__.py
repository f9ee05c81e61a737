"""The kinds of requests, by the name that scenarios use."""

from __future__ import annotations

from enum import StrEnum

from openloop.drivers.base import Driver
from openloop.drivers.frames import StreamDriver
from openloop.drivers.generation import GenerateDriver
from openloop.drivers.images import DecodeDriver, EncodeDriver, RecognizeDriver
from openloop.drivers.sse import ChatCompletionsDriver
from openloop.workload import Workload


class DriverName(StrEnum):
    """A kind of request."""

    TOKENIZER_ENCODE = "tokenizer-encode"
    TOKENIZER_DECODE = "tokenizer-decode"
    TOKENIZER_RECOGNIZE = "tokenizer-recognize"
    TOKENIZER_STREAM = "tokenizer-stream"
    LLM_GRPC = "llm-grpc"
    LLM_SSE = "llm-sse"


_DRIVERS: dict[DriverName, type[Driver]] = {
    DriverName.TOKENIZER_ENCODE: EncodeDriver,
    DriverName.TOKENIZER_DECODE: DecodeDriver,
    DriverName.TOKENIZER_RECOGNIZE: RecognizeDriver,
    DriverName.TOKENIZER_STREAM: StreamDriver,
    DriverName.LLM_GRPC: GenerateDriver,
    DriverName.LLM_SSE: ChatCompletionsDriver,
}


def make_driver(name: DriverName, address: str, workload: Workload) -> Driver:
    """The driver `name` towards `address`; nothing is sent yet."""
    return _DRIVERS[name](address, workload)


__all__ = ["Driver", "DriverName", "make_driver"]
