"""tokenizerd put together: settings to a ServiceApp. Wiring only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from vqserve.common.admin import LoadedModel
from vqserve.common.admission import AdmissionGate
from vqserve.common.asgi import build_http
from vqserve.common.errors import ServiceError
from vqserve.common.lifecycle import GrpcService, ServiceApp, StartupError
from vqserve.common.runtime import Runtime
from vqserve.tokenizer.codecs import ModelStore, ServedModel
from vqserve.tokenizer.config import TokenizerSettings
from vqserve.tokenizer.core import TokenizerCore
from vqserve.tokenizer.health import HealthProbe
from vqserve.tokenizer.loading import load_served, load_served_file, with_bundle, zoo_names
from vqserve.tokenizer.metrics import ScqMetrics
from vqserve.tokenizer.pipeline import FramePipeline
from vqserve.tokenizer.rest import add_routes
from vqserve.tokenizer.service import TokenizerServicer
from vqserve.tokenizer.streams import FrameStreams, StreamLimits
from vqstack.tokenizer.v1 import tokenizer_pb2, tokenizer_pb2_grpc

SERVICE_NAME = "tokenizerd"
GRPC_NAME = tokenizer_pb2.DESCRIPTOR.services_by_name["TokenizerService"].full_name

# Turns one entry of `settings.models` and the pixel limit into a model.
ModelLoader = Callable[[str, int], ServedModel]


class Models:
    """Loads and unloads models; implements `vqserve.common.admin.ModelAdmin`."""

    def __init__(
        self,
        settings: TokenizerSettings,
        store: ModelStore,
        pipeline: FramePipeline,
        metrics: ScqMetrics,
        load: ModelLoader,
    ) -> None:
        self._settings = settings
        self._load = load
        self._store = store
        self._pipeline = pipeline
        self._metrics = metrics

    def model_names(self) -> list[str]:
        """Names of the loaded models, sorted."""
        return self._store.names

    async def load_configured(self) -> None:
        """Load what the settings name; StartupError says which one could not be loaded."""
        torch.set_num_threads(self._settings.effective_torch_threads)
        names = self._settings.model_names or tuple(zoo_names())
        for spec in names:
            try:
                model = await self._pipeline.run(self._load, spec, self._settings.max_image_pixels)
                await self._serve(model)
            except ServiceError as error:
                raise StartupError(f"--models {spec}: {error.message}") from error
        if not self._store.names:
            raise StartupError("no model to serve; name some with --models")

    async def load_model(self, path: Path, name: str) -> LoadedModel:
        """Load a model file and serve it beside the others."""
        limit = self._settings.max_image_pixels
        model = await self._pipeline.run(load_served_file, path, name, limit)
        await self._serve(model)
        return LoadedModel(model.name, model.card.model_hash)

    async def unload_model(self, name: str) -> None:
        """Stop serving a model; requests that have it keep it until they end."""
        model = self._store.by_name(name)
        self._store.remove(name)
        self._metrics.model_unloaded(name, model.card.model_hash)

    async def _serve(self, model: ServedModel) -> None:
        model = await self._pipeline.run(with_bundle, model, self._settings.bundle_root)
        self._store.add(model)
        card = model.card
        self._metrics.model_loaded(card.name, card.model_hash, card.num_codes)


def build_app(settings: TokenizerSettings, load: ModelLoader = load_served) -> ServiceApp:
    """A ServiceApp that loads the configured models when it starts.

    `load` turns one entry of `settings.models` and the pixel limit into a model.
    """
    runtime = Runtime.create(SERVICE_NAME, settings)
    store = ModelStore()
    metrics = ScqMetrics(runtime.metrics.registry, settings.codebook_window_frames)
    pipeline = FramePipeline(store, settings.engine_threads, settings.max_image_pixels)
    models = Models(settings, store, pipeline, metrics, load)
    frames = AdmissionGate(
        settings.max_concurrent_requests, settings.engine_threads, runtime.metrics
    )
    metrics.watch_queue(lambda: frames.waiting)
    health = HealthProbe(metrics, settings.health_probe_every)
    core = TokenizerCore(store, pipeline, frames, metrics, settings.max_request_bytes, health)
    open_streams = AdmissionGate(settings.max_streams, settings.max_streams, runtime.metrics)
    streams = FrameStreams(core, open_streams, _stream_limits(settings), runtime.state.refusing)
    servicer = TokenizerServicer(core, streams)
    http = build_http(runtime, "tokenizerd: frames to SCQ codes and back")
    add_routes(http, core, streams)

    async def close() -> None:
        await health.close()
        pipeline.close()

    return ServiceApp(
        runtime=runtime,
        grpc_services=(
            GrpcService(
                GRPC_NAME,
                lambda server: tokenizer_pb2_grpc.add_TokenizerServiceServicer_to_server(
                    servicer, server
                ),
            ),
        ),
        http=http,
        models=models,
        load=models.load_configured,
        close=close,
    )


def _stream_limits(settings: TokenizerSettings) -> StreamLimits:
    return StreamLimits(
        queue_frames=settings.stream_queue_frames,
        frames_at_work=settings.stream_frames_at_work,
        keyframe_interval=settings.keyframe_interval,
    )
