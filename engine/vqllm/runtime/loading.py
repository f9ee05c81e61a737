"""Model folder in, engine out: picks the executor and wires it to tokenizer and engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vqllm.model_info import ModelInfo
from vqllm.runtime.engine import Engine, EngineConfig
from vqllm.runtime.tokenizer import ChatTokenizer

ExecutorName = Literal["onnx", "torch"]


@dataclass(frozen=True)
class LoadedModel:
    """An engine ready to step, the tokenizer of its model, and the model's facts."""

    engine: Engine
    tokenizer: ChatTokenizer
    info: ModelInfo


def load(
    folder: Path,
    executor: str = "onnx",
    config: EngineConfig | None = None,
    num_threads: int = 0,
) -> LoadedModel:
    """Load a Hugging Face folder, quantized by `vqllm quantize` or not.

    Args:
        folder: holds config.json, safetensors and the tokenizer files.
        executor: `onnx` (ONNX Runtime) or `torch` (the slow reference).
        config: limits of the engine; None is the defaults.
        num_threads: threads of one matrix product; 0 leaves it to the library.

    Raises:
        UnknownModel, UnsupportedModel, CorruptCheckpoint: the folder cannot be run.
        ExecutorUnavailable: the executor's library is missing or installed twice.
    """
    raise NotImplementedError
