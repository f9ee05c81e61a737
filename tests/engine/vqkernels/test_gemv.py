"""The packed 4-bit GEMV against its numpy reference, on every tier this machine can run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vqkernels import (
    DtypeError,
    GptqTensors,
    Isa,
    IsaError,
    NonFiniteError,
    Q4Matrix,
    ShapeError,
    ThreadPool,
    forced_isa,
    get_isa,
    pack_gptq,
    q4_gemv,
    reference,
    set_isa,
    supported_isas,
)
from vqkernels.isa import TIERS

LayerFactory = Callable[..., GptqTensors]
MODEL_SHAPES = [(1536, 576), (576, 1536), (576, 960), (576, 3072)]

pytestmark = pytest.mark.usefixtures("native")


@pytest.fixture(params=TIERS, ids=lambda isa: isa.name.lower())
def isa(request: pytest.FixtureRequest) -> Iterator[Isa]:
    tier: Isa = request.param
    if tier not in supported_isas():
        pytest.skip(f"this CPU cannot run {tier.name}")
    with forced_isa(tier):
        yield tier


def normal(*shape: int, seed: int = 1) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def bits(y: npt.NDArray[np.float32]) -> npt.NDArray[np.uint32]:
    return y.view(np.uint32)


@settings(max_examples=60, deadline=None)
@given(
    chunks=st.integers(1, 40),
    out_features=st.integers(1, 50),
    group_chunks=st.integers(1, 24),
    has_zeros=st.booleans(),
    checkpoint_format=st.sampled_from(["gptq", "gptq_v2"]),
    exponent=st.integers(-12, 12),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_tier_gives_the_bits_of_the_integer_reference(
    make_layer: LayerFactory,
    chunks: int,
    out_features: int,
    group_chunks: int,
    has_zeros: bool,
    checkpoint_format: str,
    exponent: int,
    seed: int,
) -> None:
    layer = make_layer(
        8 * chunks,
        out_features,
        group_size=8 * group_chunks,
        has_zeros=has_zeros,
        checkpoint_format=checkpoint_format,
        seed=seed,
    )
    x = normal(8 * chunks, seed=seed) * np.float32(10.0**exponent)
    expected = reference.q4_gemv_int8(layer, x)
    matrix = pack_gptq(layer)
    for tier in supported_isas():
        with forced_isa(tier):
            np.testing.assert_array_equal(bits(q4_gemv(matrix, x)), bits(expected), tier.name)


@settings(max_examples=40, deadline=None)
@given(
    chunks=st.integers(1, 40),
    out_features=st.integers(1, 40),
    has_zeros=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_error_stays_within_half_a_step_per_activation(
    make_layer: LayerFactory, chunks: int, out_features: int, has_zeros: bool, seed: int
) -> None:
    layer = make_layer(8 * chunks, out_features, has_zeros=has_zeros, seed=seed)
    x = normal(8 * chunks, seed=seed)
    steps = reference.quantize_activations(x, layer.group_size).scales
    step_of_column = steps[np.arange(x.size) // layer.group_size]
    bound = 0.5 * step_of_column @ np.abs(reference.dequantize(layer))
    error = np.abs(q4_gemv(pack_gptq(layer), x) - reference.q4_gemv_float(layer, x))
    assert (error <= bound * 1.001 + 1e-6).all()


@pytest.mark.parametrize(("in_features", "out_features"), MODEL_SHAPES)
def test_model_shapes_are_within_one_percent_of_float(
    isa: Isa, make_layer: LayerFactory, in_features: int, out_features: int
) -> None:
    layer = make_layer(in_features, out_features)
    x = normal(in_features)
    y, exact = q4_gemv(pack_gptq(layer), x), reference.q4_gemv_float(layer, x)
    relative_error = np.linalg.norm(y - exact) / np.linalg.norm(exact)
    assert 1e-4 < relative_error <= 1e-2, isa.name


def test_extreme_codes_and_activations_do_not_overflow(isa: Isa) -> None:
    qweight = np.full((512, 24), -1, dtype=np.int32)
    layer = GptqTensors(qweight, np.ones((1, 24), dtype=np.float32), group_size=4096)
    for sign in (1.0, -1.0):
        y = q4_gemv(pack_gptq(layer), np.full(4096, sign, dtype=np.float32))
        np.testing.assert_allclose(y, sign * 7 * 4096, rtol=1e-6, err_msg=isa.name)


def test_batch_rows_equal_single_rows(isa: Isa, make_layer: LayerFactory) -> None:
    matrix = pack_gptq(make_layer(576, 40, has_zeros=True))
    x = normal(5, 576)
    batched = q4_gemv(matrix, x)
    for row in range(5):
        np.testing.assert_array_equal(bits(batched[row]), bits(q4_gemv(matrix, x[row])), isa.name)


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_threads_do_not_change_the_result(make_layer: LayerFactory, num_threads: int) -> None:
    matrix = pack_gptq(make_layer(576, 100))
    x = normal(3, 576)
    with ThreadPool(num_threads) as pool:
        np.testing.assert_array_equal(q4_gemv(matrix, x, pool=pool), q4_gemv(matrix, x))


def test_one_pool_serves_several_callers(make_layer: LayerFactory) -> None:
    matrix = pack_gptq(make_layer(576, 64))
    x = normal(8, 576)
    expected = q4_gemv(matrix, x)
    with ThreadPool(2) as pool, ThreadPoolExecutor(4) as callers:
        results = list(callers.map(lambda _: q4_gemv(matrix, x, pool=pool), range(100)))
    assert all(np.array_equal(result, expected) for result in results)


def test_symmetric_zero_points_are_dropped(make_layer: LayerFactory) -> None:
    plain = make_layer(256, 20)
    stored_sevens = np.full((2, 3), 0x77777777, dtype=np.int32)
    explicit = GptqTensors(plain.qweight, plain.scales, stored_sevens)
    packed = pack_gptq(explicit)
    assert packed.zeros is None
    np.testing.assert_array_equal(
        q4_gemv(packed, normal(256)), q4_gemv(pack_gptq(plain), normal(256))
    )


def test_zero_activations_give_zero(make_layer: LayerFactory) -> None:
    matrix = pack_gptq(make_layer(128, 16, has_zeros=True))
    assert not q4_gemv(matrix, np.zeros(128, dtype=np.float32)).any()


def test_out_receives_the_result(make_layer: LayerFactory) -> None:
    matrix = pack_gptq(make_layer(64, 9))
    out = np.full(9, np.nan, dtype=np.float32)
    assert q4_gemv(matrix, normal(64), out=out) is out
    assert np.isfinite(out).all()


def test_strided_activations_are_read_correctly(make_layer: LayerFactory) -> None:
    matrix = pack_gptq(make_layer(64, 16))
    x = normal(64, 2)
    np.testing.assert_array_equal(q4_gemv(matrix, x[:, 0]), q4_gemv(matrix, x[:, 0].copy()))


def test_nbytes_counts_what_is_read(make_layer: LayerFactory) -> None:
    assert pack_gptq(make_layer(576, 1536)).nbytes == 576 * 1536 // 2 + 5 * 1536 * 4


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_activations_are_refused(make_layer: LayerFactory, value: float) -> None:
    x = normal(64)
    x[17] = value
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        q4_gemv(pack_gptq(make_layer(64, 16)), x)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (np.zeros(64), DtypeError, "x has dtype float64, must be float32"),
        ([0.0] * 64, DtypeError, "x is a list, must be a numpy array"),
        (np.zeros(72, np.float32), ShapeError, r"x has shape \(72,\), must be \(64,\)"),
        (np.zeros((0, 64), np.float32), ShapeError, "batch >= 1"),
        (np.zeros((1, 1, 64), np.float32), ShapeError, "x has shape"),
    ],
)
def test_bad_activations_are_named(
    make_layer: LayerFactory, x: npt.NDArray[np.float32], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        q4_gemv(pack_gptq(make_layer(64, 16)), x)


@pytest.mark.parametrize(
    ("out", "error"),
    [
        (np.zeros(16), DtypeError),
        (np.zeros(17, np.float32), ShapeError),
        (np.zeros(32, np.float32)[::2], ShapeError),
    ],
)
def test_bad_out_is_refused(
    make_layer: LayerFactory, out: npt.NDArray[np.float32], error: type[Exception]
) -> None:
    with pytest.raises(error, match="out has"):
        q4_gemv(pack_gptq(make_layer(64, 16)), normal(64), out=out)


def test_packed_arrays_of_the_wrong_size_are_refused(make_layer: LayerFactory) -> None:
    good = pack_gptq(make_layer(64, 16))
    with pytest.raises(ShapeError, match="codes has shape"):
        Q4Matrix(64, 32, 128, good.codes, good.scales, None)
    with pytest.raises(DtypeError, match="scales has dtype"):
        Q4Matrix(64, 16, 128, good.codes, good.scales.astype(np.float64), None)


def test_forced_tier_is_used_and_restored() -> None:
    before = get_isa()
    with forced_isa(Isa.BASELINE):
        assert get_isa() is Isa.BASELINE
    assert get_isa() is before


def test_auto_is_the_best_supported_tier() -> None:
    with forced_isa(Isa.BASELINE):
        set_isa(Isa.AUTO)
        assert get_isa() is supported_isas()[-1]


def test_baseline_always_runs_and_unknown_tiers_never_do() -> None:
    assert supported_isas()[0] is Isa.BASELINE
    unsupported = set(TIERS) - set(supported_isas())
    for tier in unsupported:
        with pytest.raises(IsaError, match=tier.name):
            set_isa(tier)
