"""A whole frame stream over either wire: all requests in, all responses out."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import grpc.aio
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from support.process import grpc_failure
from vqstack.tokenizer.v1 import tokenizer_pb2 as pb
from vqstack.tokenizer.v1 import tokenizer_pb2_grpc

STREAM_SECONDS = 20


class StreamEnded(Exception):
    """The stream was ended by the server; the reason it gave."""


async def over_grpc(
    address: str, requests: Sequence[pb.StreamFramesRequest]
) -> list[pb.StreamFramesResponse]:
    """Every response of a gRPC stream; raises StreamEnded when the server ended it."""
    async with grpc.aio.insecure_channel(address) as channel:
        call = tokenizer_pb2_grpc.TokenizerServiceStub(channel).StreamFrames(iter(requests))
        try:
            async with asyncio.timeout(STREAM_SECONDS):
                return [response async for response in call]
        except grpc.aio.AioRpcError as error:
            raise StreamEnded(grpc_failure(error).reason) from error


async def over_websocket(
    url: str, requests: Sequence[pb.StreamFramesRequest]
) -> list[pb.StreamFramesResponse]:
    """As many responses of a WebSocket as there are requests; raises StreamEnded."""
    responses: list[pb.StreamFramesResponse] = []
    async with connect(url) as socket, asyncio.timeout(STREAM_SECONDS):
        for request in requests:
            await socket.send(request.SerializeToString())
        try:
            while len(responses) < len(requests):
                message = await socket.recv(decode=False)
                responses.append(pb.StreamFramesResponse.FromString(message))
        except ConnectionClosed as error:
            reason = error.rcvd.reason if error.rcvd else ""
            raise StreamEnded(reason.partition(":")[0]) from error
    return responses
