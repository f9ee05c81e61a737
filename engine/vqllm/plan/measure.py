"""Times the operations of quantizing on this machine, fits them, and checks a held-out size.

Runs the code that `vqllm quantize` runs, on random weights of true layer shapes. Sizes are
visited in rounds and the least time counts, so that other work on the machine disturbs least.
"""

from __future__ import annotations

import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vqllm.plan.fit import Fit, Timing, fit
from vqllm.plan.hardware import MEASURED, Hardware
from vqllm.plan.operations import OPERATIONS, Shape
from vqllm.quantization.base import GroupedSpec
from vqllm.quantization.gptq import GptqOptions
from vqllm.quantization.hessian import Hessian, HessianFactor, factorize
from vqllm.quantization.methods import METHODS, method_of

TOKENS = 1024
STREAM_BYTES = 2**30
LEAST_SECONDS = 0.2  # of one timing

# (out, in): SmolLM2-135M down, TinyLlama and Llama-3.2-1B attention, a middle size, Llama-2-7B
# attention; held out is Llama-3.2-3B attention.
SHAPES = ((576, 1536), (2048, 2048), (1024, 2560), (4096, 4096))
HELD_OUT = (3072, 3072)


@dataclass(frozen=True)
class MeasureConfig:
    """What to time.

    Attributes:
        name: of the machine.
        shapes: (out, in) that are fitted.
        held_out: (out, in) that is predicted.
        repeats: rounds over all shapes.
        num_threads: of torch.
    """

    name: str
    shapes: tuple[tuple[int, int], ...] = SHAPES
    held_out: tuple[int, int] = HELD_OUT
    repeats: int = 3
    num_threads: int = 2


@dataclass(frozen=True)
class Measurement:
    """Timings of one operation, its fit, and the held-out size.

    Attributes:
        error: predicted over measured seconds of the held-out size, minus one.
    """

    operation: str
    timings: tuple[Timing, ...]
    held_out: Timing
    fit: Fit

    @property
    def predicted(self) -> float:
        """Modelled seconds of the held-out size."""
        return self.fit.seconds(OPERATIONS[self.operation], self.held_out.shape)

    @property
    def error(self) -> float:
        return self.predicted / self.held_out.seconds - 1


def measure_operation(
    name: str, config: MeasureConfig, report: Callable[[str], None] = lambda line: None
) -> Measurement:
    """Time one operation at every size of the config."""
    torch.set_num_threads(config.num_threads)
    shapes = [(TOKENS, *shape) for shape in (*config.shapes, config.held_out)]
    seconds = [float("inf")] * len(shapes)
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(config.repeats):
            for index, shape in enumerate(shapes):
                action = _action(name, shape, Path(folder))
                seconds[index] = min(seconds[index], _time(action))
    timings = [Timing(shape, least) for shape, least in zip(shapes, seconds, strict=True)]
    result = Measurement(
        name, tuple(timings[:-1]), timings[-1], fit(OPERATIONS[name], timings[:-1])
    )
    report(f"{name}: held-out size within {result.error:+.1%}")
    return result


def measure_stream(num_threads: int, repeats: int = 5) -> float:
    """Bytes per second of reading memory once, the least of some rounds."""
    torch.set_num_threads(num_threads)
    values = torch.ones(STREAM_BYTES // 4)
    best = min(_time(lambda: values.sum()) for _ in range(repeats))
    return STREAM_BYTES / best


def profile_of(
    config: MeasureConfig, measurements: Sequence[Measurement], stream: float, note: str
) -> Hardware:
    """A machine's profile from its measurements, with all sizes fitted together."""
    fits = {
        one.operation: fit(OPERATIONS[one.operation], (*one.timings, one.held_out))
        for one in measurements
    }
    return Hardware(
        name=config.name,
        basis=MEASURED,
        memory_bytes=float(_memory_bytes()),
        bytes_per_second=stream,
        fits=fits,
        note=note,
        validation={one.operation: one.error for one in measurements},
        timings={one.operation: _table(one) for one in measurements},
    )


def _table(one: Measurement) -> list[list[float]]:
    """Rows of (tokens, out, in, seconds), the held-out size last."""
    return [[*timing.shape, timing.seconds] for timing in (*one.timings, one.held_out)]


def profile_note(config: MeasureConfig) -> str:
    """Processor, date, versions and effort of a measurement."""
    date = time.strftime("%Y-%m-%d", time.gmtime())
    return (
        f"{_processor()}, {config.num_threads} threads, {date}, torch {torch.__version__}, "
        f"least of {config.repeats} rounds"
    )


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def measurable() -> list[str]:
    """Operations that this installation can run."""
    return [name for name in OPERATIONS if name in METHODS or name in _ACTIONS]


def _time(action: Callable[[], object]) -> float:
    """Seconds of one call; short ones are called again until there is enough to time."""
    count, start = 0, time.perf_counter()
    while True:
        action()
        count += 1
        elapsed = time.perf_counter() - start
        if elapsed > LEAST_SECONDS:
            return elapsed / count


def _action(name: str, shape: Shape, folder: Path) -> Callable[[], object]:
    """What is timed; everything it needs is made before."""
    if name in _ACTIONS:
        return _ACTIONS[name](shape, folder)
    _, rows, columns = shape
    method = method_of(name)
    options = GptqOptions(GroupedSpec()) if name == "gptq" else method.options()
    weight, factor = torch.randn(rows, columns), _random_factor(columns)
    return lambda: method.quantize(weight, factor, options)


def _random_factor(columns: int) -> HessianFactor:
    """A plausible factor without the cost of a real one: unit diagonal, small feedback."""
    upper = torch.randn(columns, columns).triu(1) * (0.1 / columns**0.5)
    upper += torch.eye(columns)
    return HessianFactor(torch.eye(columns, dtype=torch.float64), torch.arange(columns), upper)


def _gemm(shape: Shape, folder: Path) -> Callable[[], object]:
    tokens, rows, columns = shape
    inputs, weight = torch.randn(tokens, columns), torch.randn(rows, columns)
    return lambda: torch.nn.functional.linear(inputs, weight)


def _gram(shape: Shape, folder: Path) -> Callable[[], object]:
    tokens, _, columns = shape
    inputs, hessian = torch.randn(tokens, columns), Hessian(columns)
    return lambda: hessian.add(inputs)


def _factorize(shape: Shape, folder: Path) -> Callable[[], object]:
    columns = shape[2]
    hessian: Tensor = torch.eye(columns, dtype=torch.float64) + 0.01
    return lambda: factorize(hessian, 0.01)


def _write(shape: Shape, folder: Path) -> Callable[[], object]:
    values = np.random.default_rng(0).integers(0, 2**16, shape[1:], dtype=np.uint16)
    return lambda: (folder / "weights").write_bytes(values.data)


def _read(shape: Shape, folder: Path) -> Callable[[], object]:
    """Memory-mapped halves to float32, as weights are read; the file may lie in the page cache."""
    path = folder / f"weights-{shape[1]}-{shape[2]}"
    if not path.is_file():
        path.write_bytes(np.ones(shape[1:], dtype=np.float16).data)
    return lambda: np.memmap(path, np.float16, "r", shape=shape[1:]).astype(np.float32)


_ACTIONS: dict[str, Callable[[Shape, Path], Callable[[], object]]] = {
    "gemm": _gemm,
    "gram": _gram,
    "factorize": _factorize,
    "read": _read,
    "write": _write,
}


def _memory_bytes() -> int:
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) * 1024
    return 0
