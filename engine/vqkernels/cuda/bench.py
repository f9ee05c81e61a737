"""`python -m vqkernels.cuda.bench [--json FILE]`: correctness, then speed, of every GPU kernel.

Correctness: every format over odd shapes against float64, once more under compute-sanitizer where
it is installed. Speed is that of a chain of different layers in one CUDA graph, of more bytes than
the second-level cache holds, so that every weight comes from memory as it does when a model
decodes. Rounds of the kernels are interleaved; medians of the rounds are printed beside torch's
float16 product and beside dequantizing with a torch product.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from operator import methodcaller
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vqkernels.cuda.check import TOLERANCE, Check, check_all
from vqkernels.cuda.gpu import Gpu
from vqkernels.cuda.opening import open_gpu
from vqkernels.cuda.samples import Sample, codebook_sample, gptq_sample, trellis_sample
from vqkernels.cuda.weights import Choice, CudaWeights

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008), (576, 576))
BATCHES = (1, 4, 8, 16, 64, 256)
CHAIN_BYTES = 160 * 2**20
MAX_LAYERS = 256
ROUNDS = 7
SANITIZER_SECONDS = 180
SANITIZER_SIZES = (160, 132)
SANITIZER_ROWS = (1, 3, 9, 33, 257)
TORCH = Choice("torch")


@dataclass(frozen=True)
class Row:
    """One format at one shape and batch; times per layer in microseconds, bandwidth in GB/s."""

    format: str
    out_features: int
    in_features: int
    batch: int
    kernel: str
    microseconds: float
    dequantize_microseconds: float
    torch_microseconds: float
    gigabytes_per_second: float
    bandwidth_share: float


def formats(shape: tuple[int, int]) -> dict[str, Sample]:
    """A random layer of every format."""
    return {
        **{f"gptq {bits} bit g128": gptq_sample(shape, bits) for bits in (2, 3, 4, 8)},
        "vq v4 k256 (2 bit)": codebook_sample(shape, 4, 1, 256),
        "vq v8 k256 (1 bit)": codebook_sample(shape, 8, 1, 256),
        "vq v8 k256+256 (2 bit)": codebook_sample(shape, 8, 2, 256),
        "vq v8 k65536 (2 bit)": codebook_sample(shape, 8, 1, 65536),
        **{f"trellis {bits} bit": trellis_sample(shape, bits) for bits in (2, 3, 4)},
    }


def measure(
    gpu: Gpu, name: str, sample: Sample, peak: float, batches: Sequence[int] = BATCHES
) -> Iterator[Row]:
    """Chained times of one format at one shape; `peak` is copied bytes per second."""
    first = sample.weights(gpu)
    num_bytes = packed_bytes(first)
    layers = [first, *(duplicate(first) for _ in range(chain_length(num_bytes) - 1))]
    dense_length = chain_length(2 * first.out_features * first.in_features)
    dense = [first.dequantize().contiguous().clone() for _ in range(dense_length)]
    for batch in batches:
        x = torch.randn(batch, first.in_features, device=gpu.device).half()
        choice = first.choose(batch)
        ours, dequantized, theirs = median_seconds(
            Chain(layers, methodcaller("product", x, choice)),
            Chain(layers, methodcaller("product", x, TORCH)),
            Chain(dense, partial(torch.nn.functional.linear, x)),
        )
        yield Row(
            format=name,
            out_features=first.out_features,
            in_features=first.in_features,
            batch=batch,
            kernel=f"{choice.kind}{choice.rows or ''}",
            microseconds=1e6 * ours,
            dequantize_microseconds=1e6 * dequantized,
            torch_microseconds=1e6 * theirs,
            gigabytes_per_second=num_bytes / ours / 1e9,
            bandwidth_share=num_bytes / ours / peak,
        )


def chain_length(num_bytes: int) -> int:
    """Layers of that many bytes which no cache holds together."""
    return min(MAX_LAYERS, max(2, -(-CHAIN_BYTES // num_bytes)))


def duplicate(weights: CudaWeights) -> CudaWeights:
    """The same layer elsewhere in memory."""
    twin = copy.copy(weights)
    for name, value in vars(weights).items():
        if isinstance(value, Tensor):
            setattr(twin, name, value.clone())
    return twin


def packed_bytes(weights: CudaWeights) -> int:
    """Bytes of every tensor that a product reads."""
    values = vars(weights).values()
    return sum(t.numel() * t.element_size() for t in values if isinstance(t, Tensor))


class Chain:
    """One product after the other with different layers, as a graph."""

    def __init__(self, layers: Sequence[Any], work: Callable[[Any], object]) -> None:
        self._length = len(layers)
        self._graph = captured(lambda: [work(layer) for layer in layers])

    def seconds(self) -> float:
        """Time of one layer in one replay."""
        return seconds(self._graph) / self._length


def median_seconds(*chains: Chain) -> list[float]:
    """Medians over interleaved rounds."""
    rounds = [[chain.seconds() for chain in chains] for _ in range(ROUNDS)]
    return [statistics.median(times) for times in zip(*rounds, strict=True)]


def captured(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """The work as a graph, after one run outside it."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def seconds(graph: torch.cuda.CUDAGraph) -> float:
    """One replay, by CUDA events."""
    events = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start, stop = events
    graph.replay()
    start.record()
    graph.replay()
    stop.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(stop)) / 1e3


def copy_bandwidth() -> float:
    """Bytes per second that a large device-to-device copy reads and writes."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    graph = captured(lambda: target.copy_(source))
    return 2 * source.numel() / min(seconds(graph) for _ in range(ROUNDS))


def report_checks(checks: Sequence[Check]) -> bool:
    """Print the worst of every format and whatever is wrong; True when all is right."""
    print("| format | out x in | worst error | by | with rows |")
    print("|---|---|---|---|---|")
    for name in dict.fromkeys(check.format for check in checks):
        of_format = [check for check in checks if check.format == name]
        wrong = [check for check in of_format if not check.is_right]
        for check in wrong or [max(of_format, key=lambda check: check.relative_error)]:
            shape = f"{check.out_features} x {check.in_features}"
            error = f"{check.relative_error:.1e}{'' if check.is_right else ' WRONG'}"
            print(f"| {name} | {shape} | {error} | {check.kernel} | {check.rows} |", flush=True)
    is_right = all(check.is_right for check in checks)
    print(f"\n{len(checks)} products, tolerance {TOLERANCE}: {'right' if is_right else 'WRONG'}\n")
    return is_right


def sanitize(cache: Path) -> bool:
    """The checks again under compute-sanitizer; True when it finds nothing or is not installed."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        print("compute-sanitizer is not installed: memory accesses are not checked\n")
        return True
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-m"]
    module = ["vqkernels.cuda.bench", "--sanitized", "--cache", str(cache)]
    try:
        done = subprocess.run(
            [*command, *module],
            capture_output=True,
            text=True,
            timeout=SANITIZER_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        print(f"compute-sanitizer did not finish in {SANITIZER_SECONDS} s: nothing is known\n")
        return True
    print(f"compute-sanitizer: exit status {done.returncode}")
    print("\n".join(done.stdout.splitlines()[-1 if done.returncode == 0 else -40 :]), "\n")
    return done.returncode == 0


def report_speed(gpu: Gpu, peak: float) -> list[Row]:
    """Print a table row by row."""
    print(f"{gpu.module.name}, torch {torch.__version__}, copy {peak / 1e9:.0f} GB/s\n")
    timed = ("us", "dequantize us", "torch fp16 us", "GB/s", "of copy")
    print(f"| {' | '.join(('format', 'out x in', 'batch', 'kernel', *timed))} |")
    print("|---|---|---|---|---|---|---|---|---|")
    rows: list[Row] = []
    for shape in SHAPES:
        for label, sample in formats(shape).items():
            for row in measure(gpu, label, sample, peak):
                rows.append(row)
                _print(row)
            torch.cuda.empty_cache()
    return rows


def _print(row: Row) -> None:
    cells = (
        row.format,
        f"{row.out_features} x {row.in_features}",
        str(row.batch),
        row.kernel,
        f"{row.microseconds:.2f}",
        f"{row.dequantize_microseconds:.2f}",
        f"{row.torch_microseconds:.2f}",
        f"{row.gigabytes_per_second:.0f}",
        f"{100 * row.bandwidth_share:.0f} %",
    )
    print(f"| {' | '.join(cells)} |", flush=True)


def main() -> int:
    """Print the tables; 1 when a kernel is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("--cache", type=Path, default=Path("build/cuda"), help="compiled kernels")
    parser.add_argument("--sanitized", action="store_true", help="a short check and nothing else")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU: torch sees no CUDA device", file=sys.stderr)
        return 1
    start = time.monotonic()
    gpu = open_gpu(arguments.cache, torch.device("cuda", torch.cuda.current_device()))
    print(f"kernels compiled or found in {time.monotonic() - start:.0f} s\n", flush=True)
    if arguments.sanitized:
        return int(not report_checks(check_all(gpu, SANITIZER_ROWS, SANITIZER_SIZES)))
    checks = check_all(gpu)
    is_right = report_checks(checks) and sanitize(arguments.cache)
    peak = copy_bandwidth()
    rows = report_speed(gpu, peak)
    if arguments.json is not None:
        content = {
            "device": gpu.module.name,
            "torch": torch.__version__,
            "copy_bytes_per_second": peak,
            "checks": [asdict(check) for check in checks],
            "rows": [asdict(row) for row in rows],
        }
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")
    print(f"\n{time.monotonic() - start:.0f} s in all")
    return int(not is_right)


if __name__ == "__main__":
    sys.exit(main())
