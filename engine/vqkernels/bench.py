"""``python -m vqkernels.bench``: packed matrices beside ONNX Runtime's MatMulNBits at equal bits.

All contenders of a shape are timed in turns within one run, so that load on the machine hits them
alike, activations' quantization included on both sides. Ours pays a ctypes call and a wake-up of
the pool per product, the peer runs many nodes in one session. Hot weights stay in the caches, cold
ones are a ring of copies larger than them. Not part of the library: the only module here that
prints.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vqkernels import matrix_reference
from vqkernels.matrix import Matrix, aligned_empty, matmul
from vqkernels.matrix_abi import matrix_library
from vqkernels.matrix_weights import GridWeights, TcqWeights, VqWeights, Weights
from vqkernels.pool import ThreadPool
from vqkernels.status import native_status

GROUP_SIZE = 128
MIN_ROUNDS = 5
SHAPES: tuple[tuple[int, int], ...] = ((576, 1536), (4096, 4096))
COLD_BYTES = 80 << 20  # per contender; the last-level cache holds 32 MiB
ORT_BITS = (2, 4, 8)
ORT_TOLERANCE = 0.03
ORT_HOT_NODES = 16
TRELLIS_MULTIPLIER = 2609

Call = Callable[[int], Any]
Maker = Callable[[np.random.Generator, int, int], Weights]


@dataclass(frozen=True)
class Contender:
    """Something to time: ``call(i)`` runs ``products`` GEMVs on weight copy i, ``nbytes`` each."""

    name: str
    call: Call
    nbytes: int
    products: int = 1


@dataclass(frozen=True)
class BenchConfig:
    """How to measure: ``rounds`` turns of about ``seconds`` per contender."""

    num_threads: int = 1
    rounds: int = 7
    seconds: float = 0.05

    def __post_init__(self) -> None:
        if self.rounds < MIN_ROUNDS:
            raise ValueError(f"rounds is {self.rounds}, must be at least {MIN_ROUNDS}")
        if self.num_threads < 1:
            raise ValueError(f"num_threads is {self.num_threads}, must be at least 1")


@dataclass(frozen=True)
class Row:
    """Times of one contender.

    Attributes:
        name: format, or the peer's.
        bits: per weight, scales and codebooks included.
        shape: outputs, inputs.
        where: "hot" or "cold".
        num_threads: of the product.
        median_us, min_us: microseconds per product.
    """

    name: str
    bits: float
    shape: tuple[int, int]
    where: str
    num_threads: int
    median_us: float
    min_us: float

    def __str__(self) -> str:
        out, columns = self.shape
        weights = out * columns
        return (
            f"{out:>6}x{columns:<5} {self.where:<4} T{self.num_threads} {self.name:<18} "
            f"{self.bits:5.2f} bit  median {self.median_us:8.1f} us  min {self.min_us:8.1f} us  "
            f"{weights / self.median_us / 1e3:6.1f} Gw/s  "
            f"{weights * self.bits / 8 / self.median_us / 1e3:5.1f} GB/s"
        )


def grid(bits: int) -> Maker:
    """Uniform codes, groups of 128."""

    def make(random: np.random.Generator, out: int, columns: int) -> Weights:
        codes = random.integers(0, 1 << bits, (columns, out), dtype=np.uint8)
        groups = -(-columns // GROUP_SIZE)
        scales = random.uniform(0.005, 0.015, (groups, out)).astype(np.float16)
        return GridWeights(codes, scales, bits=bits, group_size=GROUP_SIZE)

    return make


def tcq(bits: int) -> Maker:
    """Random streams, one scale per row."""

    def make(random: np.random.Generator, out: int, columns: int) -> Weights:
        return TcqWeights(
            codes=random.integers(0, 256, (columns, -(-out * bits // 8)), dtype=np.uint8),
            scales=random.uniform(0.005, 0.015, (1, out)).astype(np.float16),
            table=random.integers(-127, 128, 256).astype(np.int8),
            multiplier=TRELLIS_MULTIPLIER,
            bits=bits,
        )

    return make


def vq(length: int, *sizes: int) -> Maker:
    """Indices that use all entries alike: the worst case for large codebooks."""

    def make(random: np.random.Generator, out: int, columns: int) -> Weights:
        rows = -(-out // length)
        return VqWeights(
            tuple(random.integers(0, k, (rows, columns), dtype=np.uint16) for k in sizes),
            tuple((random.standard_normal((k, length)) * 0.02).astype(np.float16) for k in sizes),
            out,
        )

    return make


FORMATS: dict[str, Maker] = {
    "vq grid 2": grid(2),
    "vq grid 3": grid(3),
    "vq grid 4": grid(4),
    "vq grid 8": grid(8),
    "vq tcq 2": tcq(2),
    "vq tcq 3": tcq(3),
    "vq tcq 4": tcq(4),
    "vq K256 v4": vq(4, 256),
    "vq K256+256 v8": vq(8, 256, 256),
    "vq K4096 v8": vq(8, 4096),
    "vq K65536 v8": vq(8, 65536),
}


def run(config: BenchConfig, shapes: tuple[tuple[int, int], ...] = SHAPES) -> Iterator[Row]:
    """Measure every shape hot and cold; rows come as they are done."""
    for out, columns in shapes:
        for where in ("hot", "cold"):
            yield from bench_shape(out, columns, where, config)


def bench_shape(out: int, columns: int, where: str, config: BenchConfig) -> list[Row]:
    """All formats and peers on one shape."""
    x = np.random.default_rng(1).standard_normal(columns).astype(np.float32)
    with ThreadPool(config.num_threads) as pool:
        contenders = [
            native_contender(name, make(np.random.default_rng(0), out, columns), x, where, pool)
            for name, make in FORMATS.items()
        ]
        for bits in ORT_BITS:
            weights = grid(bits)(np.random.default_rng(0), out, columns)
            assert isinstance(weights, GridWeights)
            peer = ort_contender(weights, x, where, config.num_threads)
            contenders += [] if peer is None else [peer]
        times = measure(contenders, config)
    return [
        Row(
            c.name,
            c.nbytes * 8 / (out * columns),
            (out, columns),
            where,
            config.num_threads,
            statistics.median(times[c.name]) / c.products,
            min(times[c.name]) / c.products,
        )
        for c in contenders
    ]


def native_contender(
    name: str, weights: Weights, x: npt.NDArray[np.float32], where: str, pool: ThreadPool
) -> Contender:
    """Our product over a ring of packed copies."""
    first = Matrix(weights)
    ring = [first]
    for _ in range(num_copies(first.nbytes, where) - 1):
        memory = aligned_empty(first.nbytes)
        memory[:] = first.memory
        ring.append(Matrix(weights, memory=memory, is_packed=True))
    y = np.empty(first.out_features, dtype=np.float32)
    matmul(first, x, pool, out=y)
    product, x_at, y_at = matrix_library().vq_matrix_multiply, x.ctypes.data, y.ctypes.data
    handles = [matrix.handle for matrix in ring]

    def call(i: int, kept: Any = (ring, x, y)) -> Any:
        return product(handles[i % len(handles)], x_at, 1, y_at, 0, pool.handle)

    return Contender(name, call, first.nbytes)


def ort_contender(
    weights: GridWeights, x: npt.NDArray[np.float32], where: str, num_threads: int
) -> Contender | None:
    """MatMulNBits with int8 activations on the same codes; None where it is not installed.

    One session with a node per weight copy: every session has threads of its own that spin, and a
    ring of sessions would measure those.
    """
    try:
        import onnxruntime
    except ModuleNotFoundError:
        return None
    nbytes = weights.codes.size * weights.bits // 8 + 4 * weights.scales.size
    copies = num_copies(nbytes, where)
    nodes = max(copies, ORT_HOT_NODES)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    # Equal nodes would be merged; and no thread may spin into the next contender's turn.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.force_spinning_stop", "1")
    model = matmul_nbits_model(weights, copies, nodes)
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    binding.bind_cpu_input("x", x[None, :])
    for i in range(nodes):
        binding.bind_output(f"y{i}", "cpu")
    session.run_with_iobinding(binding)
    check_agreement(weights, x, binding.copy_outputs_to_cpu()[0][0])
    name = f"ort {weights.bits}-bit acc4"
    return Contender(name, lambda _: session.run_with_iobinding(binding), nbytes, products=nodes)


def num_copies(nbytes: int, where: str) -> int:
    """Copies that overflow the caches, or one that stays in them."""
    return 1 if where == "hot" else max(2, -(-COLD_BYTES // nbytes))


def matmul_nbits_model(weights: GridWeights, copies: int, nodes: int) -> bytes:
    """An ONNX model of ``nodes`` products of x with ``copies`` copies of the weights in turn."""
    from onnx import TensorProto, helper, numpy_helper

    packed = matmul_nbits_blocks(weights)
    scales = np.ascontiguousarray(weights.scales.T, dtype=np.float32).ravel()
    out, columns = weights.out_features, weights.in_features
    attributes: dict[str, Any] = {"K": columns, "N": out, "bits": weights.bits}
    attributes |= {"block_size": GROUP_SIZE, "accuracy_level": 4}
    products = [
        helper.make_node(
            "MatMulNBits",
            ["x", f"B{i % copies}", f"scales{i % copies}"],
            [f"y{i}"],
            domain="com.microsoft",
            **attributes,
        )
        for i in range(nodes)
    ]
    # Equal initializers would share memory: copy i is rolled by i rows.
    initializers = [
        numpy_helper.from_array(np.roll(packed, i, axis=0), f"B{i}") for i in range(copies)
    ]
    initializers += [numpy_helper.from_array(scales, f"scales{i}") for i in range(copies)]
    graph = helper.make_graph(
        products,
        "products",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, columns])],
        [helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, [1, out]) for i in range(nodes)],
        initializers,
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return bytes(model.SerializeToString())


def matmul_nbits_blocks(weights: GridWeights) -> npt.NDArray[np.uint8]:
    """B (out, groups, bytes) of MatMulNBits: lowest bits first, zero point 2^(bits - 1)."""
    bits, per_byte = weights.bits, 8 // weights.bits
    codes = np.full(
        (weights.num_groups * GROUP_SIZE, weights.out_features), 1 << (bits - 1), dtype=np.uint8
    )
    codes[: weights.in_features] = weights.codes
    shape = (weights.out_features, weights.num_groups, GROUP_SIZE // per_byte, per_byte)
    blocks = codes.T.reshape(shape)
    packed = np.zeros(shape[:-1], dtype=np.uint8)
    for i in range(per_byte):
        packed |= blocks[..., i] << np.uint8(i * bits)
    return packed


def check_agreement(
    weights: GridWeights, x: npt.NDArray[np.float32], y: npt.NDArray[np.float32]
) -> None:
    """A peer that computes something else must not be compared with."""
    exact = matrix_reference.matmul_float([weights], x[None, :])[0]
    error = float(np.linalg.norm(y - exact) / np.linalg.norm(exact))
    if error > ORT_TOLERANCE:
        raise RuntimeError(f"the peer's result is off by {error:.3f} relative; wrong layout?")


def time_turn_us(contender: Contender, first: int, calls: int) -> float:
    """Mean microseconds over one turn of consecutive calls."""
    start = time.perf_counter()
    for i in range(first, first + calls):
        contender.call(i)
    return (time.perf_counter() - start) / calls * 1e6


def measure(contenders: Sequence[Contender], config: BenchConfig) -> dict[str, list[float]]:
    """Turns of every contender, interleaved; a warm-up turn each is thrown away."""
    times: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    calls: dict[str, int] = {}
    for turn in range(config.rounds + 1):
        for contender in contenders:
            count = calls.get(contender.name, 3)
            took = time_turn_us(contender, turn * count, count)
            if turn == 0:
                calls[contender.name] = max(3, int(config.seconds * 1e6 / took))
            else:
                times[contender.name].append(took)
    return times


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the arguments, print a line per row as it is done; exit 1 without a native library."""
    parser = argparse.ArgumentParser(prog="python -m vqkernels.bench", description=__doc__)
    defaults = BenchConfig()
    parser.add_argument("--threads", type=int, default=defaults.num_threads)
    parser.add_argument("--rounds", type=int, default=defaults.rounds)
    parser.add_argument("--seconds", type=float, default=defaults.seconds)
    arguments = parser.parse_args(argv)
    status = native_status()
    print(status)
    if not status.available:
        return 1
    for row in run(BenchConfig(arguments.threads, arguments.rounds, arguments.seconds)):
        print(row, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
