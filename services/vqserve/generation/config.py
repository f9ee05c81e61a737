"""Settings of llmd: flags, environment (VQSERVE_*) and defaults, beside those of every service."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from vqserve.common.config import ServiceSettings


class GenerationSettings(ServiceSettings):
    """What llmd can be told."""

    grpc_port: int = Field(50052, ge=0, le=65535, description="gRPC port; 0 takes a free one")
    http_port: int = Field(8081, ge=0, le=65535, description="HTTP port; 0 takes a free one")
    model: Path = Field(description="Model folder, as written by vqllm quantize")
    model_name: str = Field("", description="Name that requests use; the folder's own when empty")
    executor: str = Field(
        "auto", description="What computes: cuda, native, onnx, torch, or the first that can"
    )
    num_threads: int = Field(
        0, ge=0, description="Threads of one matrix product; 0 leaves it to the library"
    )
    context_length: int | None = Field(
        None, ge=2, description="Tokens of prompt and answer together; the model's own when unset"
    )
    max_num_sequences: int = Field(8, ge=1, description="Sequences that one step advances together")
    max_tokens_per_step: int = Field(
        512, ge=1, description="Tokens that one step computes at most, prompts included"
    )
    kv_pages: int | None = Field(
        None, ge=1, description="Pages of the KV cache; enough for every sequence when unset"
    )
    draft_tokens: int = Field(
        0, ge=0, le=16, description="Tokens guessed ahead in repetitive text; 0 is off"
    )
    heartbeat_seconds: float = Field(
        15.0, gt=0, description="Longest silence of an event stream before a comment is sent"
    )
