"""Streamed generation over gRPC. Sequences ignore end-of-sequence, so that lengths are equal."""

from __future__ import annotations

import asyncio

from openloop.drivers.base import Driver
from openloop.outcome import Reply
from vqclient import NO_RETRY, ClientOptions, GenerationClient, Sampling


class GenerateDriver(Driver):
    """One Generate call per request, greedy."""

    async def open(self) -> None:
        self._client = GenerationClient(self.address, ClientOptions(timeout=300.0, retry=NO_RETRY))
        limit = self.workload.max_tokens
        self._sampling = Sampling(max_tokens=limit, temperature=0.0, ignore_eos=True)
        await self.send(0)

    async def close(self) -> None:
        await self._client.close()

    async def send(self, index: int) -> Reply:
        loop = asyncio.get_running_loop()
        prompt = self.workload.prompt(index)
        times: list[float] = []
        num_bytes = num_tokens = 0
        pieces = self._client.generate(prompt, model=self.workload.model, sampling=self._sampling)
        async for piece in pieces:
            if piece.token_ids:
                times.append(loop.time())
            num_bytes += len(piece.text.encode())
            num_tokens += len(piece.token_ids)
        return Reply(len(prompt.encode()), num_bytes, tuple(times), num_tokens)
