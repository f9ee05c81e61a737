"""AdminService on its own listener: status, load, unload, drain.

Off by default and on loopback unless told otherwise: loading a model changes what the
service does, so nobody on the data path can reach it. Knows no engine: a service implements
`ModelAdmin`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import grpc.aio

from vqserve.common.errors import FailedPrecondition, InvalidArgument
from vqserve.common.runtime import Runtime
from vqstack.admin.v1 import admin_pb2, admin_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]


class AdminLoadsDisabled(FailedPrecondition):
    """The operator has not named a model root."""

    reason = "ADMIN_LOADS_DISABLED"


class PathNotAllowed(InvalidArgument):
    """A path that is relative, missing, or outside the model root."""

    reason = "PATH_NOT_ALLOWED"


@dataclass(frozen=True)
class LoadedModel:
    """What a load leads to: the name that requests use, and the content hash in hexadecimal."""

    name: str
    model_hash: str


class ModelAdmin(Protocol):
    """What a service can do with its models while it runs."""

    def model_names(self) -> list[str]:
        """Names of the loaded models, sorted."""
        ...

    async def load_model(self, path: Path, name: str) -> LoadedModel:
        """Load from `path` and serve; AlreadyExists, InvalidArgument or Unimplemented kinds."""
        ...

    async def unload_model(self, name: str) -> None:
        """Stop serving; NotFound, or FailedPrecondition when it is the last one."""
        ...


class AdminServicer(admin_pb2_grpc.AdminServiceServicer):
    """The RPC bodies of AdminService."""

    def __init__(self, runtime: Runtime, models: ModelAdmin) -> None:
        self._runtime = runtime
        self._models = models

    async def GetStatus(
        self, request: admin_pb2.GetStatusRequest, context: Context
    ) -> admin_pb2.GetStatusResponse:
        """State of the service."""
        state = self._runtime.state
        return admin_pb2.GetStatusResponse(
            service=self._runtime.name,
            version=self._runtime.version,
            models=self._models.model_names(),
            requests_in_flight=state.requests_in_flight,
            draining=state.is_draining,
            uptime_seconds=state.uptime_seconds,
        )

    async def LoadModel(
        self, request: admin_pb2.LoadModelRequest, context: Context
    ) -> admin_pb2.LoadModelResponse:
        """Load a model from inside the model root."""
        path = confined_path(request.path, self._runtime.settings.model_root)
        model = await self._models.load_model(path, request.name)
        return admin_pb2.LoadModelResponse(name=model.name, model_hash=model.model_hash)

    async def UnloadModel(
        self, request: admin_pb2.UnloadModelRequest, context: Context
    ) -> admin_pb2.UnloadModelResponse:
        """Stop serving a model."""
        await self._models.unload_model(request.name)
        return admin_pb2.UnloadModelResponse()

    async def Drain(
        self, request: admin_pb2.DrainRequest, context: Context
    ) -> admin_pb2.DrainResponse:
        """Begin shutdown."""
        in_flight = self._runtime.state.requests_in_flight
        self._runtime.state.request_drain()
        return admin_pb2.DrainResponse(requests_in_flight=in_flight)


def confined_path(path: str, root: Path | None) -> Path:
    """`path` with every link resolved, if it exists inside `root`; an error otherwise."""
    if root is None:
        raise AdminLoadsDisabled("no model root is configured; start the server with --model-root")
    candidate = Path(path)
    if not candidate.is_absolute():
        raise PathNotAllowed(f"path must be absolute, got {path!r}", field="path")
    resolved = candidate.resolve()
    if not resolved.is_relative_to(root.resolve()) or not resolved.exists():
        raise PathNotAllowed(f"{path!r} is not inside the model root", field="path")
    return resolved
