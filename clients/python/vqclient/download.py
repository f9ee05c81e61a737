"""One file of a model in chunks: resumed when the connection breaks, checked against its hash.

Knows GetModelArtifact; knows nothing of what is in the file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace

from grpc import StatusCode

from vqclient import convert
from vqclient.client import ReplyStream, ServiceClient, unexpected_reply
from vqclient.errors import InternalError
from vqclient.retry import call_with_retry
from vqclient.types import Artifact
from vqstack.tokenizer.v1 import tokenizer_pb2

Start = Callable[..., ReplyStream]


@dataclass
class _Download:
    """What has arrived so far."""

    described: Artifact | None
    data: bytearray

    def add(self, reply: tokenizer_pb2.GetModelArtifactResponse) -> None:
        if reply.HasField("artifact"):
            described = convert.artifact(reply.artifact)
            if self.described is not None and described.sha256 != self.described.sha256:
                # Another version was loaded meanwhile: what we have belongs to the old one.
                raise unexpected_reply(f"{described.name} changed while it was downloaded")
            self.described = described
        self.data += reply.chunk

    def finished(self) -> Artifact:
        if self.described is None:
            raise unexpected_reply("the service sent a file without its description")
        if hashlib.sha256(self.data).hexdigest() != self.described.sha256:
            raise InternalError(
                f"{self.described.name} arrived damaged: {len(self.data)} of "
                f"{self.described.size_bytes} bytes, and another SHA-256; download it again",
                code=StatusCode.DATA_LOSS,
                reason="DAMAGED_DOWNLOAD",
            )
        return replace(self.described, data=bytes(self.data))


async def download(
    client: ServiceClient, start: Start, model: str, name: str, timeout: float | None
) -> Artifact:
    """The file called `name`, whole; the retries of `client` go on where they stood."""
    state = _Download(None, bytearray())

    async def attempt(remaining: float) -> None:
        request = tokenizer_pb2.GetModelArtifactRequest(
            model=model, name=name, offset=len(state.data)
        )
        call = start(request, timeout=remaining, metadata=client.options.call_metadata())
        try:
            while True:
                reply = await client.read(call, tokenizer_pb2.GetModelArtifactResponse)
                if reply is None:
                    return
                state.add(reply)
        finally:
            call.cancel()

    seconds = client.options.timeout if timeout is None else timeout
    await call_with_retry(attempt, client.options.retry, seconds)
    return state.finished()
