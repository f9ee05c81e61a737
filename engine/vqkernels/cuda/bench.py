"""`python -m vqkernels.cuda.bench [--json FILE]`: correctness, then speed, of every GPU kernel.

Speed is that of a chain of different layers in one CUDA graph, of more bytes than the second-level
cache holds, so that every weight comes from memory as it does when a model decodes. Rounds of the
formats are interleaved; medians of the rounds are printed beside torch's float16 product.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vqkernels.cuda.codebook import CodebookArrays, CodebookWeights
from vqkernels.cuda.driver import CudaModule
from vqkernels.cuda.gptq import GptqArrays, GptqWeights
from vqkernels.cuda.image import kernel_image
from vqkernels.cuda.trellis import TrellisArrays, TrellisWeights
from vqkernels.cuda.weights import CudaWeights

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008), (576, 576))
CHAIN_BYTES = 160 * 2**20
MAX_LAYERS = 512
ROUNDS = 7
TOLERANCE = 3e-3

Make = Callable[[np.random.Generator, int, int], CudaWeights]


@dataclass(frozen=True)
class Row:
    """One format at one shape and batch; times per layer in microseconds, bandwidth in GB/s."""

    format: str
    out_features: int
    in_features: int
    batch: int
    microseconds: float
    torch_microseconds: float
    gigabytes_per_second: float
    bandwidth_share: float
    relative_error: float


def formats(module: CudaModule, device: torch.device) -> dict[str, Make]:
    """How to make random weights of every format."""

    def gptq(bits: int) -> Make:
        def make(random: np.random.Generator, out: int, inputs: int) -> CudaWeights:
            words = random.integers(-(2**31), 2**31, (inputs * bits // 32, out)).astype(np.int32)
            scales = np.full((-(-inputs // 128), out), 0.01, np.float16)
            return GptqWeights(module, GptqArrays(words, scales, None, bits, 128), device)

        return make

    def codebook(v: int, stages: int, entries: int) -> Make:
        def make(random: np.random.Generator, out: int, inputs: int) -> CudaWeights:
            indices = random.integers(0, entries, (stages, out // v, inputs))
            table = (random.normal(size=(stages, entries, v)) * 0.05).astype(np.float16)
            return CodebookWeights(module, CodebookArrays(indices, table), device)

        return make

    def trellis(bits: int) -> Make:
        def make(random: np.random.Generator, out: int, inputs: int) -> CudaWeights:
            codes = random.integers(0, 256, (inputs, -(-out * bits // 8)), dtype=np.uint8)
            table = random.integers(-127, 128, 256).astype(np.int8)
            scales = np.full((1, out), 0.001, np.float16)
            return TrellisWeights(
                module, TrellisArrays(codes, table, scales, bits, 1917, 12), device
            )

        return make

    return {
        **{f"gptq {bits} bit g128": gptq(bits) for bits in (2, 3, 4, 8)},
        "vq v4 k256 (2 bit)": codebook(4, 1, 256),
        "vq v8 k256 (1 bit)": codebook(8, 1, 256),
        "vq v8 k256+256 (2 bit)": codebook(8, 2, 256),
        "vq v8 k65536 (2 bit)": codebook(8, 1, 65536),
        **{f"trellis {bits} bit": trellis(bits) for bits in (2, 3, 4)},
    }


def measure(make: Make, name: str, shape: tuple[int, int], batch: int, peak: float) -> Row:
    """Error and chained time of one format at one shape; `peak` is copied bytes per second."""
    random = np.random.default_rng(0)
    first = make(random, *shape)
    num_bytes = packed_bytes(first)
    count = min(MAX_LAYERS, max(2, -(-CHAIN_BYTES // num_bytes)))
    layers = [first, *(make(random, *shape) for _ in range(count - 1))]
    x = torch.randn(batch, shape[1], device="cuda").half()
    error = relative_error(first, x)
    dense_count = max(2, min(count, -(-CHAIN_BYTES // (2 * shape[0] * shape[1]))))
    dense = [layer.dequantize() for layer in layers[:dense_count]]
    ours = captured(lambda: [layer.linear(x) for layer in layers])
    theirs = captured(lambda: [x @ weight.T for weight in dense])
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS):
        times[0].append(seconds(ours) / count)
        times[1].append(seconds(theirs) / dense_count)
    ours_time, torch_time = (statistics.median(values) for values in times)
    return Row(
        format=name,
        out_features=shape[0],
        in_features=shape[1],
        batch=batch,
        microseconds=1e6 * ours_time,
        torch_microseconds=1e6 * torch_time,
        gigabytes_per_second=num_bytes / ours_time / 1e9,
        bandwidth_share=num_bytes / ours_time / peak,
        relative_error=error,
    )


def packed_bytes(weights: CudaWeights) -> int:
    """Bytes of every tensor that a product reads."""
    skipped = ("_splits",)
    return sum(
        value.numel() * value.element_size()
        for name, value in vars(weights).items()
        if isinstance(value, Tensor) and name not in skipped
    )


def relative_error(weights: CudaWeights, x: Tensor) -> float:
    """Against a float64 product with the dequantized weights."""
    expected = x.double() @ weights.dequantize().double().T
    return float(((weights.linear(x).double() - expected).norm() / expected.norm()).item())


def captured(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """The work as a graph, after one run outside it."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
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


def main() -> int:
    """Print the table; 1 when a kernel is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("--cache", type=Path, default=Path("build/cuda"), help="compiled kernels")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU: torch sees no CUDA device", file=sys.stderr)
        return 1
    device = torch.device("cuda")
    torch.cuda.init()  # type: ignore[no-untyped-call]
    module = CudaModule(kernel_image(arguments.cache, torch.cuda.get_device_capability()))
    peak = copy_bandwidth()
    name = torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}, copy {peak / 1e9:.0f} GB/s\n")
    print("| format | out x in | batch | us | torch fp16 us | GB/s | of copy | error |")
    print("|---|---|---|---|---|---|---|---|")
    rows = []
    for shape in SHAPES:
        for batch in (1, 4, 16):
            for label, make in formats(module, device).items():
                rows.append(measure(make, label, shape, batch, peak))
                _print(rows[-1])
                torch.cuda.empty_cache()
    if arguments.json is not None:
        content = {"device": name, "torch": torch.__version__, "copy_bytes_per_second": peak}
        content["rows"] = [asdict(row) for row in rows]
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")
    return int(any(row.relative_error > TOLERANCE for row in rows))


def _print(row: Row) -> None:
    shape = f"{row.out_features} x {row.in_features}"
    numbers = f"{row.microseconds:.2f} | {row.torch_microseconds:.2f}"
    rates = f"{row.gigabytes_per_second:.0f} | {100 * row.bandwidth_share:.0f} %"
    cells = (row.format, shape, str(row.batch), numbers, rates, f"{row.relative_error:.1e}")
    print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
