"""llmd for tests: a model that costs nothing, and a handle on a real process.

`python -m support.llmd --model FOLDER` is llmd with the real engine, tokenizer and
wiring over a fake executor, which answers with one sentence again and again. The folder's name
decides how: `slow` takes 40 ms a step, `broken` fails in its third step, `lost` then cannot even
free its caches, `corrupt` does not load, `plain` has no chat template, anything else is just fast.
"""

from __future__ import annotations

import json
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from prometheus_client.parser import text_string_to_metric_families
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from support.process import POLL_SECONDS, ServiceProcess, service_process
from vqllm.errors import CorruptCheckpoint, UnknownModel
from vqllm.model_info import ModelInfo
from vqllm.runtime.engine import Engine
from vqllm.runtime.executors.base import Executor, Logits
from vqllm.runtime.tokenizer import ChatTokenizer
from vqserve.common.lifecycle import running
from vqserve.generation.__main__ import main
from vqserve.generation.app import build_app, engine_config
from vqserve.generation.config import GenerationSettings
from vqserve.generation.models import Loader

ANSWER = "A road, größer than it looks. "
END = "<|end|>"
TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "assistant: "
)
CONTEXT_LENGTH = 256
TINY_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class FakeModel:
    """What `vqllm.runtime.loading.load` would return."""

    engine: Engine
    tokenizer: ChatTokenizer
    info: ModelInfo


class FakeExecutor(Executor):
    """Makes the next byte of ANSWER certain, whatever the prompt was."""

    name = "fake"

    def __init__(self, answer: list[int], vocab_size: int, step_seconds: float) -> None:
        self.vocab_size = vocab_size
        self.context_length = CONTEXT_LENGTH
        self.max_num_sequences = 8
        self.num_steps = 0
        self.fails_at_step: int | None = None
        self.can_free = True
        self._answer = answer
        self._step_seconds = step_seconds
        self._positions: dict[int, int] = {}

    @property
    def providers(self) -> tuple[str, ...]:
        return ("fake",)

    def allocate(self) -> int:
        cache = min(set(range(self.max_num_sequences)) - self._positions.keys())
        self._positions[cache] = 0
        return cache

    def free(self, cache: int) -> None:
        if not self.can_free:
            raise RuntimeError("the fake executor has lost its caches")
        del self._positions[cache]

    def prefill(self, cache: int, token_ids: Sequence[int]) -> Logits:
        self._work()
        return self._logits(cache)

    def decode(self, caches: Sequence[int], token_ids: Sequence[int]) -> Logits:
        self._work()
        return np.stack([self._logits(cache) for cache in caches])

    def score(self, token_ids: Sequence[int]) -> Logits:
        raise NotImplementedError("llmd never scores a text")

    def _work(self) -> None:
        self.num_steps += 1
        time.sleep(self._step_seconds)
        if self.num_steps == self.fails_at_step:
            raise RuntimeError("the fake executor was told to fail")

    def _logits(self, cache: int) -> Logits:
        logits = np.zeros(self.vocab_size, dtype=np.float32)
        position = self._positions[cache]
        logits[self._answer[position % len(self._answer)]] = 50.0
        self._positions[cache] = position + 1
        return logits


def byte_tokenizer(has_template: bool = True) -> ChatTokenizer:
    """One token for each byte, and one that ends an answer."""
    tokenizer = _bytes_as_tokens()
    template = TEMPLATE if has_template else None
    return ChatTokenizer(tokenizer, frozenset({tokenizer.get_vocab()[END]}), template)


def _bytes_as_tokens() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {char: index for index, char in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END, special=True)])
    return tokenizer


def write_tiny_llama(folder: Path) -> None:
    """A model folder with one random layer, for the real loader."""
    folder.mkdir()
    tokenizer = _bytes_as_tokens()
    end = tokenizer.get_vocab()[END]
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"chat_template": TEMPLATE, "eos_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    config = {**TINY_LLAMA, "vocab_size": tokenizer.get_vocab_size(), "eos_token_id": end}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(_random_tensors(), folder / "model.safetensors", metadata={"format": "pt"})


def _random_tensors() -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(0)
    layer, shapes = "model.layers.0", {"model.embed_tokens": (257, 32)}
    for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
        shapes[f"{layer}.self_attn.{part}"] = (32, 32)
    for part in ("gate_proj", "up_proj"):
        shapes[f"{layer}.mlp.{part}"] = (64, 32)
    shapes[f"{layer}.mlp.down_proj"] = (32, 64)
    tensors = {name: rng.normal(0, 0.3, shape) for name, shape in shapes.items()}
    for norm in (f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm", "model.norm"):
        tensors[norm] = np.ones(32)
    return {f"{name}.weight": values.astype(np.float32) for name, values in tensors.items()}


def fake_model(settings: GenerationSettings, name: str) -> FakeModel:
    """A model that repeats ANSWER for ever; `name` picks its pace and its faults."""
    tokenizer = byte_tokenizer(has_template=name != "plain")
    step_seconds = 0.04 if name == "slow" else 0.0
    executor = FakeExecutor(tokenizer.encode(ANSWER), tokenizer.vocab_size, step_seconds)
    executor.fails_at_step = 3 if name in ("broken", "lost") else None
    executor.can_free = name != "lost"
    info = ModelInfo(name, "LlamaForCausalLM", "gptq", 4, 128, 4.16, 4.9, "0" * 16, 256, 1000)
    return FakeModel(Engine(executor, tokenizer, engine_config(settings)), tokenizer, info)


def fake_loader(settings: GenerationSettings) -> Loader:
    """Loads any existing folder; its name picks the pace and the faults."""

    def load(folder: Path) -> FakeModel:
        if not folder.is_dir():
            raise UnknownModel(f"{folder} is not a folder")
        if folder.name == "corrupt":
            raise CorruptCheckpoint(f"{folder}/model.safetensors: header is cut off")
        return fake_model(settings, folder.name)

    return load


class LlmServer(ServiceProcess):
    """A running llmd, with an eye on its metrics."""

    def metric(self, name: str, **labels: str) -> float:
        """Sum of a metric's series that have these labels; 0 when there is none."""
        with urllib.request.urlopen(f"{self.http_url}/metrics", timeout=10) as response:
            families = text_string_to_metric_families(response.read().decode())
        return sum(
            sample.value
            for family in families
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def wait_for_metric(self, name: str, expected: float, **labels: str) -> None:
        """Return once the metric has this value; AssertionError after 10 seconds."""
        last_chance = time.monotonic() + 10
        while (value := self.metric(name, **labels)) != expected:
            assert time.monotonic() < last_chance, f"{name} is {value}, expected {expected}"
            time.sleep(POLL_SECONDS)


@contextmanager
def llm_server(
    folder: Path, args: Sequence[str], module: str = "support.llmd"
) -> Iterator[LlmServer]:
    """llmd as a process on free ports, ready to serve; stopped on the way out."""
    with service_process(module, args, folder) as service:
        yield LlmServer(service.process, service.ports, service.log)


@asynccontextmanager
async def embedded_llmd(folder: Path, **settings: Any) -> AsyncIterator[str]:
    """llmd inside the running loop, over the fake model that `folder` names; its base URL."""
    folder.mkdir()
    chosen = GenerationSettings(model=folder, grpc_port=0, http_port=0, **settings)
    async with running(build_app(chosen, fake_loader(chosen))) as ports:
        yield f"http://{ports.host}:{ports.http}"


if __name__ == "__main__":
    sys.exit(main(make_loader=fake_loader))
