"""Measures decoding and prefill of several engines on one machine, in turns within one run.

Load on the machine then hits all of them alike. A turn of an engine is a fresh random prompt and an
answer of fixed length, sampling included; before and between turns the speed of reading memory is
taken, which is the ceiling of decoding at batch 1. Prints nothing.
"""

from __future__ import annotations

import importlib
import mmap
import os
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vqkernels import ThreadPool, native_status
from vqkernels.decoder import read_all
from vqllm.checkpoint import Checkpoint
from vqllm.errors import ExecutorUnavailable, InvalidConfig, UnsupportedModel
from vqllm.runtime.engine import Engine, EngineConfig
from vqllm.runtime.executors.native import NativeExecutor
from vqllm.runtime.loading import make_executor
from vqllm.runtime.sampling import SamplingParams
from vqllm.runtime.tokenizer import ChatTokenizer

ENGINES = ("native", "onnx", "llama.cpp")
READ_BYTES = 256 << 20  # beyond any cache
_READ_PIECES = 8  # timed one by one: a piece takes about as long as a step
_CEILING_QUANTILE = 0.9
MIN_ROUNDS = 5
_NUM_COLD_STEPS = 3

Report = Callable[[str], None]


@dataclass(frozen=True)
class BenchConfig:
    """What a turn is.

    Attributes:
        num_threads: of every engine; 0 leaves it to each.
        prompt_length: tokens of a prompt.
        num_tokens: tokens of an answer.
        batch_size: sequences at the same time; engines without batching do them alone.
        rounds: turns of every engine.
        temperature: of sampling; 0 is greedy.

    Raises:
        InvalidConfig: a value is outside its range.
    """

    num_threads: int = 0
    prompt_length: int = 512
    num_tokens: int = 64
    batch_size: int = 1
    rounds: int = MIN_ROUNDS
    temperature: float = 0.0

    def __post_init__(self) -> None:
        if self.rounds < MIN_ROUNDS:
            raise InvalidConfig("rounds", self.rounds, f"at least {MIN_ROUNDS}")
        for name in ("prompt_length", "batch_size"):
            if getattr(self, name) < 1:
                raise InvalidConfig(name, getattr(self, name), "at least 1")
        if self.num_tokens < 2 + _NUM_COLD_STEPS:
            raise InvalidConfig("num_tokens", self.num_tokens, f"at least {2 + _NUM_COLD_STEPS}")


@dataclass(frozen=True)
class BenchRow:
    """One engine on one model; times in milliseconds per step, over all rounds.

    Attributes:
        bits: true bits per weight of the decoder linears; None where the engine does not say.
        decode_tok_s: batch size over the median step.
        prefill_tok_s: prompt length over the median prefill.
        cold_ms: median step after 256 MiB of other memory were read.
        bytes_per_token: weights and cached keys and values that a step reads, of all sequences;
            without the lower half of the output head where greedy draws read only parts of it.
        ceiling_gb_s: speed of reading memory in this run, its 90th percentile: the ceiling is what
            the memory can do, not what it did while others loaded it.
        ceiling_fraction: speed of a cold step relative to the reads just before it, median: nothing
            is in a cache then, and a shared machine's memory is half as fast from one second to
            the next, so this is what the engine gets out of the memory.
        hot_fraction: bytes of a step over the median step, relative to `ceiling_gb_s`; above 1
            where a cache kept a part of the bytes from the step before.
        phase_us: microseconds per step by operation class, where the engine measures them.
        load_s: seconds from the folder to an engine that can step.
    """

    engine: str
    model: str
    bits: float | None
    threads: int
    batch_size: int
    decode_tok_s: float
    prefill_tok_s: float
    p10_ms: float
    median_ms: float
    p90_ms: float
    cold_ms: float
    bytes_per_token: int | None
    ceiling_gb_s: float
    ceiling_fraction: float | None
    hot_fraction: float | None
    phase_us: dict[str, float] | None
    load_s: float
    rounds: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Turn:
    """Seconds of one turn."""

    prefill: float
    steps: list[float] = field(default_factory=list)


class Contender(ABC):
    """One engine with one model loaded."""

    engine: str
    model: str
    bits: float | None = None
    bytes_per_token: int | None = None
    load_seconds: float
    vocab_size: int
    threads: int

    @abstractmethod
    def start(self, prompts: Sequence[list[int]], num_tokens: int) -> float:
        """Prefill all prompts; seconds until each has its first token."""

    @abstractmethod
    def step(self) -> float:
        """Seconds of one step of every sequence, sampling included."""

    @abstractmethod
    def stop(self) -> None:
        """Forget all sequences."""

    def phases(self) -> dict[str, float] | None:
        """Microseconds per step by operation class since the last call, or None."""
        return None


class EngineContender(Contender):
    """Our engine over one of our executors."""

    def __init__(self, executor: str, folder: Path, config: BenchConfig) -> None:
        start = time.perf_counter()
        checkpoint = Checkpoint(folder)
        limits = EngineConfig(
            max_num_sequences=config.batch_size,
            context_length=config.prompt_length + config.num_tokens + 1,
            max_tokens_per_step=max(512, config.batch_size),
        )
        runner = make_executor(checkpoint, executor, limits, config.num_threads)
        self._engine = Engine(runner, ChatTokenizer.from_folder(folder), limits)
        self.load_seconds = time.perf_counter() - start
        info = checkpoint.info()
        self.engine, self.model, self.bits = executor, info.name, info.bpw
        self.vocab_size = min(runner.vocab_size, checkpoint.config.vocab_size)
        self.threads = config.num_threads
        self._native = runner if isinstance(runner, NativeExecutor) else None
        if self._native is not None:
            mean_length = config.prompt_length + config.num_tokens // 2
            cached = config.batch_size * mean_length * self._native.token_bytes
            self.bytes_per_token = self._native.weight_bytes + cached
            if config.temperature == 0.0 and config.batch_size == 1:
                self.bytes_per_token -= self._native.spared_bytes
            self.threads = self._native.num_threads
        self._temperature = config.temperature
        self._names: list[str] = []

    def start(self, prompts: Sequence[list[int]], num_tokens: int) -> float:
        params = SamplingParams(
            max_tokens=num_tokens, temperature=self._temperature, seed=0, ignore_eos=True
        )
        begin = time.perf_counter()
        for index, prompt in enumerate(prompts):
            self._names.append(str(index))
            self._engine.add(str(index), prompt, params)
        waiting = set(self._names)
        while waiting:
            waiting -= {output.sequence_id for output in self._engine.step()}
        seconds = time.perf_counter() - begin
        self.phases()
        return seconds

    def step(self) -> float:
        begin = time.perf_counter()
        self._engine.step()
        return time.perf_counter() - begin

    def stop(self) -> None:
        for name in self._names:
            self._engine.abort(name)
        self._names.clear()

    def phases(self) -> dict[str, float] | None:
        if self._native is None:
            return None
        profile = self._native.take_profile()
        steps = max(profile.steps, 1)
        return {name: 1e6 * seconds / steps for name, seconds in profile.seconds.items()}


class LlamaCppContender(Contender):
    """llama.cpp through its Python binding; one sequence, its own sampler."""

    engine = "llama.cpp"

    def __init__(self, gguf: Path, config: BenchConfig) -> None:
        """Raises ExecutorUnavailable: llama_cpp is not installed."""
        try:
            llama_cpp: Any = importlib.import_module("llama_cpp")
        except ImportError as error:
            raise ExecutorUnavailable(
                "llama.cpp needs the package llama-cpp-python: pip install llama-cpp-python"
            ) from error
        start = time.perf_counter()
        self.threads = config.num_threads or len(os.sched_getaffinity(0))
        self._llama: Any = llama_cpp.Llama(
            str(gguf),
            n_ctx=config.prompt_length + config.num_tokens + 1,
            n_batch=512,
            n_threads=self.threads,
            n_threads_batch=self.threads,
            verbose=False,
        )
        self.load_seconds = time.perf_counter() - start
        self.model = gguf.stem
        self.bits, self._weight_bytes = _gguf_sizes(gguf)
        metadata = self._llama.metadata
        self._token_bytes = _half_cache_bytes(metadata)
        mean_length = config.prompt_length + config.num_tokens // 2
        self.bytes_per_token = self._weight_bytes + mean_length * self._token_bytes
        self.vocab_size = self._llama.n_vocab()
        # No filters, as in our own turns.
        self._sampling = {"temp": config.temperature, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
        self._token = 0

    def start(self, prompts: Sequence[list[int]], num_tokens: int) -> float:
        self._llama.reset()
        begin = time.perf_counter()
        self._llama.eval(prompts[0])
        self._token = self._llama.sample(**self._sampling)
        return time.perf_counter() - begin

    def step(self) -> float:
        begin = time.perf_counter()
        self._llama.eval([self._token])
        self._token = self._llama.sample(**self._sampling)
        return time.perf_counter() - begin

    def stop(self) -> None:
        self._llama.reset()


def _gguf_sizes(path: Path) -> tuple[float, int]:
    """Bits per weight of the blocks' matrices, and bytes that one token reads."""
    from gguf import GGUFReader

    tensors = GGUFReader(path).tensors
    names = {tensor.name for tensor in tensors}
    matrices = [t for t in tensors if t.name.startswith("blk.") and len(t.shape) == 2]
    bits = 8 * sum(int(t.n_bytes) for t in matrices) / sum(int(t.n_elements) for t in matrices)
    # A head of its own leaves one row of the embedding to read, which is nothing.
    unread = {"token_embd.weight"} if "output.weight" in names else set()
    return bits, sum(int(t.n_bytes) for t in tensors if t.name not in unread)


def _half_cache_bytes(metadata: dict[str, str]) -> int:
    """Cached keys and values of one position as halves, all layers."""
    prefix = metadata["general.architecture"]
    heads = int(metadata[f"{prefix}.attention.head_count"])
    kv_heads = int(metadata.get(f"{prefix}.attention.head_count_kv", heads))
    width = int(metadata[f"{prefix}.embedding_length"]) // heads
    return 2 * 2 * int(metadata[f"{prefix}.block_count"]) * kv_heads * width


class Memory:
    """Reads a block beyond any cache, as fast as the machine can."""

    def __init__(self, num_threads: int) -> None:
        """Raises ExecutorUnavailable: there is no native library."""
        status = native_status()
        if not status.available:
            raise ExecutorUnavailable(f"vqllm bench needs the native library: {status.reason}")
        self._block = _huge_block(READ_BYTES)
        self._block[:] = 1
        self._pool = ThreadPool(max(num_threads, 1))
        self.gb_s: list[float] = []

    def measure(self) -> float:
        """Read the block once; what the memory can do now, in GB/s.

        The caches hold nothing else afterwards.
        """
        for piece in np.split(self._block, _READ_PIECES):
            begin = time.perf_counter()
            read_all(piece, self._pool)
            self.gb_s.append(1e-9 * piece.size / (time.perf_counter() - begin))
        return float(np.quantile(self.gb_s[-_READ_PIECES:], _CEILING_QUANTILE))

    @property
    def ceiling(self) -> float:
        """GB/s that the memory can do: the 90th percentile of what was measured."""
        return float(np.quantile(self.gb_s, _CEILING_QUANTILE))


def _huge_block(num_bytes: int) -> NDArray[np.uint8]:
    block = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        block.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(block, dtype=np.uint8)


def make_contenders(
    folders: Sequence[Path],
    engines: Sequence[str],
    config: BenchConfig,
    ggufs: Sequence[Path] = (),
    report: Report = lambda line: None,
) -> list[Contender]:
    """Every engine with every model that it can run; `report` hears why one cannot.

    Raises:
        InvalidConfig: an engine has no such name.
        ExecutorUnavailable: nothing is left.
    """
    for name in engines:
        if name not in ENGINES:
            raise InvalidConfig("engines", name, f"of {', '.join(ENGINES)}")
    makers: list[tuple[str, Callable[[], Contender]]] = [
        (f"{name} on {folder.name}", partial(EngineContender, name, folder, config))
        for folder in folders
        for name in engines
        if name != LlamaCppContender.engine
    ]
    if ggufs and LlamaCppContender.engine not in engines:
        raise InvalidConfig("engines", ",".join(engines), "with llama.cpp to run a GGUF file")
    if LlamaCppContender.engine in engines:
        if not ggufs:
            raise InvalidConfig("gguf", None, "a GGUF file, because llama.cpp is to run one")
        makers += [
            (f"llama.cpp on {path.name}", partial(LlamaCppContender, path, config))
            for path in ggufs
        ]
    contenders = []
    for title, make in makers:
        try:
            contenders.append(make())
        except (ExecutorUnavailable, UnsupportedModel) as error:
            report(f"left out: {title}: {error}")
    if not contenders:
        raise ExecutorUnavailable("no engine can run any of the models; see above for the reasons")
    return contenders


def run_bench(
    contenders: Sequence[Contender], config: BenchConfig, report: Report = lambda line: None
) -> list[BenchRow]:
    """Turns of all contenders, round by round; one row each."""
    memory = Memory(max(contender.threads for contender in contenders))
    results = [_Result() for _ in contenders]
    random = np.random.default_rng(0)
    for index in range(config.rounds):
        report(f"round {index + 1} of {config.rounds}")
        for contender, result in zip(contenders, results, strict=True):
            size = (config.batch_size, config.prompt_length)
            prompts = random.integers(0, contender.vocab_size, size).tolist()
            _take_turn(contender, prompts, config, memory, result)
    return [
        _row(contender, result, config, memory.ceiling)
        for contender, result in zip(contenders, results, strict=True)
    ]


@dataclass
class _Result:
    prefills: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    cold: list[float] = field(default_factory=list)
    cold_gb_s: list[float] = field(default_factory=list)  # of reading, before each
    phases: list[dict[str, float]] = field(default_factory=list)


def _take_turn(
    contender: Contender,
    prompts: list[list[int]],
    config: BenchConfig,
    memory: Memory,
    result: _Result,
) -> None:
    memory.measure()
    result.prefills.append(contender.start(prompts, config.num_tokens))
    hot_steps = config.num_tokens - 1 - _NUM_COLD_STEPS
    result.steps += [contender.step() for _ in range(hot_steps)]
    phases = contender.phases()
    if phases is not None:
        result.phases.append(phases)
    for _ in range(_NUM_COLD_STEPS):
        result.cold_gb_s.append(memory.measure())
        result.cold.append(contender.step())
    contender.stop()


def _row(contender: Contender, result: _Result, config: BenchConfig, ceiling: float) -> BenchRow:
    median, cold = statistics.median(result.steps), statistics.median(result.cold)
    batch_size = 1 if isinstance(contender, LlamaCppContender) else config.batch_size
    prompt_tokens = batch_size * config.prompt_length
    read = contender.bytes_per_token
    return BenchRow(
        engine=contender.engine,
        model=contender.model,
        bits=contender.bits,
        threads=contender.threads,
        batch_size=batch_size,
        decode_tok_s=batch_size / median,
        prefill_tok_s=prompt_tokens / statistics.median(result.prefills),
        p10_ms=1e3 * float(np.quantile(result.steps, 0.1)),
        median_ms=1e3 * median,
        p90_ms=1e3 * float(np.quantile(result.steps, 0.9)),
        cold_ms=1e3 * cold,
        bytes_per_token=read,
        ceiling_gb_s=ceiling,
        ceiling_fraction=None if read is None else 1e-9 * read * _per_read_byte(result),
        hot_fraction=None if read is None else read / median / (1e9 * ceiling),
        phase_us=_median_phases(result.phases),
        load_s=contender.load_seconds,
        rounds=config.rounds,
    )


def _per_read_byte(result: _Result) -> float:
    """Median of 1 over what was read in a cold step's time at the speed just before it, in 1/GB."""
    return statistics.median(
        1 / (seconds * gb_s) for seconds, gb_s in zip(result.cold, result.cold_gb_s, strict=True)
    )


def _median_phases(phases: list[dict[str, float]]) -> dict[str, float] | None:
    if not phases:
        return None
    return {name: statistics.median(turn[name] for turn in phases) for name in phases[0]}
