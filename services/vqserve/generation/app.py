"""llmd put together: settings to a ServiceApp. Wiring only."""

from __future__ import annotations

from pathlib import Path

import grpc.aio

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
GRPC_NAME = generation_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name


def engine_config(settings: GenerationSettings) -> EngineConfig:
    """The engine's limits. It may queue all that is admitted: admission is the driver's."""
    return EngineConfig(
        max_num_sequences=settings.max_num_sequences,
        max_waiting=settings.max_concurrent_requests,
        context_length=settings.context_length,
    )


def engine_loader(settings: GenerationSettings) -> Loader:
    """Loads model folders with the executor and limits that the settings name."""
    config = engine_config(settings)

    def load_folder(folder: Path) -> Loaded:
        return load(folder, settings.executor, config, settings.num_threads)

    return load_folder


def build_app(settings: GenerationSettings, loader: Loader) -> ServiceApp:
    """llmd, ready to be run; `loader` makes an engine of a model folder."""
    runtime = Runtime.create(SERVICE_NAME, settings)
    admission = Admission(settings.max_num_sequences, settings.max_concurrent_requests)
    models = ModelTable(loader, admission, runtime.metrics, LlmMetrics(runtime.metrics.registry))
    core = GenerationCore(models)
    http = build_http(runtime, "llmd: text from quantized language models", render_error)
    add_routes(http, core, settings.heartbeat_seconds)

    async def load_first() -> None:
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
        load=load_first,
        close=models.close,
    )
