"""Encoders that mind the rate: fewer bytes for a little more error, with the same decoder."""

from __future__ import annotations

import pytest
import torch

from scq.quantizers import QuantizerConfig, build_quantizer
from scq.study.rate_aware import can_choose, encode_with_rate, fit_choice, propose

CONFIG = QuantizerConfig(code_dim=3, num_codes=12, num_stages=2, max_support=2, denominator=4)


def latents(count: int, seed: int) -> torch.Tensor:
    """Uneven clusters, so that some codes are cheaper than others."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.tensor([[2.0, 0, 0], [0, 2, 0], [0, 0, 2], [1, 1, 1]])
    chosen = torch.multinomial(
        torch.tensor([0.6, 0.3, 0.07, 0.03]), count, True, generator=generator
    )
    return centres[chosen] + 0.4 * torch.randn(count, 3, generator=generator)


@pytest.mark.parametrize("name", ["scq_sparse", "rvq"])
def test_more_weight_on_the_rate_gives_fewer_bytes_and_more_error(name: str) -> None:
    quantizer = build_quantizer(name, CONFIG)
    train, test = latents(600, 1), latents(400, 2)
    quantizer.initialize(train)
    quantizer.eval()
    sizes, errors = [], []
    for weight in (0.001, 0.05, 0.5):
        tables = fit_choice(quantizer, train, weight)
        symbols = encode_with_rate(quantizer, test, tables, weight)
        data = quantizer.pack(symbols, tables)
        assert torch.equal(quantizer.unpack(data, len(test), tables), symbols)
        sizes.append(len(data))
        errors.append(float((quantizer.decode(symbols).detach() - test).square().mean()))
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < 0.8 * sizes[0]
    assert errors == sorted(errors)


@pytest.mark.parametrize("name", ["scq_sparse", "rvq"])
def test_the_nearest_candidate_comes_first(name: str) -> None:
    quantizer = build_quantizer(name, CONFIG)
    quantizer.initialize(latents(300, 1))
    quantizer.eval()
    points = latents(50, 3)
    symbols, errors = propose(quantizer, points)
    assert bool((errors.diff(dim=1) >= -1e-5).all())
    decoded = quantizer.decode(symbols.flatten(0, 1)).detach().reshape(*errors.shape, 3)
    expected = (decoded - points.unsqueeze(1)).square().sum(dim=2)
    torch.testing.assert_close(errors, expected, atol=1e-4, rtol=1e-4)


def test_quantizers_with_one_answer_are_told_apart() -> None:
    assert can_choose(build_quantizer("scq_sparse", CONFIG))
    assert not can_choose(build_quantizer("vq", CONFIG))
