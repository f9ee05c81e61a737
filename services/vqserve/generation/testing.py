"""llmd for tests: a model that costs nothing, and a handle on a real process.

`python -m vqserve.generation.testing --model FOLDER` is llmd with the real engine, tokenizer and
wiring over a fake executor, which answers with one sentence again and again. The folder's name
decides how: `slow` takes 20 ms a step, `broken` fails in its third step, `corrupt` does not load,
`plain` has no chat template, anything else is just fast.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from vqllm.errors import CorruptCheckpoint, UnknownModel
from vqllm.model_info import ModelInfo
from vqllm.runtime.engine import Engine
from vqllm.runtime.executors.base import Executor, Logits
from vqllm.runtime.tokenizer import ChatTokenizer
from vqserve.generation.__main__ import engine_config, main
from vqserve.generation.config import GenerationSettings
from vqserve.generation.models import Loader

ANSWER = "A road, größer than it looks. "
END = "<|end|>"
TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "assistant: "
)
CONTEXT_LENGTH = 256


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
        logits[self._answer[position % len(self._answer)]] = 100.0
        self._positions[cache] = position + 1
        return logits


def byte_tokenizer(has_template: bool = True) -> ChatTokenizer:
    """One token for each byte, and one that ends an answer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {char: index for index, char in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END, special=True)])
    template = TEMPLATE if has_template else None
    end = tokenizer.get_vocab()[END]
    return ChatTokenizer(tokenizer, frozenset({end}), template)


def fake_model(
    settings: GenerationSettings, name: str = "fake", step_seconds: float = 0.0
) -> FakeModel:
    """A model that repeats ANSWER for ever."""
    tokenizer = byte_tokenizer(has_template=name != "plain")
    executor = FakeExecutor(tokenizer.encode(ANSWER), tokenizer.vocab_size, step_seconds)
    info = ModelInfo(name, "LlamaForCausalLM", "gptq", 4, 128, 4.16, 4.9, "0" * 16, 256, 1000)
    return FakeModel(Engine(executor, tokenizer, engine_config(settings)), tokenizer, info)


def fake_loader(settings: GenerationSettings) -> Loader:
    """Loads any existing folder; its name picks the pace and the faults."""

    def load(folder: Path) -> FakeModel:
        if not folder.is_dir():
            raise UnknownModel(f"{folder} is not a folder")
        if folder.name == "corrupt":
            raise CorruptCheckpoint(f"{folder}/model.safetensors: header is cut off")
        model = fake_model(settings, folder.name, 0.02 if folder.name == "slow" else 0.0)
        if folder.name == "broken":
            executor = model.engine.executor
            assert isinstance(executor, FakeExecutor)
            executor.fails_at_step = 3
        return model

    return load


@dataclass
class ServerProcess:
    """A running service process; `log` is the file that its stderr goes to."""

    process: subprocess.Popen[bytes]
    log: Path
    grpc_port: int
    http_port: int
    admin_port: int | None

    @property
    def grpc_target(self) -> str:
        return f"127.0.0.1:{self.grpc_port}"

    @property
    def http_url(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    def exposition(self) -> str:
        """The text of GET /metrics."""
        with urllib.request.urlopen(f"{self.http_url}/metrics", timeout=10) as response:
            return str(response.read().decode())

    def metric(self, name: str, **labels: str) -> float:
        """Sum of a metric's series that have these labels; 0 when there is none."""
        total = 0.0
        for series, value in re.findall(
            rf"^{name}(?:{{(.*)}})? (\S+)$", self.exposition(), flags=re.MULTILINE
        ):
            found = dict(re.findall(r'(\w+)="([^"]*)"', series))
            if labels.items() <= found.items():
                total += float(value)
        return total

    def wait_for_metric(self, name: str, expected: float, **labels: str) -> None:
        """Return once the metric has this value; AssertionError after 10 seconds."""
        last_chance = time.monotonic() + 10
        while (value := self.metric(name, **labels)) != expected:
            assert time.monotonic() < last_chance, f"{name} is {value}, expected {expected}"
            time.sleep(0.02)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.process.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        """The exit status, once the process has ended."""
        return self.process.wait(timeout=30)


@contextmanager
def server_process(folder: Path, arguments: Sequence[str]) -> Iterator[ServerProcess]:
    """Run `python ARGUMENTS...` with free ports until the block ends; files go to `folder`.

    Raises:
        RuntimeError: the process ended before it served; the message holds its log.
    """
    ports_file, log = folder / "ports.json", folder / "server.log"
    ports = ("--grpc-port", "0", "--http-port", "0", "--ports-file", str(ports_file))
    with log.open("wb") as stderr:
        process = subprocess.Popen([sys.executable, *arguments, *ports], stderr=stderr)
    try:
        yield _wait_until_serving(process, ports_file, log)
    finally:
        process.kill()
        process.wait()


def _wait_until_serving(
    process: subprocess.Popen[bytes], ports_file: Path, log: Path
) -> ServerProcess:
    last_chance = time.monotonic() + 60
    while not ports_file.exists():
        if process.poll() is not None or time.monotonic() > last_chance:
            raise RuntimeError(f"the server did not start:\n{log.read_text()}")
        time.sleep(0.02)
    ports = json.loads(ports_file.read_text())
    return ServerProcess(process, log, ports["grpc"], ports["http"], ports["admin"])


if __name__ == "__main__":
    sys.exit(main(make_loader=fake_loader))
