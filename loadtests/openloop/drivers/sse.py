"""Streamed /v1/chat/completions over HTTP, read as any OpenAI client reads it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx

from openloop.drivers.base import Driver
from openloop.outcome import Fate, Reply, RequestFailed

_DONE = "[DONE]"
_DATA = "data: "


class ChatCompletionsDriver(Driver):
    """One streamed chat completion per request, greedy."""

    async def open(self) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        self._client = httpx.AsyncClient(
            base_url=f"http://{self.address}", limits=limits, timeout=300.0, trust_env=False
        )
        try:
            listed = await self._listed_models()
        except httpx.HTTPError as error:
            raise RequestFailed(
                Fate.ERROR,
                f"cannot reach the HTTP port of the generation service at "
                f"{self.address}: {error or type(error).__name__}",
            ) from error
        self._model = self.workload.model or listed[0]
        await self.send(0)

    async def close(self) -> None:
        await self._client.aclose()

    async def send(self, index: int) -> Reply:
        body = self._body(index)
        reader = EventReader()
        try:
            async with self._client.stream("POST", "/v1/chat/completions", json=body) as response:
                await _require_ok(response)
                async for line in response.aiter_lines():
                    reader.feed(line)
        except httpx.HTTPError as error:
            raise RequestFailed(Fate.ERROR, type(error).__name__) from error
        return reader.reply(len(body["messages"][0]["content"].encode()))

    async def _listed_models(self) -> list[str]:
        response = await self._client.get("/v1/models")
        await _require_ok(response)
        return [str(model["id"]) for model in response.json()["data"]]

    def _body(self, index: int) -> dict[str, Any]:
        return {
            "model": self._model,
            "messages": [{"role": "user", "content": self.workload.prompt(index)}],
            "max_tokens": self.workload.max_tokens,
            "temperature": 0,
            "ignore_eos": True,  # An extension of llmd, as of other servers: equal lengths.
            "stream": True,
            "stream_options": {"include_usage": True},
        }


class EventReader:
    """Takes the lines of a server-sent event stream and times its pieces of text."""

    def __init__(self) -> None:
        self._times: list[float] = []
        self._num_bytes = 0
        self._num_tokens = 0
        self._is_done = False

    def feed(self, line: str) -> None:
        """Read one line; RequestFailed for an error event."""
        if not line.startswith(_DATA):
            return
        if line == _DATA + _DONE:
            self._is_done = True
            return
        event = json.loads(line.removeprefix(_DATA))
        if "error" in event:
            raise RequestFailed(Fate.ERROR, str(event["error"].get("code") or "STREAM_ERROR"))
        self._take(event)

    def reply(self, sent_bytes: int) -> Reply:
        """What was read; RequestFailed when the stream was torn before its end."""
        if not self._is_done:
            raise RequestFailed(Fate.ERROR, "STREAM_WITHOUT_DONE")
        return Reply(sent_bytes, self._num_bytes, tuple(self._times), self._num_tokens)

    def _take(self, event: dict[str, Any]) -> None:
        for choice in event.get("choices", ()):
            text = choice.get("delta", {}).get("content") or ""
            if text:
                self._times.append(asyncio.get_running_loop().time())
                self._num_bytes += len(text.encode())
        usage = event.get("usage")
        if usage:
            self._num_tokens = int(usage["completion_tokens"])


async def _require_ok(response: httpx.Response) -> None:
    if response.status_code == httpx.codes.OK:
        return
    body = (await response.aread()).decode(errors="replace")
    if response.status_code == httpx.codes.TOO_MANY_REQUESTS:
        raise RequestFailed(Fate.REJECTED, "HTTP_429")
    raise RequestFailed(Fate.ERROR, f"HTTP_{response.status_code} {body[:200]}".strip())
