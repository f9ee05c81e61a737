"""Packed matrices of every format against their numpy reference, on every tier of this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vqkernels import (
    DtypeError,
    Isa,
    LayoutError,
    NonFiniteError,
    ShapeError,
    ThreadPool,
    forced_isa,
    matrix_reference,
    supported_isas,
)
from vqkernels.isa import TIERS
from vqkernels.matrix import Matrix, aligned_empty, matmul, packed_size
from vqkernels.matrix_weights import (
    DenseWeights,
    GridWeights,
    LayeredWeights,
    TcqWeights,
    Transform,
    VqColumns,
    VqWeights,
    Weights,
)
from vqkernels.synthetic import Maker, beside, dense, grid, halves, layered, tcq, vq

pytestmark = pytest.mark.usefixtures("native")

Floats = npt.NDArray[np.float32]
GROUPS = (0, 32, 64, 128, 256)


FORMATS: dict[str, Maker] = {
    "grid2": grid(2),
    "grid3": grid(3),
    "grid4": grid(4),
    "grid8": grid(8),
    "grid2-asymmetric": grid(2, 32, asymmetric=True),
    "grid3-asymmetric": grid(3, 64, asymmetric=True),
    "grid4-asymmetric": grid(4, 0, asymmetric=True),
    "grid8-asymmetric": grid(8, 256, asymmetric=True),
    "dense": dense(),
    "dense-half-64": dense(64, np.float16),
    "layered": layered(),
    "layered-half": layered(np.float16),
    "layered-codes": layered(np.int8),
    "tcq1": tcq(1),
    "tcq2": tcq(2),
    "tcq2-64": tcq(2, num_levels=64),
    "tcq2-L16": tcq(2, 16, 64),
    "tcq3": tcq(3),
    "tcq3-128": tcq(3, num_levels=128),
    "tcq3-L10": tcq(3, 10, 128),
    "tcq4": tcq(4, 12, 32),
    "tcq4-L16": tcq(4, 16),
    "tcq5": tcq(5, 14),
    "vq4-256": vq(4, 256),
    "vq4-100": vq(4, 100),
    "vq4-64": vq(4, 64),
    "vq6-128": vq(6, 128),
    "vq8-256-256": vq(8, 256, 256),
    "vq16-256": vq(16, 256),
    "vq4-4096": vq(4, 4096),
    "vq6-1000-256": vq(6, 1000, 256),
    "vq8-4096-64": vq(8, 4096, 64),
    "vq8-65536": vq(8, 65536),
    "vq16-512-512": vq(16, 512, 512),
    "vq1-4": vq(1, 4),
    "vq2-300": vq(2, 300),
    "vq3-256": vq(3, 256),
    "vq3-4096": vq(3, 4096),
    "vq5-300-64": vq(5, 300, 64),
    "vq7-128": vq(7, 128),
    "vq9-256-100": vq(9, 256, 100),
    "vq12-4096-4096": vq(12, 4096, 4096),
    "vq13-256": vq(13, 256),
    "vq15-300": vq(15, 300),
    "outliers-4-8": beside(vq(4, 1024), vq(8, 65536, 256)),
    "outliers-3-8": beside(vq(3, 256), vq(8, 256)),
    "groups-6": beside(vq(6, 256, 16), vq(6, 300, 16), vq(6, 64, 16)),
    "outliers-2-groups-5": beside(vq(2, 16), vq(5, 512), vq(5, 256)),
}


@pytest.fixture(params=TIERS, ids=lambda isa: isa.name.lower())
def isa(request: pytest.FixtureRequest) -> Iterator[Isa]:
    tier: Isa = request.param
    if tier not in supported_isas():
        pytest.skip(f"this CPU cannot run {tier.name}")
    with forced_isa(tier):
        yield tier


def normal(*shape: int, seed: int = 1) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def bits(y: Floats) -> npt.NDArray[np.uint32]:
    return y.view(np.uint32)


def relative(y: Floats, exact: Floats) -> float:
    return float(np.linalg.norm(y - exact) / np.linalg.norm(exact))


def check_tiers(parts: list[Weights], x: Floats, transform: Transform | None = None) -> None:
    transform = transform or Transform()
    expected = matrix_reference.matmul_int8(parts, x, transform)
    matrix = Matrix(parts, transform)
    for tier in supported_isas():
        with forced_isa(tier):
            y = matmul(matrix, x)
        np.testing.assert_array_equal(bits(y), bits(expected), tier.name)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("out", "columns", "batch"), [(1, 1, 1), (70, 300, 3), (33, 576, 1)])
def test_every_format_gives_the_bits_of_the_integer_reference(
    name: str, out: int, columns: int, batch: int
) -> None:
    check_tiers([FORMATS[name](out, columns, 7)], normal(batch, columns))


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(FORMATS)),
    out=st.integers(1, 70),
    columns=st.integers(1, 400),
    batch=st.integers(1, 17),
    exponent=st.integers(-6, 6),
    seed=st.integers(0, 2**32 - 1),
)
def test_odd_shapes_give_the_bits_of_the_integer_reference(
    name: str, out: int, columns: int, batch: int, exponent: int, seed: int
) -> None:
    x = normal(batch, columns, seed=seed) * np.float32(10.0**exponent)
    check_tiers([FORMATS[name](out, columns, seed)], x)


@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("width", [2, 3, 4, 8])
def test_every_group_size_of_a_grid(width: int, group_size: int) -> None:
    check_tiers([grid(width, group_size, True)(17, 600, 3)], normal(2, 600))


@pytest.mark.parametrize("num_levels", [64, 128, 256])
@pytest.mark.parametrize("trellis_bits", range(10, 17))
@pytest.mark.parametrize("width", range(1, 6))
def test_every_trellis(width: int, trellis_bits: int, num_levels: int) -> None:
    check_tiers([tcq(width, trellis_bits, 128, num_levels)(50, 200, 3)], normal(1, 200))


@pytest.mark.parametrize("name", ["grid2", "grid3", "grid4", "tcq2", "vq8-256-256", "vq8-65536"])
@pytest.mark.parametrize("batch", [129, 260])
def test_large_batches(name: str, batch: int) -> None:
    check_tiers([FORMATS[name](20, 1100, 5)], normal(batch, 1100))


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("name", FORMATS)
def test_extreme_sums_stay_exact(name: str, sign: float) -> None:
    weights = FORMATS[name](16, 512, 1)
    extreme: dict[type, Callable[[Any], object]] = {
        GridWeights: lambda w: w.codes.fill((1 << w.bits) - 1),
        DenseWeights: lambda w: w.weight.fill(1.0),
        LayeredWeights: lambda w: w.weight.fill(-128 if w.weight.dtype == np.int8 else -1.0),
        TcqWeights: lambda w: w.table.fill(-128),
        VqWeights: lambda w: w.codebooks[0].fill(1.0),
        VqColumns: lambda w: [part.codebooks[0].fill(1.0) for part in w.parts],
    }
    extreme[type(weights)](weights)
    check_tiers([weights], np.full((2, 512), sign, dtype=np.float32))


def test_parts_of_different_formats_stack() -> None:
    parts = [
        FORMATS[name](out, 200, 3) for name, out in [("tcq2", 33), ("grid4", 7), ("vq6-128", 50)]
    ]
    check_tiers(parts, normal(5, 200))
    y = matmul(Matrix(parts), normal(5, 200))
    alone = [matmul(Matrix(part), normal(5, 200)) for part in parts]
    np.testing.assert_array_equal(bits(y), bits(np.concatenate(alone, axis=1)))


@pytest.mark.parametrize("name", ["grid3", "tcq2", "vq8-4096-64", "outliers-3-8"])
def test_permutation_scales_and_biases(name: str) -> None:
    random = np.random.default_rng(0)
    row_bias = random.standard_normal(40).astype(np.float32)
    transform = Transform(
        random.permutation(203),
        random.uniform(0.5, 2.0, 203).astype(np.float32),
        random.standard_normal(203).astype(np.float32),
        row_bias,
    )
    weights = FORMATS[name](40, 203, 3)
    check_tiers([weights], normal(3, 203), transform)
    matrix = Matrix(weights, transform)
    rows = matrix.read_rows(np.arange(40))
    x = normal(3, 203)
    exact = matrix_reference.matmul_float([weights], x, transform)
    np.testing.assert_allclose(x @ rows.T + row_bias, exact, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(matmul(matrix, x, exact=True), exact, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", FORMATS)
def test_rows_read_back_as_the_checkpoint_means_them(name: str) -> None:
    weights = FORMATS[name](37, 150, 3)
    rows = np.array([36, 0, 17, 17])
    read = Matrix(weights).read_rows(rows)
    np.testing.assert_array_equal(read, matrix_reference.dequantize(weights)[rows])


@pytest.mark.parametrize("name", FORMATS)
def test_int8_is_within_a_hundredth_and_exact_within_rounding(name: str) -> None:
    weights = FORMATS[name](64, 576, 3)
    x = normal(4, 576)
    matrix = Matrix(weights)
    exact = matrix_reference.matmul_float([weights], x)
    assert relative(matmul(matrix, x), exact) < 2e-2
    assert relative(matmul(matrix, x, exact=True), exact) < 1e-6


@pytest.mark.parametrize("name", ["grid2", "grid3", "grid4", "dense", "tcq2", "tcq3", "vq4-256"])
def test_mean_error_of_int8_is_below_a_hundredth(name: str) -> None:
    errors = []
    for seed in range(5):
        weights = FORMATS[name](64, 1024, seed)
        x = normal(4, 1024, seed=seed)
        exact = matrix_reference.matmul_float([weights], x)
        errors.append(relative(matmul(Matrix(weights), x), exact))
    assert np.mean(errors) < 1e-2


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_threads_change_nothing(isa: Isa, num_threads: int) -> None:
    parts = [FORMATS[name](100, 300, 3) for name in ("tcq3", "grid2", "vq4-256")]
    matrix = Matrix(parts)
    for batch in (1, 9):
        x = normal(batch, 300)
        expected = matmul(matrix, x)
        exact = matmul(matrix, x, exact=True)
        with ThreadPool(num_threads) as pool:
            np.testing.assert_array_equal(bits(matmul(matrix, x, pool)), bits(expected))
            np.testing.assert_array_equal(bits(matmul(matrix, x, pool, exact=True)), bits(exact))


def test_batch_rows_are_independent(isa: Isa) -> None:
    made = [make(40, 300, 3) for make in FORMATS.values()]
    whole = [weights for weights in made if not isinstance(weights, VqColumns | LayeredWeights)]
    matrix = Matrix(whole)
    x = normal(9, 300)
    together = matmul(matrix, x)
    for row, y in zip(x, together, strict=True):
        np.testing.assert_array_equal(bits(matmul(matrix, row)), bits(y))


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("width", [2, 3, 4, 8])
def test_words_and_bytes_pack_alike(width: int, asymmetric: bool) -> None:
    random = np.random.default_rng(0)
    words = random.integers(-(2**31), 2**31, (width * 3, 20)).astype(np.int32)
    zeros = random.integers(0, 1 << width, (1, 20)).astype(np.uint8) if asymmetric else None
    scales = halves(random, 1, 20)
    codes = matrix_reference.unpack_words(words, width)
    x = normal(2, 96)
    a = matmul(Matrix(GridWeights(words, scales, zeros, width, group_size=0)), x)
    b = matmul(Matrix(GridWeights(codes, scales, zeros, width, group_size=0)), x)
    np.testing.assert_array_equal(bits(a), bits(b))


def test_rows_that_are_cut_alike_stack_and_split_over_threads() -> None:
    parts = [FORMATS["outliers-3-8"](out, 300, 3) for out in (100, 7, 250)]
    check_tiers(parts, normal(5, 300))
    matrix = Matrix(parts)
    for batch in (1, 9):
        x = normal(batch, 300)
        expected = matmul(matrix, x)
        exact = matmul(matrix, x, exact=True)
        with ThreadPool(3) as pool:
            np.testing.assert_array_equal(bits(matmul(matrix, x, pool)), bits(expected))
            np.testing.assert_array_equal(bits(matmul(matrix, x, pool, exact=True)), bits(exact))
    with pytest.raises(ShapeError):
        Matrix([*parts, FORMATS["vq4-256"](8, 300, 3)])


def test_symmetric_zero_points_are_dropped() -> None:
    plain = FORMATS["grid4"](20, 256, 3)
    assert isinstance(plain, GridWeights)
    explicit = Matrix(replace(plain, zeros=np.full((2, 20), 8, dtype=np.uint8)))
    assert explicit.nbytes == Matrix(plain).nbytes < Matrix(grid(4, 128, True)(20, 256, 3)).nbytes
    x = normal(256)
    np.testing.assert_array_equal(bits(matmul(explicit, x)), bits(matmul(Matrix(plain), x)))


def test_activations_that_vanish_give_zero() -> None:
    weights = FORMATS["grid4-asymmetric"](16, 200, 3)
    x = np.stack([np.zeros(200), np.full(200, 1e-31), np.ones(200)]).astype(np.float32)
    check_tiers([weights], x)
    assert not matmul(Matrix(weights), x)[:2].any()


def test_strided_activations_are_read_correctly() -> None:
    matrix = Matrix(FORMATS["grid4"](16, 64, 3))
    x = normal(64, 2)
    np.testing.assert_array_equal(matmul(matrix, x[:, 0]), matmul(matrix, x[:, 0].copy()))


def test_given_memory_is_used_and_result_array_too() -> None:
    weights = FORMATS["tcq2"](40, 200, 3)
    memory = aligned_empty(packed_size(weights))
    out = np.empty(40, dtype=np.float32)
    x = normal(200)
    assert matmul(Matrix(weights, memory=memory), x, out=out) is out
    np.testing.assert_array_equal(bits(out), bits(matmul(Matrix(weights), x)))


@pytest.mark.parametrize("name", ["grid3-asymmetric", "tcq3", "vq6-1000-256"])
def test_packed_memory_serves_another_matrix(name: str) -> None:
    weights = FORMATS[name](40, 200, 3)
    first = Matrix(weights)
    memory = aligned_empty(first.nbytes)
    memory[:] = first.memory
    second = Matrix(weights, memory=memory, is_packed=True)
    x = normal(3, 200)
    np.testing.assert_array_equal(bits(matmul(second, x)), bits(matmul(first, x)))
    with pytest.raises(ShapeError, match="needs the memory"):
        Matrix(weights, is_packed=True)


def test_concurrent_calls_share_a_matrix() -> None:
    matrix = Matrix(FORMATS["grid4"](64, 256, 3))
    x = normal(256)
    expected = matmul(matrix, x)
    with ThreadPool(2) as pool, ThreadPoolExecutor(3) as callers:
        for y in callers.map(lambda _: matmul(matrix, x, pool), range(60)):
            np.testing.assert_array_equal(bits(y), bits(expected))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_inputs_that_are_not_finite_are_refused(value: float) -> None:
    x = normal(2, 200)
    x[1, 150] = value
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        matmul(Matrix(FORMATS["grid4"](8, 200, 3)), x)


def test_bad_inputs_are_named() -> None:
    matrix = Matrix(FORMATS["grid4"](8, 200, 3))
    with pytest.raises(DtypeError, match="x has dtype float64"):
        matmul(matrix, np.zeros(200))  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match=r"x has shape \(199,\), must be \(200,\)"):
        matmul(matrix, normal(199))
    with pytest.raises(DtypeError, match="x is a list"):
        matmul(matrix, [0.0] * 200)  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="batch >= 1"):
        matmul(matrix, normal(0, 200))
    with pytest.raises(DtypeError, match="out has dtype float64"):
        matmul(matrix, normal(200), out=np.empty(8))  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="C-contiguous"):
        matmul(matrix, normal(200), out=np.empty(16, dtype=np.float32)[::2])
    with pytest.raises(ShapeError, match=r"out has shape \(9,\), must be \(8,\)"):
        matmul(matrix, normal(200), out=np.empty(9, dtype=np.float32))
    with pytest.raises(ShapeError, match="out of range"):
        matrix.read_rows(np.array([8]))
    with pytest.raises(ShapeError, match="memory has shape"):
        Matrix(FORMATS["grid4"](8, 200, 3), memory=aligned_empty(64))
    with pytest.raises(ShapeError, match="different in_features"):
        Matrix([FORMATS["grid4"](8, 200, 3), FORMATS["grid4"](8, 201, 3)])
    with pytest.raises(ShapeError, match="at least one part"):
        Matrix([])


CODES = np.zeros((64, 8), dtype=np.uint8)
SCALES = np.ones((1, 8), dtype=np.float16)
TABLE = np.zeros(256, dtype=np.int8)
INDICES = np.zeros((2, 64), dtype=np.uint16)
CODEBOOK = np.zeros((256, 4), dtype=np.float16)
VECTORS = VqWeights((INDICES,), (CODEBOOK,), 8)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: GridWeights(CODES, SCALES, bits=5), LayoutError, "bits is 5"),
        (lambda: GridWeights(CODES, SCALES, group_size=48), LayoutError, "group_size is 48"),
        (lambda: GridWeights(CODES, SCALES[:, :3]), ShapeError, r"scales has shape \(1, 3\)"),
        (lambda: GridWeights(CODES, SCALES * np.float16("inf")), NonFiniteError, "scales holds"),
        (lambda: GridWeights(CODES[0], SCALES), ShapeError, "must have 2 dimensions"),
        (lambda: GridWeights(CODES.astype(np.int64), SCALES), DtypeError, "codes has dtype int64"),
        (lambda: GridWeights([0], SCALES), DtypeError, "codes is a list"),  # type: ignore[arg-type]
        (lambda: GridWeights(CODES, SCALES, CODES), ShapeError, r"zeros has shape \(64, 8\)"),
        (lambda: DenseWeights(np.full((2, 2), np.nan, np.float32)), NonFiniteError, "weight"),
        (lambda: LayeredWeights(np.full((2, 2), np.inf, np.float32)), NonFiniteError, "weight"),
        (lambda: LayeredWeights(CODES.view(np.int8)), DtypeError, "weight has dtype int8"),
        (lambda: LayeredWeights(CODES.view(np.int8), SCALES[0]), ShapeError, "scales has shape"),
        (lambda: LayeredWeights(SCALES, SCALES[0]), DtypeError, "weight has dtype float16"),
        (lambda: TcqWeights(CODES, SCALES, TABLE, 2, 8), LayoutError, "bits 8"),
        (lambda: TcqWeights(CODES, SCALES, TABLE, 2, 2), LayoutError, "multiplier is 2"),
        (lambda: TcqWeights(CODES, SCALES, TABLE, 3, 2), ShapeError, r"codes has shape \(64, 8\)"),
        (lambda: VqWeights((INDICES,), (np.tile(CODEBOOK, 5),), 8), LayoutError, "length is 20"),
        (lambda: VqColumns((VECTORS,)), ShapeError, "1 parts with out_features"),
        (lambda: VqColumns((VECTORS, replace(VECTORS, out_features=7))), ShapeError, "7, 8"),
        (lambda: VqWeights((INDICES + 256,), (CODEBOOK,), 8), ShapeError, "holds 256"),
        (lambda: VqWeights((INDICES,), (CODEBOOK,), 9), ShapeError, "indices.0. has shape"),
        (lambda: VqWeights((INDICES,), (), 8), ShapeError, "one or two"),
        (lambda: VqWeights((INDICES,), (CODEBOOK + np.inf,), 8), NonFiniteError, "codebook"),
    ],
)
def test_bad_weights_are_named(
    make: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make()


def test_layers_are_dense_weights_by_another_layout() -> None:
    weight = normal(70, 300, seed=3)
    layers, dense = LayeredWeights(weight), DenseWeights(weight)
    x = normal(9, 300)
    for tier in supported_isas():
        with forced_isa(tier):
            for batch in (1, 2, 9):
                found, expected = (matmul(Matrix(w), x[:batch]) for w in (layers, dense))
                np.testing.assert_array_equal(bits(found), bits(expected), tier.name)


def test_layers_do_not_stack() -> None:
    layers = layered()(16, 64, 1)
    for parts in ([layers, layers], [grid(4)(16, 64, 1), layers]):
        with pytest.raises(ShapeError):
            Matrix(parts)


def test_a_permutation_must_be_one() -> None:
    with pytest.raises(ShapeError, match="not a permutation"):
        Matrix(FORMATS["grid4"](8, 32, 3), Transform(np.zeros(32, dtype=np.int64)))
