"""Model folder in, engine out: picks the executor and wires it to tokenizer and engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vqllm.checkpoint import Checkpoint
from vqllm.errors import CorruptCheckpoint, ExecutorUnavailable
from vqllm.model_info import ModelInfo
from vqllm.runtime.engine import Engine, EngineConfig
from vqllm.runtime.executors.base import Executor
from vqllm.runtime.tokenizer import ChatTokenizer


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
        executor: `onnx` (ONNX Runtime), `native` (our 4-bit kernel inside the reference's
            forward pass) or `torch` (the slow reference).
        config: limits of the engine; None is the defaults.
        num_threads: threads of one matrix product; 0 leaves it to the library.

    Raises:
        UnknownModel, UnsupportedModel, CorruptCheckpoint: the folder cannot be run.
        ExecutorUnavailable: no such executor, or its library is missing or installed twice.
    """
    config = config or EngineConfig()
    checkpoint = Checkpoint(folder)
    tokenizer = ChatTokenizer.from_folder(folder)
    if tokenizer.vocab_size > checkpoint.config.vocab_size:
        raise CorruptCheckpoint(
            f"{folder}: tokenizer.json has {tokenizer.vocab_size} tokens, the embedding "
            f"{checkpoint.config.vocab_size} rows"
        )
    runner = make_executor(checkpoint, executor, config, num_threads)
    return LoadedModel(Engine(runner, tokenizer, config), tokenizer, checkpoint.info())


def make_executor(
    checkpoint: Checkpoint, name: str, config: EngineConfig, num_threads: int = 0
) -> Executor:
    """The executor called `name`, with room for what `config` allows.

    Raises:
        ExecutorUnavailable: no such executor, or its library is missing or installed twice.
    """
    context_length = config.resolve_context_length(checkpoint.config.context_length)
    sizes = (context_length, config.max_num_sequences, num_threads)
    # Imported here: each brings a library that the other does not need.
    if name == "onnx":
        from vqllm.runtime.executors.onnx import OnnxExecutor

        return OnnxExecutor(checkpoint, *sizes)
    if name == "native":
        from vqllm.runtime.executors.native import NativeExecutor

        return NativeExecutor(checkpoint, *sizes)
    if name == "torch":
        from vqllm.runtime.executors.torch import TorchExecutor

        return TorchExecutor(checkpoint, *sizes)
    raise ExecutorUnavailable(f"no executor is called {name!r}; known: native, onnx, torch")
