"""The models that llmd serves: loading them, naming them, and letting them go.

Each model has its own engine and thread. Knows no protobuf and no HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from vqllm.errors import UnsupportedModel, VqllmError
from vqllm.model_info import ModelInfo
from vqllm.runtime.engine import Engine
from vqllm.runtime.tokenizer import ChatTokenizer
from vqserve.common.admission import AdmissionGate
from vqserve.common.errors import AlreadyExists
from vqserve.common.metrics import ServerMetrics
from vqserve.generation import errors
from vqserve.generation.convert import translate
from vqserve.generation.driver import EngineDriver
from vqserve.generation.metrics import LlmMetrics, ModelMetrics
from vqserve.generation.request import ChatPrompt, Prompt, TextPrompt, TokenPrompt

_log = logging.getLogger(__name__)
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


class Loaded(Protocol):
    """What a loader returns; `vqllm.runtime.loading.LoadedModel` in production."""

    @property
    def engine(self) -> Engine:
        """An engine ready to step."""
        ...

    @property
    def tokenizer(self) -> ChatTokenizer:
        """Its tokenizer."""
        ...

    @property
    def info(self) -> ModelInfo:
        """Its facts."""
        ...


Loader = Callable[[Path], Loaded]


@dataclass(frozen=True)
class ServedModel:
    """One model under the name that requests use, with the thread that runs it."""

    name: str
    loaded: Loaded
    driver: EngineDriver
    metrics: ModelMetrics
    max_prompt_characters: int
    _encoders: ThreadPoolExecutor = field(repr=False)
    loaded_at: int = field(default_factory=lambda: int(time.time()))

    @property
    def info(self) -> ModelInfo:
        return self.loaded.info

    @property
    def architecture(self) -> str:
        """Family name, for example `llama`."""
        return self.info.architecture.removesuffix("ForCausalLM").lower()

    @property
    def executor(self) -> str:
        return self.loaded.engine.executor.name

    @property
    def context_length(self) -> int:
        """Tokens of prompt and answer that one request may have here."""
        return self.loaded.engine.context_length

    @property
    def vocab_size(self) -> int:
        return self.loaded.tokenizer.vocab_size

    async def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt, computed off the event loop.

        Raises:
            InvalidPrompt, NoChatTemplate: the conversation cannot be formatted.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._encoders, self._encode, prompt)

    async def decode(self, token_ids: list[int]) -> str:
        """Text of token ids.

        Raises:
            InvalidPrompt: an id is outside the vocabulary.
        """
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(
                self._encoders, self.loaded.tokenizer.decode, token_ids
            )
        except VqllmError as error:
            raise translate(error, "token_ids") from error

    async def close(self) -> None:
        """Abort what runs and end the model's threads; safe to call twice."""
        await self.driver.close()
        self._encoders.shutdown(wait=False)

    def _encode(self, prompt: Prompt) -> list[int]:
        match prompt:
            case TextPrompt(text):
                return self.loaded.tokenizer.encode(text)
            case ChatPrompt():
                return self._encode_chat(prompt)
            case TokenPrompt(token_ids):
                return list(token_ids)

    def _encode_chat(self, prompt: ChatPrompt) -> list[int]:
        turns = [{"role": turn.role, "content": turn.content} for turn in prompt.messages]
        try:
            return self.loaded.tokenizer.apply_chat_template(turns)
        except UnsupportedModel as error:
            raise errors.NoChatTemplate(str(error), field="chat.messages") from error
        except VqllmError as error:
            raise translate(error, "chat.messages") from error


@dataclass(frozen=True)
class Admission:
    """How much one model takes on: `running` together, `admitted` in all, waiting included."""

    running: int
    admitted: int


class ModelTable:
    """Loaded models by name. Used from the event loop only."""

    def __init__(
        self,
        loader: Loader,
        admission: Admission,
        server: ServerMetrics,
        metrics: LlmMetrics,
        on_engine_lost: Callable[[], None],
    ) -> None:
        """`on_engine_lost` is called on the event loop when an engine had to be given up."""
        self._on_engine_lost = on_engine_lost
        self._loader = loader
        self._admission = admission
        self._server = server
        self._metrics = metrics
        self._models: dict[str, ServedModel] = {}
        self._loading: set[str] = set()

    def __iter__(self) -> Iterator[ServedModel]:
        """Models in alphabetical order."""
        return iter([self._models[name] for name in sorted(self._models)])

    def __len__(self) -> int:
        return len(self._models)

    def get(self, name: str) -> ServedModel:
        """The model of that name; the only one when the name is empty.

        Raises:
            UnknownModel: there is none; the message lists the names that exist.
            AmbiguousModel: the name is empty and several models are loaded.
        """
        if not name and len(self._models) == 1:
            return next(iter(self._models.values()))
        known = ", ".join(sorted(self._models)) or "none"
        if not name and self._models:
            raise errors.AmbiguousModel(f"name one of the loaded models: {known}", field="model")
        model = self._models.get(name)
        if model is None:
            raise errors.UnknownModel(
                f"no model is called {name[:64]!r}; loaded: {known}", field="model"
            )
        return model

    async def load(self, folder: Path, name: str = "") -> ServedModel:
        """Load a folder on a thread and serve it beside the others.

        Raises:
            AlreadyExists: the name is taken.
            InvalidModelPath: the folder is not a readable model, or the name is malformed.
        """
        name = name or _name_from(folder)
        self._reserve(name)
        try:
            loaded = await asyncio.to_thread(self._loader, folder)
            model = self._serve(name, loaded)
        except VqllmError as error:
            raise translate(error, "path") from error
        finally:
            self._loading.discard(name)
        _log.info("model loaded", extra={"facts": {"model": name, "hash": model.info.revision}})
        return model

    async def unload(self, name: str) -> None:
        """Refuse new requests for a model, wait for the running ones, and let it go.

        Raises:
            UnknownModel: no such model.
            LastModel: it is the only one.
        """
        model = self.get(name or "\0")
        if len(self._models) == 1:
            raise errors.LastModel(f"{name!r} is the only model; drain the service instead")
        del self._models[name]
        await model.driver.wait_idle()
        await model.close()
        model.metrics.forget()
        _log.info("model unloaded", extra={"facts": {"model": name}})

    async def close(self) -> None:
        """Abort what still runs and end every model's threads."""
        await asyncio.gather(*(model.close() for model in self._models.values()))

    def _reserve(self, name: str) -> None:
        if not _NAME.fullmatch(name):
            raise errors.InvalidModelPath(
                f"{name[:80]!r} is no model name; use up to 64 of a-z 0-9 . _ -, "
                "a letter or digit first",
                field="name",
            )
        if name in self._models or name in self._loading:
            raise AlreadyExists(f"a model called {name!r} is loaded already", field="name")
        self._loading.add(name)

    def _serve(self, name: str, loaded: Loaded) -> ServedModel:
        metrics = ModelMetrics(self._metrics, name)
        metrics.describe(loaded.info, loaded.engine.executor.name)
        gate = AdmissionGate(self._admission.admitted, self._admission.running, self._server)
        driver = EngineDriver(loaded.engine, gate, metrics, self._on_engine_lost)
        max_characters = _longest_token(loaded.tokenizer) * loaded.engine.context_length
        encoders = ThreadPoolExecutor(2, thread_name_prefix="tokenizer")
        model = ServedModel(name, loaded, driver, metrics, max_characters, encoders)
        self._models[name] = model
        return model


def _longest_token(tokenizer: ChatTokenizer) -> int:
    """Most characters that one token may stand for; control tokens count as 64 at most."""
    lengths = (len(tokenizer.token_bytes(token_id)) for token_id in range(tokenizer.vocab_size))
    return max(64, *lengths)


def _name_from(folder: Path) -> str:
    return re.sub(r"[^a-z0-9._-]+", "-", folder.name.lower()).strip("-._") or "model"
