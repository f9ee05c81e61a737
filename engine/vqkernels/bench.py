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
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vqkernels import matrix_reference
from vqkernels.closing import Closing
from vqkernels.matrix import Matrix, aligned_empty, matmul
from vqkernels.matrix_abi import matrix_library
from vqkernels.matrix_weights import GridWeights, VqWeights, Weights
from vqkernels.pool import ThreadPool
from vqkernels.status import native_status
from vqkernels.synthetic import Maker, grid, tcq, vq

GROUP_SIZE = 128
MIN_ROUNDS = 5
SHAPES: tuple[tuple[int, int], ...] = ((576, 1536), (4096, 4096))
COLD_BYTES = 80 << 20  # per contender; the last-level cache holds 32 MiB
ORT_BITS = (2, 4, 8)
ORT_TOLERANCE = 0.03
ORT_HOT_NODES = 16
VPTQ_SHAPES: tuple[tuple[int, int], ...] = ((4096, 4096), (11008, 4096))  # of 7B models
VPTQ_CODES = 65536
VPTQ_SCRIPT = Path(__file__).with_name("vptq_script.py")

Call = Callable[[int], Any]


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


FORMATS: dict[str, Maker] = {
    "vq grid 2": grid(2),
    "vq grid 3": grid(3),
    "vq grid 4": grid(4),
    "vq grid 8": grid(8),
    "vq tcq 2": tcq(2, num_levels=64),
    "vq tcq 3": tcq(3, num_levels=128),
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
            native_contender(name, make(out, columns, 0), x, where, pool)
            for name, make in FORMATS.items()
        ]
        for bits in ORT_BITS:
            weights = grid(bits)(out, columns, 0)
            assert isinstance(weights, GridWeights)
            peer = ort_contender(weights, x, where, config.num_threads)
            contenders += [] if peer is None else [peer]
        times = measure(contenders, config)
    return [row_of(c, times[c.name], (out, columns), where, config) for c in contenders]


def row_of(
    contender: Contender,
    times: list[float],
    shape: tuple[int, int],
    where: str,
    config: BenchConfig,
) -> Row:
    """The row of one contender out of the times of its turns."""
    return Row(
        contender.name,
        contender.nbytes * 8 / (shape[0] * shape[1]),
        shape,
        where,
        config.num_threads,
        statistics.median(times) / contender.products,
        min(times) / contender.products,
    )


def bench_vptq(
    python: Path, config: BenchConfig, shapes: tuple[tuple[int, int], ...] = VPTQ_SHAPES
) -> Iterator[Row]:
    """Our product beside the `vptq` wheel's on the same vectors of 8 out of 65,536."""
    for out, columns in shapes:
        x = np.random.default_rng(1).standard_normal(columns).astype(np.float32)
        weights = vq(8, VPTQ_CODES)(out, columns, 0)
        with ThreadPool(config.num_threads) as pool, VptqWheel(python, weights, x, config) as peer:
            contenders = [
                native_contender("vq K65536 v8", weights, x, "hot", pool),
                Contender(peer.version, peer.run, weights.indices[0].nbytes),
            ]
            times = measure(contenders, config)
        for contender in contenders:
            yield row_of(contender, times[contender.name], (out, columns), "hot", config)


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


class VptqWheel(Closing):
    """A linear of the `vptq` wheel that runs in its own Python; use as a context manager.

    Attributes:
        version: of the wheel and of its torch.
    """

    def __init__(
        self,
        python: Path,
        weights: VqWeights,
        x: npt.NDArray[np.float32],
        config: BenchConfig,
    ) -> None:
        """Raises RuntimeError: the program ends at once, or it computes something else."""
        self._folder = tempfile.TemporaryDirectory(prefix="vptq-")
        folder = Path(self._folder.name)
        np.save(folder / "indices.npy", weights.indices[0])
        np.save(folder / "centroids.npy", weights.codebooks[0])
        np.save(folder / "x.npy", x)
        command = [str(part) for part in (python, "-I", VPTQ_SCRIPT, folder, config.num_threads)]
        self._log = (folder / "log").open("w+")
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
        )
        try:
            self.version = self._answer()
            check_agreement(weights, x, np.load(folder / "y.npy"))
        except BaseException:
            self.close()
            raise

    def run(self, _: int) -> None:
        """One product."""
        assert self._process.stdin is not None
        self._process.stdin.write("1\n")
        self._process.stdin.flush()
        self._answer()

    def close(self) -> None:
        """End the program and remove its files."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._log.close()
        self._folder.cleanup()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line: str = self._process.stdout.readline().strip()
        if not line:
            self._process.wait()
            self._log.seek(0)
            raise RuntimeError(f"the vptq wheel ended: {self._log.read()[-1000:]}")
        return line


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
    weights: Weights, x: npt.NDArray[np.float32], y: npt.NDArray[np.float32]
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
                calls[contender.name] = max(1, int(config.seconds * 1e6 / took))
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
    parser.add_argument(
        "--vptq-python",
        type=Path,
        help="interpreter of an environment with the vptq wheel: compare with that instead",
    )
    arguments = parser.parse_args(argv)
    status = native_status()
    print(status)
    if not status.available:
        return 1
    config = BenchConfig(arguments.threads, arguments.rounds, arguments.seconds)
    python = arguments.vptq_python
    for row in run(config) if python is None else bench_vptq(python, config):
        print(row, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
