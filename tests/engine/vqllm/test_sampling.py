"""Choosing tokens from logits."""

from typing import Any

import numpy as np
import pytest

from vqllm.errors import InvalidSampling
from vqllm.runtime.sampling import Sampler, SamplingParams, _distribution, _draw

LOGITS = np.log(np.array([0.5, 0.3, 0.15, 0.05], dtype=np.float32))


def frequencies(params: SamplingParams, num_draws: int = 4000) -> list[float]:
    sampler = Sampler(params)
    drawn = [sampler.choose(LOGITS, [], []) for _ in range(num_draws)]
    return [drawn.count(token) / num_draws for token in range(4)]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", -5),
        ("max_tokens", True),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", 2.5),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("presence_penalty", 2.1),
        ("frequency_penalty", float("inf")),
        ("seed", 2**64),
        ("logprobs", 21),
        ("stop", ("",)),
        ("stop", ("x",) * 17),
    ],
)
def test_values_outside_their_range_are_named(field: str, value: object) -> None:
    with pytest.raises(InvalidSampling, match=f"{field} is .* allowed is") as caught:
        SamplingParams(**{field: value})  # type: ignore[arg-type]
    assert caught.value.field == field


def test_temperature_zero_takes_the_most_probable_token() -> None:
    assert Sampler(SamplingParams(temperature=0)).choose(LOGITS, [], []) == 0


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"temperature": 0.0}, True),
        ({"temperature": 0.0, "top_p": 0.5, "top_k": 3}, True),  # ignored by greedy draws
        ({"temperature": 0.7}, False),
        ({"temperature": 0.0, "logprobs": 0}, False),
        ({"temperature": 0.0, "logit_bias": ((3, 1.0),)}, False),
        ({"temperature": 0.0, "repetition_penalty": 1.1}, False),
        ({"temperature": 0.0, "presence_penalty": -0.5}, False),
    ],
)
def test_only_plain_greedy_draws_need_the_largest_logit_alone(
    values: dict[str, Any], expected: bool
) -> None:
    assert SamplingParams(**values).is_argmax is expected


def test_the_coldest_temperature_is_greedy() -> None:
    assert Sampler(SamplingParams(temperature=1e-300, seed=1)).choose(LOGITS, [], []) == 0


def test_plain_sampling_follows_the_distribution() -> None:
    found = frequencies(SamplingParams(seed=1))
    np.testing.assert_allclose(found, [0.5, 0.3, 0.15, 0.05], atol=0.03)


def test_top_k_keeps_the_most_probable() -> None:
    found = frequencies(SamplingParams(seed=1, top_k=2))
    np.testing.assert_allclose(found, [0.625, 0.375, 0, 0], atol=0.03)


def test_top_p_keeps_the_smallest_set_that_reaches_the_mass() -> None:
    found = frequencies(SamplingParams(seed=1, top_p=0.75))
    np.testing.assert_allclose(found, [0.625, 0.375, 0, 0], atol=0.03)


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
def test_the_nucleus_is_that_of_a_full_sort(top_p: float) -> None:
    logits = (3 * np.random.default_rng(4).standard_normal(5000)).astype(np.float32)
    probabilities = np.exp(logits.astype(np.float64))
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities)
    size = int(np.searchsorted(np.cumsum(probabilities[order]), top_p)) + 1
    token_ids, _ = _distribution(logits, SamplingParams(top_p=top_p))
    assert sorted(token_ids.tolist()) == sorted(order[:size].tolist())


def test_a_tiny_top_p_still_keeps_one_token() -> None:
    assert frequencies(SamplingParams(seed=1, top_p=1e-9), 50) == [1, 0, 0, 0]


def test_min_p_drops_tokens_far_below_the_best() -> None:
    found = frequencies(SamplingParams(seed=1, min_p=0.2))
    np.testing.assert_allclose(found, [0.526, 0.316, 0.158, 0], atol=0.03)


def test_temperature_flattens() -> None:
    found = frequencies(SamplingParams(seed=1, temperature=2.0))
    expected = np.sqrt([0.5, 0.3, 0.15, 0.05])
    np.testing.assert_allclose(found, expected / expected.sum(), atol=0.03)


def test_presence_and_frequency_penalties_count_the_output_only() -> None:
    params = SamplingParams(temperature=0, presence_penalty=0.3, frequency_penalty=0.3)
    assert Sampler(params).choose(LOGITS, [0, 0, 0], []) == 0
    assert Sampler(params).choose(LOGITS, [], [0]) == 1


def test_repetition_penalty_counts_the_prompt_too() -> None:
    params = SamplingParams(temperature=0, repetition_penalty=2.0)
    assert Sampler(params).choose(LOGITS, [0], []) == 1
    positive = np.array([2.0, 1.5, 0.0, 0.0], dtype=np.float32)
    assert Sampler(params).choose(positive, [0], []) == 1


def test_penalties_leave_the_caller_s_logits_alone() -> None:
    before = LOGITS.copy()
    Sampler(SamplingParams(repetition_penalty=2.0)).choose(LOGITS, [0], [1])
    np.testing.assert_array_equal(LOGITS, before)


def test_the_same_seed_draws_the_same_tokens() -> None:
    def draw(seed: int) -> list[int]:
        sampler = Sampler(SamplingParams(seed=seed))
        return [sampler.choose(LOGITS, [], []) for _ in range(50)]

    assert draw(-7) == draw(-7)
    assert draw(7) != draw(8)


def test_logprobs_are_of_the_model_s_own_distribution() -> None:
    sampler = Sampler(SamplingParams(temperature=0, logprobs=2))
    found = sampler.logprobs(LOGITS, 2)
    assert found is not None
    assert found.logprob == pytest.approx(np.log(0.15), abs=1e-5)
    assert [token for token, _ in found.top] == [0, 1]
    assert Sampler(SamplingParams()).logprobs(LOGITS, 2) is None


@pytest.mark.parametrize("size", [1, 255, 256, 257, 5000])
def test_a_draw_inverts_the_running_sum(size: int) -> None:
    random = np.random.default_rng(size)
    probabilities = random.random(size, dtype=np.float32) * (random.random(size) < 0.3)
    probabilities[size // 2] = 1.0
    running = np.cumsum(probabilities, dtype=np.float64)
    for fraction in (0.0, 0.25, 0.5, 0.999, float(np.nextafter(1.0, 0.0))):
        index = _draw(probabilities, fraction)
        assert probabilities[index] > 0
        assert running[index] >= fraction * running[-1] * (1 - 1e-12)
        assert running[index] - probabilities[index] <= fraction * running[-1] * (1 + 1e-12)
