"""The CUDA kernels without a GPU: they compile without spills, and they compute the right thing.

Every kernel is compiled for the CPU by a shim that emulates CUDA, and runs behind an emulated
driver, so that packing, grids and shared memory of the launches are those of a real GPU. On a GPU
the same checks go through the real driver.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from support import emulated_gpu
from vqkernels.cuda import (
    CodebookArrays,
    CodebookWeights,
    CudaModule,
    CudaUnavailableError,
    GptqArrays,
    GptqWeights,
    Gpu,
    TrellisArrays,
    TrellisWeights,
    bench,
    driver,
    kernel_sources,
    open_gpu,
)
from vqkernels.cuda.check import check_sample
from vqkernels.cuda.codebook import pack_indices
from vqkernels.cuda.image import compile_nvcc, compile_nvrtc, find_nvcc, find_nvrtc
from vqkernels.cuda.samples import codebook_sample, gptq_sample, odd_samples, trellis_sample
from vqkernels.cuda.trellis import pack_streams
from vqkernels.cuda.weights import MAX_GEMM_ROWS, Choice
from vqkernels.errors import LayoutError, NativeUnavailableError, ShapeError

MAX_REGISTERS = 168  # one block of 256 threads per multiprocessor at the very least
MAX_TILED_REGISTERS = {"gptq": 128, "codebook": 128, "large": 128, "trellis": 168}

SMALL = odd_samples(160, 132)
LARGE = odd_samples()


@pytest.mark.slow
def test_every_kernel_compiles_for_both_architectures_without_spills() -> None:
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    image, log = compile_nvcc(nvcc, kernel_sources())
    assert len(image) > 10_000
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", log)
    used = [int(count) for count in re.findall(r"Used (\d+) registers", log)]
    kernels = re.findall(r"Compiling entry function 'vq_([a-z]+)(\w+)' for 'sm_(\w+)'", log)
    assert {architecture for *_, architecture in kernels} == {"80", "90a"}
    assert len(spills) == len(used) == len(kernels) == 2 * 89
    assert all(pair == ("0", "0") for pair in spills)
    assert max(used) <= MAX_REGISTERS
    # Dynamic shared memory begins where static ends: there is none, so that it is aligned.
    assert " smem" not in log
    for (family, rest, _), registers in zip(kernels, used, strict=True):
        if "gemm" in rest or "dequantize" in rest:
            assert registers <= MAX_TILED_REGISTERS[family], f"vq_{family}{rest}"


@pytest.mark.slow
def test_nvrtc_compiles_the_same_sources() -> None:
    """NVRTC takes no host functions and no C++ library, which nvcc would let pass."""
    try:
        find_nvrtc()
    except NativeUnavailableError:
        pytest.skip("NVRTC is not installed")
    assert compile_nvrtc(kernel_sources(), (9, 0)).startswith(b"\x7fELF")


@pytest.mark.slow
def test_every_kernel_agrees_with_its_reference_on_the_cpu(emulated_library: Path) -> None:
    code = "import ctypes, sys; sys.exit(ctypes.CDLL(sys.argv[1]).main())"
    command = [sys.executable, "-c", code, str(emulated_library)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout == "all kernels agree\n"


def test_entries_are_ordered_by_frequency_when_they_do_not_fit_a_byte() -> None:
    random = np.random.default_rng(0)
    indices = np.minimum(random.geometric(0.01, (1, 5, 30)), 999) - 1
    indices[0, 0, :] = 700
    entries = random.normal(size=(1, 1000, 8)).astype(np.float16)
    packed, ordered = pack_indices(indices, entries, 32)
    back = packed.view(np.uint16).astype(np.int64)
    assert np.array_equal(ordered[0, back[..., :30]], entries[0, indices])
    counts = np.bincount(back[..., :30].ravel(), minlength=1000)
    assert np.all(np.diff(counts) <= 0)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("out_features", [1, 33, 70, 129])
def test_streams_keep_their_bits_in_rows_of_16_bytes(bits: int, out_features: int) -> None:
    num_bytes = -(-out_features * bits // 8)
    codes = np.random.default_rng(bits).integers(0, 256, (3, num_bytes), dtype=np.uint8)
    words = pack_streams(codes, out_features, bits)
    assert words.shape[1] % 4 == 0
    assert words.shape[1] * 32 >= out_features * bits
    assert np.array_equal(words.view(np.uint8).reshape(3, -1)[:, :num_bytes], codes)


def test_without_a_driver_the_reason_is_named() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(CudaUnavailableError, match=r"CUDA driver|cuInit"):
        CudaModule(b"")


# ---- behind the emulated driver ----


@pytest.fixture
def emulated(emulated_driver: ctypes.CDLL) -> Gpu:
    return emulated_gpu.open_gpu()


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_every_format_multiplies_any_number_of_rows(emulated: Gpu, name: str) -> None:
    for check in check_sample(emulated, name, SMALL[name], (1, 3, 8, 9, 17, 70, MAX_GEMM_ROWS + 1)):
        assert check.is_right, check


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["gptq 3 bit, zeros", "vq v8 k256+256", "vq v8 k4096+4096", "trellis 2 bit, groups"]
)
def test_several_slices_of_the_inputs_add_up(
    emulated: Gpu, emulated_driver: ctypes.CDLL, name: str
) -> None:
    sample = odd_samples(576, 140)[name]
    for check in check_sample(emulated, name, sample, (1, 9)):
        assert check.is_right, check
    assert any("gemm16" in name for name in emulated_gpu.launches(emulated_driver))


@pytest.mark.slow
def test_the_number_of_rows_decides_the_kernel(emulated: Gpu, emulated_driver: ctypes.CDLL) -> None:
    weights = gptq_sample((132, 64), 4, 32).weights(emulated)
    expected = {
        1: "vq_gptq4_b1",
        3: "vq_gptq4_b4",
        5: "vq_gptq4_gemm16",
        32: "vq_gptq4_gemm32",
        33: "vq_gptq4_gemm64",
        MAX_GEMM_ROWS: "vq_gptq4_gemm64",
        MAX_GEMM_ROWS + 1: "vq_gptq4_dequantize",
    }
    for rows, kernel in expected.items():
        y = weights.linear(torch.zeros(rows, 64).half())
        assert y.shape == (rows, 132)
        assert emulated_gpu.launches(emulated_driver) == [kernel]
    assert weights.linear(torch.zeros(0, 64).half()).shape == (0, 132)


def test_a_tile_that_does_not_fit_is_not_chosen(emulated: Gpu) -> None:
    weights = codebook_sample((16, 64), 8, 2, 256).weights(emulated)
    assert weights.choose(64) == Choice("gemm", 64)
    emulated.module.shared_bytes = weights.tiles.gemm_bytes(32)
    assert weights.choose(64) == Choice("gemm", 32)
    emulated.module.shared_bytes = 99 * 1024  # a consumer GPU
    assert weights.choose(64) == Choice("torch")
    assert weights.tiles.dequantize_bytes <= emulated.module.shared_bytes


def test_rows_that_begin_anywhere_are_multiplied(emulated: Gpu) -> None:
    sample = trellis_sample((40, 33), 2)
    weights, dense = sample.weights(emulated), sample.dense()
    storage = torch.randn(9 * 33 + 1).half()
    for x in (storage[1:].view(9, 33), torch.randn(33, 9).half().T):
        expected = x.double() @ torch.from_numpy(dense).T
        assert (weights.linear(x).double() - expected).norm() < 3e-3 * expected.norm()


def test_arrays_may_be_views_and_read_only(emulated: Gpu) -> None:
    sample = gptq_sample((8, 64), 4, 32)
    random = np.random.default_rng(0)
    words = random.integers(0, 2**31, (16, 8)).astype(np.int32)[::-1, ::2]
    scales = np.ones((4, 2), np.float16).T
    words.setflags(write=False)
    weights = GptqWeights(emulated, GptqArrays(words, scales, None, 4, 64))
    plain = GptqArrays(words.copy(), np.ones((2, 4), np.float16), None, 4, 64)
    x = torch.randn(3, 128).half()
    assert torch.equal(weights.linear(x), GptqWeights(emulated, plain).linear(x))
    assert sample.weights(emulated).dequantize().shape == (8, 64)


def test_another_thread_gets_the_context(emulated: Gpu) -> None:
    weights = gptq_sample((8, 32), 4, 32).weights(emulated)
    results: list[torch.Tensor] = []
    x = torch.ones(1, 32).half()
    thread = threading.Thread(target=lambda: results.append(weights.linear(x)))
    thread.start()
    thread.join()
    assert torch.equal(results[0], weights.linear(x))


def test_what_the_driver_refuses_is_named(emulated: Gpu) -> None:
    with pytest.raises(CudaUnavailableError, match="cuModuleLoadData failed with status 200"):
        CudaModule(b"not an image")
    with pytest.raises(CudaUnavailableError, match="cuDeviceGet failed with status 1"):
        CudaModule(emulated_gpu.IMAGE, 7)
    with pytest.raises(CudaUnavailableError, match="cuModuleGetFunction failed with status 500"):
        emulated.launch("vq_nothing", (1, 1), 0, [])
    with pytest.raises(CudaUnavailableError, match="cuFuncSetAttribute failed"):
        emulated.launch("vq_gptq4_gemm16", (1, 1), 1 << 20, [])
    assert emulated.module.name == "emulated"


def test_what_has_no_kernel_is_refused(emulated: Gpu) -> None:
    scales = np.ones((1, 8), np.float16)
    with pytest.raises(LayoutError, match="2, 3, 4 and 8 bits, not 5"):
        GptqWeights(emulated, GptqArrays(np.zeros((5, 8), np.int32), scales, None, 5, 32))
    with pytest.raises(LayoutError, match="multiples of 32"):
        GptqWeights(emulated, GptqArrays(np.zeros((5, 8), np.int32), scales, None, 4, 40))
    entries = np.zeros((1, 16, 6), np.float16)
    with pytest.raises(LayoutError, match="vectors of 6 with 1 stages"):
        CodebookWeights(emulated, CodebookArrays(np.zeros((1, 2, 32), np.int64), entries))
    codes, table = np.zeros((32, 5), np.uint8), np.zeros(256, np.int8)
    with pytest.raises(LayoutError, match="1 to 4 bits, not 5"):
        TrellisWeights(emulated, TrellisArrays(codes, table, scales, 5, 1917, 12))
    fine = GptqWeights(emulated, GptqArrays(np.zeros((4, 8), np.int32), scales, None, 4, 32))
    with pytest.raises(ShapeError, match="expected float16"):
        fine.linear(torch.zeros(1, 32))


def test_the_benchmark_reports_what_is_wrong(
    emulated: Gpu, capsys: pytest.CaptureFixture[str]
) -> None:
    checks = list(check_sample(emulated, "a grid", gptq_sample((8, 64), 4, 32), (1, 9)))
    assert bench.report_checks(checks)
    broken = replace(checks[0], relative_error=float("nan"))
    assert not bench.report_checks([broken, *checks[1:]])
    assert "| a grid | 8 x 64 | nan WRONG | gemv1 | 1 |" in capsys.readouterr().out


def test_the_benchmark_repeats_layers_elsewhere_in_memory(emulated: Gpu) -> None:
    weights = codebook_sample((16, 64), 8, 2, 256).weights(emulated)
    twin = bench.duplicate(weights)
    assert bench.packed_bytes(twin) == 2 * 2 * 64 + 2 * 256 * 8 * 2
    x = torch.randn(3, 64).half()
    expected = weights.linear(x)
    for value in vars(weights).values():
        if isinstance(value, torch.Tensor):
            value.zero_()
    assert torch.equal(twin.linear(x), expected)


# ---- on a GPU ----


@pytest.fixture(scope="module")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> Gpu:
    driver._driver.cache_clear()
    return open_gpu(tmp_path_factory.mktemp("cuda"), torch.device("cuda", 0))


@pytest.mark.gpu
@pytest.mark.parametrize("name", LARGE)
def test_every_format_on_a_gpu(gpu: Gpu, name: str) -> None:
    for check in check_sample(gpu, name, LARGE[name]):
        assert check.is_right, check


@pytest.mark.gpu
def test_a_graph_repeats_a_product(gpu: Gpu) -> None:
    weights = gptq_sample((1540, 1120), 4).weights(gpu)
    x = torch.randn(40, 1120, device="cuda").half()
    expected = weights.linear(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = weights.linear(x)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, expected)
