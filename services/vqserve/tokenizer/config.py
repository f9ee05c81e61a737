"""Settings of tokenizerd. See `vqserve.common.config` for where they come from."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, field_validator

from vqserve.common.config import ServiceSettings
from vqserve.common.cores import available_cores


class TokenizerSettings(ServiceSettings):
    """Flags and environment of `python -m vqserve.tokenizer`."""

    grpc_port: int = Field(
        default=50051, ge=0, le=65535, description="gRPC port; 0 takes a free one"
    )
    http_port: int = Field(
        default=8080, ge=0, le=65535, description="HTTP port; 0 takes a free one"
    )
    models: str = Field(
        default="",
        description="Models to serve, comma-separated: zoo names or paths of model files; "
        "every zoo model when empty",
    )
    engine_threads: int = Field(
        default=2, ge=1, description="Frames that are worked on at the same time"
    )
    torch_threads: int = Field(
        default=0,
        ge=0,
        description="Threads per frame inside torch; 0 shares the CPU's cores evenly",
    )
    max_streams: int = Field(default=64, ge=1, description="Frame streams open at the same time")
    stream_queue_frames: int = Field(
        default=4, ge=1, description="Frames of one stream that wait for their turn"
    )
    stream_frames_at_work: int = Field(
        default=2,
        ge=1,
        description="Frames of one stream at work at the same time: while one is coded, the next "
        "one's picture is read",
    )
    keyframe_interval: int = Field(
        default=30,
        ge=1,
        le=100_000,
        description="Frames from one key frame of an encoded stream to the next, unless the client "
        "says; 1 sends key frames only",
    )
    health_probe_every: int = Field(
        default=64,
        ge=0,
        description="One encoded frame in so many is decoded and solved exactly for the metrics "
        "of codebook and solver health; 0 never",
    )
    bundle_root: Path | None = Field(
        default=None,
        description="Folder with a bundle made by `scq export` for each model that has one, in a "
        "folder of the model's name; GetModel hands its files out",
    )
    codebook_window_frames: int = Field(
        default=256, ge=1, description="Frames over which the codebook use is measured"
    )

    @field_validator("models")
    @classmethod
    def _names_a_model(cls, models: str) -> str:
        if models.strip() and not models.replace(",", " ").strip():
            raise ValueError(f"{models!r} names no model; leave it empty to serve every zoo model")
        return models

    @property
    def model_names(self) -> tuple[str, ...]:
        """`models` split at its commas."""
        return tuple(name.strip() for name in self.models.split(",") if name.strip())

    @property
    def effective_torch_threads(self) -> int:
        """Threads that torch uses for one frame."""
        return self.torch_threads or max(1, available_cores() // self.engine_threads)
