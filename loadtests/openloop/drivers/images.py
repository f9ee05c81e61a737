"""Unary calls of the tokenizer service: encode, decode, recognize."""

from __future__ import annotations

from abc import abstractmethod

from openloop.drivers.base import Driver
from openloop.outcome import Reply
from openloop.workload import Workload
from vqclient import NO_RETRY, ClientOptions, TokenizerClient


class ImageDriver(Driver):
    """One unary call per request, over pictures (or their codes) in turn."""

    default_model = "nav"

    def __init__(self, address: str, workload: Workload) -> None:
        super().__init__(address, workload)
        self.model = workload.model or self.default_model
        self._payloads: list[bytes] = []

    async def open(self) -> None:
        self._client = TokenizerClient(self.address, ClientOptions(retry=NO_RETRY))
        self._payloads = await self.payloads(self._client)
        await self.send(0)

    async def close(self) -> None:
        await self._client.close()

    async def send(self, index: int) -> Reply:
        payload = self._payloads[index % len(self._payloads)]
        return Reply(len(payload), await self.call(self._client, payload))

    async def payloads(self, client: TokenizerClient) -> list[bytes]:
        """What the requests carry: pictures, unless a subclass prepares codes."""
        return self.workload.images()

    @abstractmethod
    async def call(self, client: TokenizerClient, payload: bytes) -> int:
        """Send one payload; gives the size of the answer's payload in bytes."""


class EncodeDriver(ImageDriver):
    """Picture to codes."""

    async def call(self, client: TokenizerClient, payload: bytes) -> int:
        return len((await client.encode(payload, model=self.model)).codes)


class DecodeDriver(ImageDriver):
    """Codes to picture."""

    async def payloads(self, client: TokenizerClient) -> list[bytes]:
        images = self.workload.images()
        return [(await client.encode(image, model=self.model)).codes for image in images]

    async def call(self, client: TokenizerClient, payload: bytes) -> int:
        return len((await client.decode(payload)).image)


class RecognizeDriver(ImageDriver):
    """Picture to labels; the answer's size is that of the codes they were read from."""

    default_model = "food"

    async def call(self, client: TokenizerClient, payload: bytes) -> int:
        return (await client.recognize(image=payload, model=self.model)).coded_bytes
