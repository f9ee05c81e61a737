"""Which arrays the CUDA executor hands to its kernels, and what it says without a GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from support import emulated_gpu
from vqkernels.errors import LayoutError
from vqllm.checkpoint import Checkpoint
from vqllm.errors import ExecutorUnavailable
from vqllm.quantization.base import GroupedLinear, GroupedSpec, contiguous_groups
from vqllm.quantization.vptq_linear import VptqLinear, VptqSpec
from vqllm.runtime.engine import EngineConfig
from vqllm.runtime.executors import cuda
from vqllm.runtime.executors.base import Logits
from vqllm.runtime.executors.cuda import _gptq_arrays
from vqllm.runtime.executors.torch import TorchExecutor
from vqllm.runtime.loading import make_executor

RunVqllm = Callable[..., tuple[int, str, str]]


def grouped(bits: int = 4, is_symmetric: bool = True) -> GroupedLinear:
    spec = GroupedSpec(bits, 64)
    random = np.random.default_rng(bits)
    zeros = np.full((2, 32), spec.symmetric_zero, np.uint8)
    if not is_symmetric:
        zeros[0, 0] = 1
    return GroupedLinear(
        codes=random.integers(0, spec.max_code + 1, (128, 32), dtype=np.uint8),
        scales=random.normal(size=(2, 32)).astype(np.float16),
        zeros=zeros,
        group_index=contiguous_groups(128, spec),
        spec=spec,
    )


def test_symmetric_layers_have_no_zero_points() -> None:
    assert _gptq_arrays(grouped()).zeros is None
    linear = grouped(is_symmetric=False)
    assert _gptq_arrays(linear).zeros is linear.zeros


def test_columns_in_another_order_are_refused() -> None:
    linear = grouped()
    shuffled = GroupedLinear(
        linear.codes, linear.scales, linear.zeros, linear.group_index[::-1].copy(), linear.spec
    )
    with pytest.raises(LayoutError, match="static groups"):
        _gptq_arrays(shuffled)


def test_without_a_gpu_the_executor_says_so(tiny_folder: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ExecutorUnavailable, match="needs an NVIDIA GPU"):
        make_executor(Checkpoint(tiny_folder), "cuda", EngineConfig())


@pytest.mark.parametrize("rows", [0, 2])
def test_an_expert_may_have_no_tokens(emulated_driver: ctypes.CDLL, rows: int) -> None:
    linear = grouped()
    matrices = {"mlp.experts.0.up_proj": cuda.upload(emulated_gpu.open_gpu(), linear)}
    block = cuda.CudaBlock(torch.ones(1), torch.ones(1), {}, matrices=matrices)
    x = torch.randn(rows, 128)
    outputs = block.project("mlp.experts.0.up_proj", x)
    assert outputs.shape == (rows, 32)
    expected = x @ torch.from_numpy(linear.dequantize()).T
    assert (outputs - expected).norm() <= 3e-3 * expected.norm()


@pytest.mark.parametrize("num_centroids", [256, 1024])
def test_a_smaller_residual_codebook_has_a_kernel(
    emulated_driver: ctypes.CDLL, num_centroids: int
) -> None:
    random = np.random.default_rng(num_centroids)
    spec = VptqSpec(8, num_centroids, 64, has_order=True)
    linear = VptqLinear(
        num_rows=40,
        spec=spec,
        indices=random.integers(0, num_centroids, (1, 5, 70)).astype(np.uint16),
        centroids=random.normal(size=(1, num_centroids, 8)).astype(np.float16),
        res_indices=random.integers(0, 64, (1, 5, 70)).astype(np.uint16),
        res_centroids=(0.3 * random.normal(size=(1, 64, 8))).astype(np.float16),
        order=random.permutation(70).astype(np.uint16),
        column_scales=random.uniform(0.5, 1.5, 70).astype(np.float16),
        column_biases=(0.1 * random.normal(size=70)).astype(np.float16),
    )
    weights = cuda.upload(emulated_gpu.open_gpu(), linear)
    for rows in (1, 20):
        x = torch.randn(rows, 70).half()
        expected = x.double() @ torch.from_numpy(linear.dequantize()).double().T
        assert (weights.linear(x).double() - expected).norm() < 3e-3 * expected.norm()
    assert len(emulated_gpu.launches(emulated_driver)) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "kernel"),
    [
        (("--method", "gptq", "--bits", "4", "--group-size", "32"), "gptq4"),
        (("--method", "tcq", "--bpw", "3"), "trellis"),
        (("--method", "vptq", "--bpw", "2.5"), "vq_"),
    ],
)
def test_it_predicts_what_the_reference_predicts(
    method: tuple[str, ...],
    kernel: str,
    tiny_folder: Path,
    tmp_path: Path,
    run_vqllm: RunVqllm,
    emulated_driver: ctypes.CDLL,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target = tmp_path / "out"
    words = ("--windows", "4", "--window-length", "64")
    code, _, errors = run_vqllm("quantize", tiny_folder, "-o", target, *method, *words)
    assert code == 0, errors
    checkpoint = Checkpoint(target)
    monkeypatch.setattr(cuda, "_open_gpu", emulated_gpu.open_gpu)
    executors = cuda.CudaExecutor(checkpoint, 64), TorchExecutor(checkpoint, 64)

    def run(step: Callable[[TorchExecutor], Logits]) -> list[str]:
        """Take a step on both, compare, and say which kernels ran."""
        emulated_gpu.launches(emulated_driver)
        found, expected = (step(executor) for executor in executors)
        assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()
        names = emulated_gpu.launches(emulated_driver)
        assert all(kernel in name for name in names)
        return [name.split("_")[-1] for name in names]

    for executor in executors:
        assert [executor.allocate() for _ in range(4)] == [0, 1, 2, 3]
    kernels = [
        run(partial(TorchExecutor.prefill, cache=cache, token_ids=range(40, 40 + size)))
        for cache, size in enumerate((20, 1, 33, 9))
    ]
    assert {"gemm32", "b1"} <= {name for names in kernels for name in names}
    # A batch is one launch per linear, not one per sequence.
    num_linears = len(checkpoint.config.linear_names())
    together = run(partial(TorchExecutor.decode, caches=[2, 0, 3, 1], token_ids=[7, 8, 9, 10]))
    assert len(together) == num_linears
    assert set(together) <= {"b4", "gemm16"}
    alone = run(partial(TorchExecutor.decode, caches=[3], token_ids=[5]))
    assert set(alone) == {"b1"}
    assert "emulated" in executors[0].providers[0]
