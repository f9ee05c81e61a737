"""Model folder in, engine out: picks the executor and wires it to tokenizer and engine."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from vqllm.checkpoint import Checkpoint
from vqllm.errors import CorruptCheckpoint, ExecutorUnavailable, UnsupportedModel
from vqllm.model_info import ModelInfo
from vqllm.runtime.engine import Engine, EngineConfig
from vqllm.runtime.executors.base import Executor
from vqllm.runtime.tokenizer import ChatTokenizer

logger = logging.getLogger(__name__)


class Sizes(NamedTuple):
    """What every executor is made with; `num_pages` None is room for all sequences."""

    context_length: int
    max_num_sequences: int
    num_threads: int
    num_pages: int | None


@dataclass(frozen=True)
class LoadedModel:
    """An engine ready to step, the tokenizer of its model, and the model's facts."""

    engine: Engine
    tokenizer: ChatTokenizer
    info: ModelInfo


def load(
    folder: Path,
    executor: str = "auto",
    config: EngineConfig | None = None,
    num_threads: int = 0,
) -> LoadedModel:
    """Load a Hugging Face folder, quantized by `vqllm quantize` or not.

    Args:
        folder: holds config.json, safetensors and the tokenizer files.
        executor: `cuda` (our GPU kernels), `native` (our decoder step on packed weights), `onnx`
            (ONNX Runtime), `torch` (the slow reference), or `auto`, the first of them that can run
            the folder here.
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
    """The executor called `name`, or for `auto` the fastest one that runs the folder as it is.

    Raises:
        ExecutorUnavailable: no such executor, or its library is missing or installed twice.
        UnsupportedModel: the executor cannot run this folder.
    """
    context_length = config.resolve_context_length(checkpoint.config.context_length)
    sizes = Sizes(context_length, config.max_num_sequences, num_threads, config.num_pages)
    if name == "auto":
        return _first_that_runs(checkpoint, sizes)
    if name not in _MAKERS:
        known = ", ".join(("auto", *_MAKERS))
        raise ExecutorUnavailable(f"no executor is called {name!r}; known: {known}")
    return _MAKERS[name](checkpoint, sizes)


def _first_that_runs(checkpoint: Checkpoint, sizes: Sizes) -> Executor:
    # The native executor would round the weights of a plain folder to 8 bits: not asked for.
    skipped = () if checkpoint.quantization is not None else ("native",)
    for name in (name for name in _MAKERS if name not in skipped):
        try:
            executor = _MAKERS[name](checkpoint, sizes)
        except (ExecutorUnavailable, UnsupportedModel) as error:
            logger.info("executor %s cannot run %s: %s", name, checkpoint.folder, error)
        else:
            logger.info("executor %s runs %s", name, checkpoint.folder)
            return executor
    raise UnsupportedModel(f"no executor can run {checkpoint.folder}; the log says why")


# Imported where they are made: each brings a library that the others do not need.
def _make_cuda(checkpoint: Checkpoint, sizes: Sizes) -> Executor:
    from vqllm.runtime.executors.cuda import CudaExecutor

    return CudaExecutor(checkpoint, *sizes[:3])


def _make_native(checkpoint: Checkpoint, sizes: Sizes) -> Executor:
    from vqllm.runtime.executors.native import NativeExecutor, NativeOptions

    return NativeExecutor(checkpoint, *sizes[:3], NativeOptions(num_pages=sizes.num_pages))


def _make_onnx(checkpoint: Checkpoint, sizes: Sizes) -> Executor:
    from vqllm.runtime.executors.onnx import OnnxExecutor

    return OnnxExecutor(checkpoint, *sizes[:3])


def _make_torch(checkpoint: Checkpoint, sizes: Sizes) -> Executor:
    from vqllm.runtime.executors.torch import TorchExecutor

    return TorchExecutor(checkpoint, *sizes[:3])


# In the order in which `auto` tries them.
_MAKERS: dict[str, Callable[[Checkpoint, Sizes], Executor]] = {
    "cuda": _make_cuda,
    "native": _make_native,
    "onnx": _make_onnx,
    "torch": _make_torch,
}
