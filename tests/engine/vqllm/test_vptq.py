"""VPTQ: what is stored is what was chosen, and each of its parts lowers the error."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from vqkernels.matrix_weights import MAX_VECTOR
from vqllm.errors import InvalidConfig, UnsupportedModel
from vqllm.quantization.hessian import HessianFactor, factorize
from vqllm.quantization.presets import QuantizeConfig
from vqllm.quantization.vptq import VptqOptions, quantize_vptq
from vqllm.quantization.vptq_candidates import vptq_candidates
from vqllm.quantization.vptq_kmeans import assign, kmeans
from vqllm.quantization.vptq_linear import VptqLinear
from vqllm.quantization.vptq_reading import read_vptq

OUT, IN = 128, 96
SMALL = VptqOptions(num_centroids=64, kmeans_steps=6)


def synthetic_layer(seed: int = 0, out: int = OUT) -> tuple[Tensor, Tensor]:
    """Heavy-tailed weights (out, in), and moments of correlated inputs, four of them large."""
    generator = torch.Generator().manual_seed(seed)
    tails = torch.randn(5, out, IN, generator=generator).square().mean(0).sqrt()
    weight = torch.randn(out, IN, generator=generator) / tails * 0.02
    mixing = torch.eye(IN) / 2 + torch.randn(IN, IN, generator=generator) / IN**0.5
    inputs = torch.randn(2048, IN, generator=generator) @ mixing
    inputs[:, torch.randperm(IN, generator=generator)[:4]] *= 15
    return weight, (inputs.T @ inputs / 2048).double()


def relative_error(weight: Tensor, linear: VptqLinear, hessian: Tensor) -> float:
    difference, gram = weight - torch.from_numpy(linear.dequantize()), hessian.float()
    error = float(((difference @ gram) * difference).sum())
    return error / float(((weight @ gram) * weight).sum())


def error_of(options: VptqOptions, act_order: bool = True, seed: int = 0) -> float:
    weight, hessian = synthetic_layer(seed)
    factor = factorize(hessian, 0.01, act_order)
    return relative_error(weight, quantize_vptq(weight, factor, options), hessian)


@pytest.fixture(scope="module")
def factor() -> HessianFactor:
    return factorize(synthetic_layer()[1], 0.01)


@pytest.mark.parametrize(
    "options",
    [
        SMALL,
        replace(SMALL, num_res_centroids=16, beam=4),
        replace(SMALL, num_outliers=6, num_groups=2, num_outlier_centroids=16),
        replace(SMALL, has_norm=False, vector_length=5),
        replace(SMALL, is_published=True, num_res_centroids=8),
    ],
)
def test_what_is_stored_reads_back_the_same(options: VptqOptions, factor: HessianFactor) -> None:
    weight, hessian = synthetic_layer()
    linear = quantize_vptq(weight, factor, options)
    again = read_vptq(linear.tensors(), linear.entry())
    np.testing.assert_array_equal(again.dequantize(), linear.dequantize())
    assert 8 * linear.num_bytes == options.bits_of(OUT, IN)
    assert (linear.out_features, linear.in_features) == (OUT, IN)
    assert relative_error(weight, linear, hessian) < 0.2


def test_the_same_seed_gives_the_same_bytes(factor: HessianFactor) -> None:
    weight, _ = synthetic_layer()
    first, second = (quantize_vptq(weight, factor, SMALL).tensors() for _ in range(2))
    for part, values in first.items():
        np.testing.assert_array_equal(values, second[part])
    other = quantize_vptq(weight, factor, replace(SMALL, seed=1)).tensors()
    assert not np.array_equal(other["indices"], first["indices"])


@pytest.mark.parametrize("seed", [0, 1])
def test_a_norm_without_a_rescaled_hessian_is_beaten(seed: int) -> None:
    """The released tool norms the weight and keeps the factor of the unscaled problem."""
    released = error_of(replace(SMALL, is_published=True), seed=seed)
    without_norm = error_of(replace(SMALL, is_published=True, has_norm=False), seed=seed)
    plain = error_of(replace(SMALL, num_rounds=0), seed=seed)
    ours = error_of(SMALL, seed=seed)
    assert ours < plain < 0.85 * released
    assert without_norm < 0.85 * released  # its norm costs more than it gives
    assert ours < 0.7 * released


@pytest.mark.parametrize("seed", [0, 1])
def test_a_triangular_factor_permuted_on_both_axes_is_beaten(seed: int) -> None:
    """The released tool, permutation off, re-indexes the factor that was saved in act-order."""
    weight, hessian = synthetic_layer(seed)
    right = factorize(hessian, 0.01, act_order=False)
    saved = factorize(hessian, 0.01, act_order=True)
    back = torch.argsort(saved.order)
    wrong = replace(right, upper=saved.upper[back][:, back])
    options = replace(SMALL, num_rounds=0)
    errors = [
        relative_error(weight, quantize_vptq(weight, factor, options), hessian)
        for factor in (wrong, right, saved)
    ]
    assert errors[1] < 0.9 * errors[0]
    assert errors[2] < 0.9 * errors[0]


def test_rounds_of_refit_and_descent_lower_the_error() -> None:
    errors = [error_of(replace(SMALL, num_rounds=rounds)) for rounds in (0, 1, 3)]
    assert errors[2] < errors[1] < errors[0]


def test_a_beam_beats_the_greedy_residual() -> None:
    residual = replace(SMALL, num_res_centroids=16)
    assert error_of(replace(residual, beam=8)) < error_of(replace(residual, beam=1))


def test_feedback_beats_rounding_to_the_nearest_vector(factor: HessianFactor) -> None:
    weight, hessian = synthetic_layer()
    options = replace(SMALL, num_rounds=0)
    blind = replace(factor, upper=torch.diag(factor.upper.diagonal()))
    errors = [
        relative_error(weight, quantize_vptq(weight, chosen, options), hessian)
        for chosen in (factor, blind)
    ]
    assert errors[0] < 0.7 * errors[1]


def test_outputs_that_do_not_fill_a_vector_are_cut() -> None:
    weight, hessian = synthetic_layer(out=130)
    options = replace(SMALL, num_res_centroids=8, vector_length=4)
    linear = quantize_vptq(weight, factorize(hessian, 0.01), options)
    assert linear.dequantize().shape == (130, IN)
    assert linear.indices.shape == (1, 33, IN)
    assert relative_error(weight, linear, hessian) < 0.05


def test_parameters_change_without_touching_an_index(factor: HessianFactor) -> None:
    weight, _ = synthetic_layer()
    linear = quantize_vptq(weight, factor, replace(SMALL, num_res_centroids=4))
    parameters = linear.parameters()
    assert set(parameters) == {"centroids", "res_centroids", "column_scales", "column_biases"}
    doubled = linear.with_parameters({name: 2 * values for name, values in parameters.items()})
    assert doubled.indices is linear.indices
    scales = linear.column_scales
    assert scales is not None
    assert doubled.column_scales is not None
    np.testing.assert_array_equal(doubled.column_scales, 2 * scales)
    with pytest.raises(KeyError, match="centroids"):
        linear.with_parameters({})


def test_groups_have_to_split_the_columns_evenly(factor: HessianFactor) -> None:
    weight, _ = synthetic_layer()
    with pytest.raises(InvalidConfig, match="num_groups is 5"):
        quantize_vptq(weight, factor, replace(SMALL, num_groups=5))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_centroids": 100}, "num_centroids is 100.*power of two"),
        ({"num_res_centroids": 128}, "num_res_centroids is 128"),
        ({"vector_length": 0}, "vector_length is 0"),
        ({"beam": 0}, "beam is 0"),
        ({"num_rounds": -1}, "num_rounds is -1"),
    ],
)
def test_impossible_options_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(InvalidConfig, match=message):
        replace(SMALL, **changes)  # type: ignore[arg-type]


def test_weights_beyond_float16_are_refused(factor: HessianFactor) -> None:
    weight, _ = synthetic_layer()
    weight[3, 5] = 1e6
    with pytest.raises(UnsupportedModel, match="float16"):
        quantize_vptq(weight, factor, SMALL)


def test_kmeans_finds_separate_clusters_and_keeps_every_centroid() -> None:
    generator = torch.Generator().manual_seed(0)
    centers = 10 * torch.randn(8, 3, generator=generator)
    vectors = centers.repeat(50, 1) + 0.1 * torch.randn(400, 3, generator=generator)
    centroids = kmeans(vectors, torch.ones(400), 8)
    assert float(assign(centers, centroids)[1].max()) < 0.05
    few = kmeans(vectors[:4], torch.ones(4), 8)
    assert bool(torch.isfinite(few).all())


def test_kmeans_leans_to_the_heavy_vectors() -> None:
    vectors = torch.tensor([[0.0], [1.0], [10.0], [11.0]])
    centroids = kmeans(vectors, torch.tensor([1.0, 3.0, 1.0, 0.0]), 2)
    assert sorted(round(float(value), 4) for value in centroids[:, 0]) == [0.75, 10.0]


def test_the_scale_of_the_hessian_does_not_matter() -> None:
    weight, hessian = synthetic_layer()
    first, second = (
        quantize_vptq(weight, factorize(scale * hessian, 0.01), SMALL).tensors()
        for scale in (1.0, 2.0**20)
    )
    for part, values in first.items():
        np.testing.assert_array_equal(values, second[part])


@pytest.mark.parametrize("shape", [(192, 576), (576, 1536), (4096, 4096)])
def test_candidates_trade_bits_for_distortion(shape: tuple[int, int]) -> None:
    candidates = vptq_candidates(*shape, replace(SMALL, seed=7))
    bits = [candidate.bits for candidate in candidates]
    distortions = [candidate.distortion for candidate in candidates]
    assert bits == sorted(bits)
    assert distortions == sorted(distortions, reverse=True)
    assert len(candidates) > 8
    for candidate in candidates:
        assert candidate.bits == candidate.options.bits_of(*shape)
        assert candidate.options.method == "vptq"


def test_small_layers_are_not_offered_large_codebooks() -> None:
    def largest(rows: int, columns: int, below: float) -> int:
        chosen = [
            candidate.options
            for candidate in vptq_candidates(rows, columns)
            if candidate.bits <= below * rows * columns
        ]
        return max(o.num_centroids for o in chosen if isinstance(o, VptqOptions))

    assert largest(64, 64, below=4.0) < largest(4096, 4096, below=3.0)


def test_what_is_chosen_for_a_user_has_native_kernels() -> None:
    offered = [candidate.options for candidate in vptq_candidates(576, 1536)]
    offered += [QuantizeConfig(method="vptq", bits=bits).options() for bits in (1, 2, 3, 4)]
    lengths = {options.vector_length for options in offered if isinstance(options, VptqOptions)}
    assert max(lengths) <= MAX_VECTOR
