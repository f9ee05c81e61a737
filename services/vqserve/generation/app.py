"""llmd put together: settings to a ServiceApp. Wiring only."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc.aio

from vqllm.runtime.drafting import DraftConfig
from vqllm.runtime.engine import EngineConfig
from vqllm.runtime.loading import load
from vqserve.common.asgi import build_http
from vqserve.common.errors import ServiceError
from vqserve.common.lifecycle import GrpcService, ServiceApp, StartupError
from vqserve.common.runtime import Runtime
from vqserve.generation.admin import GenerationAdmin
from vqserve.generation.config import GenerationSettings
from vqserve.generation.core import GenerationCore
from vqserve.generation.metrics import LlmMetrics
from vqserve.generation.models import Admission, Loaded, Loader, ModelTable
from vqserve.generation.openai import add_routes, render_error
from vqserve.generation.service import GenerationService
from vqstack.generation.v1 import generation_pb2, generation_pb2_grpc

SERVICE_NAME = "llmd"
# For the last messages to reach their clients before the listeners close.
ABORT_MARGIN_SECONDS = 0.2
GRPC_NAME = generation_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name


def engine_config(settings: GenerationSettings) -> EngineConfig:
    """The engine's limits. It may queue all that is admitted: admission is the driver's."""
    return EngineConfig(
        max_num_sequences=settings.max_num_sequences,
        max_waiting=settings.max_concurrent_requests,
        context_length=settings.context_length,
        max_tokens_per_step=settings.max_tokens_per_step,
        num_pages=settings.kv_pages,
        draft=DraftConfig(settings.draft_tokens),
    )


def engine_loader(settings: GenerationSettings) -> Loader:
    """Loads model folders with the executor and limits that the settings name."""
    config = engine_config(settings)

    def load_folder(folder: Path) -> Loaded:
        return load(folder, settings.executor, config, settings.num_threads)

    return load_folder


def build_app(settings: GenerationSettings, loader: Loader) -> ServiceApp:
    """A ServiceApp that loads the configured model when it starts; `loader` reads its folder."""
    runtime = Runtime.create(SERVICE_NAME, settings)
    models = _model_table(settings, loader, runtime)
    core = GenerationCore(models)
    http = build_http(runtime, "llmd: text from quantized language models", render_error)
    add_routes(http, core, settings.heartbeat_seconds)
    ending = _Ending(runtime, models)

    async def load_configured() -> None:
        ending.watch()
        try:
            await models.load(settings.model, settings.model_name)
        except ServiceError as error:
            raise StartupError(error.message) from error

    def register(server: grpc.aio.Server) -> None:
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(GenerationService(core), server)

    return ServiceApp(
        runtime=runtime,
        grpc_services=(GrpcService(GRPC_NAME, register),),
        http=http,
        models=GenerationAdmin(models),
        load=load_configured,
        close=ending.close,
    )


def _model_table(settings: GenerationSettings, loader: Loader, runtime: Runtime) -> ModelTable:
    # A process without its engine is of no use: it drains, and whoever runs it starts another.
    return ModelTable(
        loader,
        Admission(settings.max_num_sequences, settings.max_concurrent_requests),
        runtime.metrics,
        LlmMetrics(runtime.metrics.registry),
        on_engine_lost=runtime.state.request_drain,
    )


class _Ending:
    """Ends the engines: shortly before a drain's grace is over, so that streams which are still
    running end with ABORT instead of a cut connection."""

    def __init__(self, runtime: Runtime, models: ModelTable) -> None:
        self._state = runtime.state
        self._patience = max(0.0, runtime.settings.drain_grace_seconds - ABORT_MARGIN_SECONDS)
        self._models = models
        self._watch: asyncio.Task[None] | None = None

    def watch(self) -> None:
        """Begin to wait for a drain."""
        self._watch = asyncio.create_task(self._abort_late_streams())

    async def close(self) -> None:
        """End the engines now."""
        if self._watch is not None:
            self._watch.cancel()
        await self._models.close()

    async def _abort_late_streams(self) -> None:
        await self._state.refusing.wait()
        await asyncio.sleep(self._patience)
        await self._models.close()
