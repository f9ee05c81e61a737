"""``python -m vqkernels.bench``: times the native products beside their peers.

First the 4-bit GEMV of every tier, then packed matrices of every format (bench_matrix).

All contenders get the same weights and are timed in turns within one run, so that load on the
machine hits them alike; median and minimum over the rounds are printed. Times are what a Python
caller sees: ours include the ctypes call, ONNX Runtime's its session run. Cold means a ring of
weight copies larger than the caches. Not part of the library: the only module here that prints.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vqkernels.gemv import pack_gptq, q4_gemv
from vqkernels.isa import Isa, forced_isa, get_isa, supported_isas
from vqkernels.layout import GptqTensors
from vqkernels.pool import ThreadPool
from vqkernels.reference import dequantize, q4_gemv_float, unpack_codes
from vqkernels.status import native_status

GROUP_SIZE = 128
SHAPES: tuple[tuple[int, int], ...] = ((576, 1536), (1536, 576), (49152, 576))
COLD_BYTES = 160 << 20
MIN_ROUNDS = 5
ORT_TOLERANCE = 0.03

Call = Callable[[int], Any]


@dataclass(frozen=True)
class Contender:
    """Something to time: ``call(i)`` runs ``products`` GEMVs on weight copy i, ``nbytes`` each."""

    name: str
    call: Call
    nbytes: int
    isa: Isa | None = None
    products: int = 1


@dataclass(frozen=True)
class BenchConfig:
    """How to measure: ``rounds`` turns of about ``seconds`` per contender."""

    num_threads: int = 1
    rounds: int = 7
    seconds: float = 0.05
    cold: bool = False

    def __post_init__(self) -> None:
        if self.rounds < MIN_ROUNDS:
            raise ValueError(f"rounds is {self.rounds}, must be at least {MIN_ROUNDS}")
        if self.num_threads < 1:
            raise ValueError(f"num_threads is {self.num_threads}, must be at least 1")


def random_layer(out_features: int, in_features: int, seed: int = 0) -> GptqTensors:
    """A symmetric 4-bit layer with uniform codes."""
    random = np.random.default_rng(seed)
    words = random.integers(-(2**31), 2**31, (in_features // 8, out_features), dtype=np.int64)
    num_groups = -(-in_features // GROUP_SIZE)
    scales = random.uniform(0.005, 0.015, (num_groups, out_features)).astype(np.float32)
    return GptqTensors(words.astype(np.int32), scales, group_size=GROUP_SIZE)


def num_copies(nbytes: int, cold: bool) -> int:
    """Copies of a weight that overflow the caches, or one that stays in them."""
    return max(2, -(-COLD_BYTES // nbytes)) if cold else 1


def native_contenders(
    layer: GptqTensors, x: npt.NDArray[np.float32], config: BenchConfig, pool: ThreadPool
) -> list[Contender]:
    """One contender per supported tier, over the same packed copies."""
    first = pack_gptq(layer)
    copies = num_copies(first.nbytes, config.cold)
    matrices = [first, *(pack_gptq(layer) for _ in range(copies - 1))]
    y = np.empty(layer.out_features, dtype=np.float32)

    def call(i: int) -> Any:
        return q4_gemv(matrices[i % copies], x, out=y, pool=pool)

    return [
        Contender(f"vq {isa.name.lower()}", call, first.nbytes, isa) for isa in supported_isas()
    ]


def numpy_contender(
    layer: GptqTensors, x: npt.NDArray[np.float32], config: BenchConfig
) -> Contender:
    """The plain reference: the dequantized weight as a dense float32 product."""
    weight = dequantize(layer)
    copies = num_copies(weight.nbytes, config.cold)
    weights = [weight, *(weight.copy() for _ in range(copies - 1))]
    return Contender("numpy dense fp32", lambda i: x @ weights[i % copies], weight.nbytes)


def ort_contender(
    layer: GptqTensors, x: npt.NDArray[np.float32], config: BenchConfig
) -> Contender | None:
    """ONNX Runtime's MatMulNBits with int8 activations, or None where it is not installed."""
    try:
        import onnxruntime
    except ModuleNotFoundError:
        return None
    nbytes = layer.in_features * layer.out_features // 2 + layer.scales.nbytes
    copies = num_copies(nbytes, config.cold)
    model = matmul_nbits_model(layer)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = config.num_threads
    options.inter_op_num_threads = 1
    bindings = []
    for _ in range(copies):
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        binding = session.io_binding()
        binding.bind_cpu_input("x", x[None, :])
        binding.bind_output("y", "cpu")
        bindings.append((session, binding))
    session, binding = bindings[0]
    session.run_with_iobinding(binding)
    check_agreement(layer, x, binding.copy_outputs_to_cpu()[0][0])

    def call(i: int) -> Any:
        session, binding = bindings[i % copies]
        return session.run_with_iobinding(binding)

    return Contender("ort MatMulNBits acc4", call, nbytes)


def matmul_nbits_model(layer: GptqTensors) -> bytes:
    """A one-node ONNX model of the layer: B [out, groups, 64] low nibble first, zero point 8."""
    from onnx import TensorProto, helper, numpy_helper

    codes = np.full((layer.num_groups * GROUP_SIZE, layer.out_features), 8, dtype=np.uint8)
    codes[: layer.in_features] = unpack_codes(layer.qweight)
    blocks = codes.T.reshape(layer.out_features, layer.num_groups, GROUP_SIZE)
    packed = blocks[..., 0::2] | (blocks[..., 1::2] << 4)
    scales = np.ascontiguousarray(layer.scales.T, dtype=np.float32)
    node = helper.make_node(
        "MatMulNBits",
        ["x", "B", "scales"],
        ["y"],
        domain="com.microsoft",
        K=layer.in_features,
        N=layer.out_features,
        bits=4,
        block_size=GROUP_SIZE,
        accuracy_level=4,
    )
    graph = helper.make_graph(
        [node],
        "gemv",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, layer.in_features])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, layer.out_features])],
        [numpy_helper.from_array(packed, "B"), numpy_helper.from_array(scales.ravel(), "scales")],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return bytes(model.SerializeToString())


def check_agreement(
    layer: GptqTensors, x: npt.NDArray[np.float32], y: npt.NDArray[np.float32]
) -> None:
    """A peer that computes something else must not be compared with."""
    exact = q4_gemv_float(layer, x)
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
    automatic = get_isa()
    for turn in range(config.rounds + 1):
        for contender in contenders:
            with forced_isa(automatic if contender.isa is None else contender.isa):
                count = calls.get(contender.name, 3)
                took = time_turn_us(contender, turn * count, count)
            if turn == 0:
                calls[contender.name] = max(3, int(config.seconds * 1e6 / took))
            else:
                times[contender.name].append(took)
    return times


def bench_shape(out_features: int, in_features: int, config: BenchConfig) -> None:
    """Measure one shape and print a line per contender."""
    layer = random_layer(out_features, in_features)
    x = np.random.default_rng(1).standard_normal(in_features).astype(np.float32)
    with ThreadPool(config.num_threads) as pool:
        contenders = native_contenders(layer, x, config, pool)
        contenders.append(numpy_contender(layer, x, config))
        peer = ort_contender(layer, x, config)
        times = measure(contenders if peer is None else [*contenders, peer], config)
    nbytes = {c.name: c.nbytes for c in contenders} | ({peer.name: peer.nbytes} if peer else {})
    for name, turns in times.items():
        median = statistics.median(turns)
        print(
            f"{out_features:>6}x{in_features:<5} {'cold' if config.cold else 'hot':<4} "
            f"T{config.num_threads} {name:<22} median {median:9.1f} us  min {min(turns):9.1f} us  "
            f"{nbytes[name] / median / 1e3:6.1f} GB/s",
            flush=True,
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the arguments, print the table; exit 1 without a native library."""
    parser = argparse.ArgumentParser(prog="python -m vqkernels.bench", description=__doc__)
    defaults = BenchConfig()
    parser.add_argument("--threads", type=int, default=defaults.num_threads)
    parser.add_argument("--rounds", type=int, default=defaults.rounds)
    parser.add_argument("--seconds", type=float, default=defaults.seconds)
    parser.add_argument("--cold", action="store_true", help="4-bit tiers on weights from memory")
    parser.add_argument("--only", choices=("tiers", "formats"), help="one of the two tables")
    arguments = parser.parse_args(argv)
    status = native_status()
    print(status)
    if not status.available:
        return 1
    config = BenchConfig(arguments.threads, arguments.rounds, arguments.seconds, arguments.cold)
    if arguments.only != "formats":
        for out_features, in_features in SHAPES:
            bench_shape(out_features, in_features, config)
    if arguments.only != "tiers":
        print_formats(config)
    return 0


def print_formats(config: BenchConfig) -> None:
    """The table of packed matrices, a line as soon as its shape is done."""
    from vqkernels import bench_matrix

    for row in bench_matrix.run(config):
        print(row, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
