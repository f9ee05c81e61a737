"""Quantized linears as the native library takes them: the same weights, or a refusal by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from vqkernels import native_status
from vqkernels.matrix import Matrix, matmul
from vqllm.errors import UnsupportedModel
from vqllm.quantization.base import GroupedLinear, GroupedSpec, QuantizedLinear, contiguous_groups
from vqllm.quantization.tcq import TcqLinear
from vqllm.quantization.trellis import codebook_of
from vqllm.quantization.vptq_linear import VptqLinear, VptqSpec
from vqllm.runtime.native_weights import pack_quantized

OUT, IN = 48, 160

pytestmark = pytest.mark.skipif(
    not native_status().available, reason=f"no native library: {native_status().reason}"
)


def assert_packs_exactly(linear: QuantizedLinear) -> None:
    weights, transform = pack_quantized(linear, "x")
    x = np.random.default_rng(0).standard_normal((3, linear.in_features)).astype(np.float32)
    expected = x @ linear.dequantize().T
    found = matmul(Matrix(weights, transform), x, exact=True)
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def halves(shape: tuple[int, ...], seed: int, low: float = 0.5) -> Any:
    return np.random.default_rng(seed).uniform(low, 1.5, shape).astype(np.float16)


def grouped(bits: int, group_size: int, symmetric: bool = True) -> GroupedLinear:
    random, spec = np.random.default_rng(bits), GroupedSpec(bits, group_size)
    groups = contiguous_groups(IN, spec)
    shape = (int(groups[-1]) + 1, OUT)
    zeros = np.full(shape, spec.symmetric_zero, dtype=np.uint8)
    if not symmetric:
        zeros = random.integers(0, spec.max_code + 1, shape, dtype=np.uint8)
    codes = random.integers(0, spec.max_code + 1, (IN, OUT), dtype=np.uint8)
    return GroupedLinear(codes, halves(shape, 1), zeros, groups, spec)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_grids(bits: int, group_size: int, symmetric: bool) -> None:
    assert_packs_exactly(grouped(bits, group_size, symmetric))


def test_columns_in_the_order_of_their_groups() -> None:
    linear = grouped(4, 32)
    order = np.random.default_rng(0).permutation(IN)
    assert_packs_exactly(replace(linear, group_index=linear.group_index[order]))
    uneven = linear.group_index.copy()
    uneven[0] = 1
    with pytest.raises(UnsupportedModel, match="x: groups of unequal size"):
        pack_quantized(replace(linear, group_index=uneven), "x")


@pytest.mark.parametrize("group_size", [0, 32, 128])
@pytest.mark.parametrize("has_columns", [False, True])
@pytest.mark.parametrize("bits", [2, 3])
def test_trellises(bits: int, has_columns: bool, group_size: int) -> None:
    codebook = codebook_of(bits, 12)
    groups = -(-IN // group_size) if group_size else 1
    linear = TcqLinear(
        codes=np.random.default_rng(0).integers(
            0, 256, (IN, codebook.stream_bytes(OUT)), dtype=np.uint8
        ),
        scales=halves((groups, OUT), 1),
        column_scales=halves((IN,), 2) if has_columns else None,
        group_size=group_size,
        codebook=codebook,
    )
    assert_packs_exactly(linear)


def vectors(spec: VptqSpec) -> VptqLinear:
    random, v = np.random.default_rng(1), spec.vector_length
    size = spec.group_size(IN)
    shape = (spec.num_groups, -(-OUT // v), size)

    def indices(count: int) -> Any:
        return random.integers(0, count, shape).astype(np.uint16)

    def codebook(count: int) -> Any:
        return random.standard_normal((spec.num_groups, count, v)).astype(np.float16)

    has_residual = spec.num_res_centroids > 0
    outlier_indices = outlier_centroids = None
    if spec.num_outliers:
        v0, k0 = spec.outlier_vector_length, spec.num_outlier_centroids
        outlier_shape = (-(-OUT // v0), spec.num_outliers)
        outlier_indices = random.integers(0, k0, outlier_shape).astype(np.uint16)
        outlier_centroids = random.standard_normal((k0, v0)).astype(np.float16)
    return VptqLinear(
        num_rows=OUT,
        spec=spec,
        indices=indices(spec.num_centroids),
        centroids=codebook(spec.num_centroids),
        res_indices=indices(spec.num_res_centroids) if has_residual else None,
        res_centroids=codebook(spec.num_res_centroids) if has_residual else None,
        outlier_indices=outlier_indices,
        outlier_centroids=outlier_centroids,
        order=random.permutation(IN).astype(np.uint16) if spec.has_order else None,
        column_scales=halves((IN,), 3) if spec.has_norm else None,
        column_biases=halves((IN,), 4, -0.5) if spec.has_norm else None,
    )


@pytest.mark.parametrize(
    "spec",
    [
        VptqSpec(vector_length=4, num_centroids=256, has_norm=False),
        VptqSpec(vector_length=6, num_centroids=64),
        VptqSpec(vector_length=8, num_centroids=256, num_res_centroids=256, has_order=True),
        VptqSpec(vector_length=8, num_centroids=4096, has_norm=False, has_order=True),
        VptqSpec(vector_length=16, num_centroids=1024, num_res_centroids=16),
        VptqSpec(vector_length=3, num_centroids=256),
        VptqSpec(vector_length=12, num_centroids=4096, num_res_centroids=4096, has_order=True),
        VptqSpec(num_groups=2, has_order=True),
        VptqSpec(vector_length=6, num_groups=5, num_res_centroids=16, has_order=True),
        VptqSpec(vector_length=8, num_outliers=32, num_outlier_centroids=64, has_order=True),
        VptqSpec(
            vector_length=8,
            num_centroids=4096,
            num_groups=3,
            num_outliers=10,
            outlier_vector_length=4,
            num_outlier_centroids=1024,
            has_order=True,
        ),
    ],
)
def test_vectors(spec: VptqSpec) -> None:
    assert_packs_exactly(vectors(spec))


def test_vectors_without_a_kernel_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedModel, match="x: no native kernel for vectors of 17"):
        pack_quantized(vectors(VptqSpec(vector_length=17)), "x")
