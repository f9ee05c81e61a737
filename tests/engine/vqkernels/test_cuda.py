"""The CUDA kernels without a GPU: they compile without spills, and they compute the right thing.

Every kernel is compiled for the CPU by a shim that runs one thread per CUDA thread, and compared
with double-precision references. On a GPU the same shapes go through the real launches.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from vqkernels.cuda import (
    CodebookArrays,
    CodebookWeights,
    CudaModule,
    CudaUnavailableError,
    CudaWeights,
    GptqArrays,
    GptqWeights,
    TrellisArrays,
    TrellisWeights,
    kernel_image,
    kernel_sources,
)
from vqkernels.cuda.codebook import pack_indices
from vqkernels.cuda.image import compile_nvcc
from vqkernels.cuda.trellis import pack_streams
from vqkernels.errors import LayoutError, ShapeError

ROOT = Path(__file__).parents[3]
MAX_REGISTERS = 168  # one block of 256 threads per multiprocessor at the very least


@pytest.mark.slow
def test_every_kernel_compiles_for_both_architectures_without_spills() -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    image, log = compile_nvcc(nvcc, kernel_sources())
    assert len(image) > 10_000
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", log)]
    kernels = re.findall(r"Compiling entry function '(\w+)' for 'sm_(\w+)'", log)
    assert {architecture for _, architecture in kernels} == {"80", "90a"}
    assert len(spills) == len(registers) == len(kernels) >= 80
    assert all(pair == ("0", "0") for pair in spills)
    assert max(registers) <= MAX_REGISTERS


@pytest.mark.slow
def test_every_kernel_agrees_with_its_reference_on_the_cpu(tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    program = tmp_path / "test_cuda"
    source = ROOT / "csrc" / "tests" / "test_cuda.cpp"
    options = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-pthread"]
    includes = [f"-I{ROOT / 'csrc' / 'cuda'}", "-x", "c++", str(source), "-o", str(program)]
    subprocess.run([compiler, *options, *includes], check=True, timeout=300)
    done = subprocess.run([program], capture_output=True, text=True, timeout=300, check=False)
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
@pytest.mark.parametrize("out_features", [1, 33, 70])
def test_streams_keep_their_bits(bits: int, out_features: int) -> None:
    num_bytes = -(-out_features * bits // 8)
    codes = np.random.default_rng(bits).integers(0, 256, (3, num_bytes), dtype=np.uint8)
    words = pack_streams(codes, out_features, bits)
    assert words.shape[1] % (3 if bits == 3 else 1) == 0
    assert words.shape[1] * 32 >= out_features * bits
    assert np.array_equal(words.view(np.uint8).reshape(3, -1)[:, :num_bytes], codes)


def test_without_a_driver_the_reason_is_named() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(CudaUnavailableError, match=r"CUDA driver|cuInit"):
        CudaModule(b"")


# ---- on a GPU ----


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> CudaModule:
    torch.cuda.init()  # type: ignore[no-untyped-call]
    capability = torch.cuda.get_device_capability()
    return CudaModule(kernel_image(tmp_path_factory.mktemp("cuda"), capability))


def assert_linear(weights: CudaWeights, dense: np.ndarray) -> None:
    """Every batch size against float64, dequantization included."""
    for rows in (1, 2, 3, 4, 9):
        x = torch.randn(rows, weights.in_features, device="cuda").half()
        expected = x.double() @ torch.from_numpy(dense).double().cuda().T
        error = (weights.linear(x).double() - expected).norm() / expected.norm()
        assert error < 3e-3, f"{rows} rows: relative error {error:.2e}"


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("has_zeros", [False, True])
def test_gptq_on_a_gpu(module: CudaModule, bits: int, has_zeros: bool) -> None:
    random = np.random.default_rng(bits)
    in_features, out_features, group_size = 576, 1540, 128
    codes = random.integers(0, 1 << bits, (in_features, out_features), dtype=np.uint8)
    planes = (codes[:, None, :] >> np.arange(bits)[None, :, None]) & 1
    stream = planes.reshape(in_features * bits // 32, 32, out_features).astype(np.uint64)
    words = (stream << np.arange(32, dtype=np.uint64)[None, :, None]).sum(1)
    scales = random.normal(size=(5, out_features)).astype(np.float16) * np.float16(0.1)
    zeros = random.integers(0, 1 << bits, (5, out_features), dtype=np.uint8)
    if not has_zeros:
        zeros[:] = 1 << (bits - 1)
    group = np.arange(in_features) // group_size
    dense = ((codes.astype(np.float64) - zeros[group]) * scales[group]).T
    arrays = GptqArrays(
        words.astype(np.uint32).view(np.int32),
        scales,
        zeros if has_zeros else None,
        bits,
        group_size,
    )
    assert_linear(GptqWeights(module, arrays, torch.device("cuda")), dense)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("v", "stages", "entries"), [(4, 1, 256), (8, 1, 64), (8, 2, 256), (8, 1, 65536), (4, 1, 4096)]
)
def test_codebooks_on_a_gpu(module: CudaModule, v: int, stages: int, entries: int) -> None:
    random = np.random.default_rng(v)
    indices = random.integers(0, entries, (stages, 1536 // v, 570))
    table = (random.normal(size=(stages, entries, v)) * 0.1).astype(np.float16)
    scale = (1 + 0.1 * random.normal(size=570)).astype(np.float16)
    bias = (0.01 * random.normal(size=570)).astype(np.float16)
    order = random.permutation(570)
    dense = np.zeros((1536, 570))
    for stage in range(stages):
        dense += table[stage][indices[stage]].transpose(0, 2, 1).reshape(1536, 570)
    natural = np.empty_like(dense)
    natural[:, order] = dense
    arrays = CodebookArrays(indices, table, scale, bias, order)
    weights = CodebookWeights(module, arrays, torch.device("cuda"))
    assert_linear(weights, natural * scale.astype(np.float64) + bias.astype(np.float64))


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("group_size", [0, 128])
def test_trellis_on_a_gpu(module: CudaModule, bits: int, group_size: int) -> None:
    random = np.random.default_rng(bits)
    in_features, out_features, trellis_bits, multiplier = 576, 1537, 12, 1917
    codes = random.integers(0, 256, (in_features, -(-out_features * bits // 8)), dtype=np.uint8)
    table = random.integers(-127, 128, 256).astype(np.int8)
    group = np.arange(in_features) // (group_size or in_features)
    scales = (random.normal(size=(group[-1] + 1, out_features)) * 0.01).astype(np.float16)
    stream = np.unpackbits(codes, axis=1, bitorder="little")
    stream = np.pad(stream, ((0, 0), (trellis_bits, 0)))
    dense = np.empty((out_features, in_features))
    for row in range(out_features):
        window = stream[:, (row + 1) * bits : (row + 1) * bits + trellis_bits].astype(np.int64)
        state = (window << np.arange(trellis_bits)).sum(1)
        index = (state * multiplier) % (1 << trellis_bits) >> (trellis_bits - 8)
        dense[row] = table[index] * scales[group, row].astype(np.float64)
    arrays = TrellisArrays(codes, table, scales, bits, multiplier, trellis_bits, group_size)
    assert_linear(TrellisWeights(module, arrays, torch.device("cuda")), dense)


@pytest.mark.gpu
def test_what_has_no_kernel_is_refused(module: CudaModule) -> None:
    device = torch.device("cuda")
    scales = np.ones((1, 8), np.float16)
    with pytest.raises(LayoutError, match="2, 3, 4 and 8 bits, not 5"):
        GptqWeights(module, GptqArrays(np.zeros((5, 8), np.int32), scales, None, 5, 32), device)
    fine = GptqWeights(module, GptqArrays(np.zeros((4, 8), np.int32), scales, None, 4, 32), device)
    with pytest.raises(ShapeError, match="expected float16"):
        fine.linear(torch.zeros(1, 32, device="cuda"))
