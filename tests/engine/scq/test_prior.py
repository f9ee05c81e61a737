"""The prior sees only the past, learns structure, and codes exactly on its own platform."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from scq.errors import CorruptCodes, InvalidLatents, ScqError, UnsupportedOperation
from scq.quantizers import QuantizerConfig, build_quantizer
from scq.vqvae import prior_codec
from scq.vqvae.prior import CodePrior, Conditions, PriorConfig
from scq.vqvae.prior_codec import HEADER_BYTES, PriorCodec, platform_fingerprint
from scq.vqvae.training import VqVaeTraining, fit_prior

CODES = 4


def staircases(count: int, seed: int, rows: int = 4, columns: int = 5) -> Tensor:
    """Each row counts up modulo 4 from a random start; one code in twenty is random."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(CODES, (count, rows, 1), generator=generator)
    grid = (start + torch.arange(columns)) % CODES
    noise = torch.rand(grid.shape, generator=generator) < 0.05
    random = torch.randint(CODES, grid.shape, generator=generator)
    return torch.where(noise, random, grid).unsqueeze(-1)


def random_prior(config: PriorConfig) -> CodePrior:
    torch.manual_seed(0)
    return CodePrior(config).eval().requires_grad_(False)


SMALL = PriorConfig((CODES,), channels=8, layers=2, dropout=0.0)
TRAINING = VqVaeTraining(steps=1, batch_size=16, prior_steps=150, prior_learning_rate=1e-2)


@pytest.fixture(scope="module")
def fitted() -> CodePrior:
    prior = random_prior(SMALL)
    fit_prior(prior, staircases(64, 0), TRAINING)
    return prior


@pytest.mark.parametrize("position", [(0, 0), (1, 2), (2, 4), (3, 0)])
def test_a_position_sees_all_codes_before_it_and_none_after(position: tuple[int, int]) -> None:
    prior = random_prior(PriorConfig((CODES,), channels=8, layers=2, kernel=5))
    original = staircases(1, 1).flatten()
    changed = (original + torch.eye(20, dtype=torch.int64)) % CODES
    features = prior.features(torch.cat([original[None], changed]).reshape(21, 4, 5, 1))
    here = features[:, *position]
    differs = (here[1:] != here[0]).any(dim=1).tolist()
    order = position[0] * 5 + position[1]
    assert differs == [other < order for other in range(20)]


def test_the_features_of_one_position_are_those_of_the_whole_grid() -> None:
    prior = random_prior(PriorConfig((CODES,), (CODES,), num_classes=2, channels=8, layers=2))
    grid, coarse = staircases(2, 1, 4, 6), staircases(2, 2, 2, 3)
    conditions = Conditions(coarse, torch.tensor([0, 1]))
    whole = prior.features(grid, conditions)
    for row, column in ((0, 0), (1, 3), (2, 5), (3, 1)):
        part = prior.features_at(grid, row, column, conditions)
        torch.testing.assert_close(part, whole[:, row, column])


def test_later_symbols_of_a_position_depend_on_earlier_ones() -> None:
    prior = random_prior(PriorConfig((3, 5), channels=4, layers=1))
    features = torch.randn(2, 4)
    assert prior.head(features, torch.zeros(2, 0, dtype=torch.int64)).shape == (2, 3)
    first, second = (prior.head(features, torch.full((2, 1), value)) for value in (0, 1))
    assert first.shape == (2, 5)
    assert not torch.allclose(first, second)


def test_probabilities_of_all_small_grids_sum_to_one() -> None:
    prior = random_prior(PriorConfig((2,), channels=4, layers=1))
    every = torch.cartesian_prod(*[torch.arange(2)] * 4).reshape(16, 2, 2, 1)
    assert float((2 ** -prior.bits(every)).sum()) == pytest.approx(1, abs=1e-5)


def test_a_trained_prior_beats_the_static_table_in_coded_bytes(fitted: CodePrior) -> None:
    quantizer = build_quantizer("vq", QuantizerConfig(code_dim=2, num_codes=CODES))
    tables = quantizer.fit_tables(staircases(64, 0).reshape(-1, 1))
    codec = PriorCodec(fitted)
    with_prior = with_table = 0
    ideal = 0.0
    for grid in staircases(4, 9).split(1):  # type: ignore[no-untyped-call]
        data = codec.encode(grid)
        assert torch.equal(codec.decode(data), grid)
        with_prior += len(data) - HEADER_BYTES
        with_table += len(quantizer.pack(grid.reshape(-1, 1), tables))
        ideal += float(fitted.bits(grid)) / 8
    assert with_prior < with_table
    # Per stream: four bytes of state less two of its content, and rounding of frequencies.
    assert ideal <= with_prior <= ideal * 1.01 + 4 * 4
    assert ideal < 0.7 * with_table


def test_impossible_symbols_are_neither_sampled_nor_paid_for() -> None:
    quantizer = build_quantizer("scq_sparse", QuantizerConfig(code_dim=2, num_codes=CODES))
    prior = random_prior(PriorConfig(quantizer.alphabets, channels=4, layers=1))
    generator = torch.Generator().manual_seed(0)
    grid = prior.sample((8, 3, 3), generator, allowed=quantizer.allowed)
    quantizer.decode(grid.reshape(-1, 3))
    restricted = prior.bits(grid, allowed=quantizer.allowed)
    assert bool((restricted < prior.bits(grid)).all())
    codec = PriorCodec(prior, quantizer.allowed)
    data = codec.encode(grid[:1])
    assert torch.equal(codec.decode(data), grid[:1])


def test_samples_repeat_with_the_generator_and_follow_what_was_learned(fitted: CodePrior) -> None:
    first, again, other = (
        fitted.sample((4, 4, 5), torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    steps = (first[:, :, 1:] - first[:, :, :-1]) % CODES
    assert float((steps == 1).float().mean()) > 0.7
    with pytest.raises(ScqError, match="temperature is 0"):
        fitted.sample((1, 1, 1), torch.Generator(), temperature=0)


def test_conditions_change_the_prediction_and_must_fit() -> None:
    prior = random_prior(PriorConfig((CODES,), (CODES,), num_classes=2, channels=4, layers=1))
    grid, coarse = staircases(1, 1, 4, 4), staircases(1, 2, 2, 2)
    zero, one = torch.tensor([0]), torch.tensor([1])
    bits = prior.bits(grid, Conditions(coarse, zero))
    assert not torch.allclose(bits, prior.bits(grid, Conditions(coarse, one)))
    assert not torch.allclose(bits, prior.bits(grid, Conditions((coarse + 1) % CODES, zero)))
    with pytest.raises(InvalidLatents, match="coarser grid"):
        prior.bits(grid)
    with pytest.raises(InvalidLatents, match="labels"):
        prior.bits(grid, Conditions(coarse))
    codec = PriorCodec(prior)
    data = codec.encode(grid, Conditions(coarse, zero))
    assert torch.equal(codec.decode(data, Conditions(coarse, zero)), grid)


def test_another_platform_or_prior_is_refused(
    fitted: CodePrior, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec = PriorCodec(fitted)
    data = codec.encode(staircases(1, 9))
    with pytest.raises(UnsupportedOperation, match="coded with prior"):
        PriorCodec(random_prior(SMALL)).decode(data)
    other = platform_fingerprint().replace("threads", "threads and one")
    monkeypatch.setattr(prior_codec, "platform_fingerprint", lambda: other)
    with pytest.raises(UnsupportedOperation, match=r"another platform.*threads and one"):
        codec.decode(data)


def test_streams_that_cannot_be_are_corrupt(fitted: CodePrior) -> None:
    codec = PriorCodec(fitted)
    data = codec.encode(staircases(1, 9))
    checksum = HEADER_BYTES - 1
    flipped = data[:checksum] + bytes([data[checksum] ^ 1]) + data[checksum + 1 :]
    empty = data[:4] + b"\0\0" + data[6:]
    for broken in (b"", data[:-1], data + b"\0", b"XX" + data[2:], flipped, empty):
        with pytest.raises(CorruptCodes):
            codec.decode(broken)
    with pytest.raises(InvalidLatents, match="alphabet"):
        codec.encode(torch.full((1, 2, 2, 1), CODES))
    with pytest.raises(InvalidLatents, match=r"\(1, h, w, 1\)"):
        codec.encode(torch.zeros(2, 2, 2, 1, dtype=torch.int64))


@pytest.mark.parametrize(
    "change", ["alphabets", "channels", "layers", "kernel", "dropout", "num_classes"]
)
def test_settings_out_of_range_are_named(change: str) -> None:
    values = {"alphabets": (), "channels": 0, "layers": 0, "kernel": 4, "dropout": 1.0}
    with pytest.raises(ScqError, match=f"{change} is out of range"):
        PriorConfig(**{"alphabets": (CODES,), change: values.get(change, -1)})  # type: ignore[arg-type]


def test_an_untrained_prior_costs_about_the_raw_bits() -> None:
    bits = float(random_prior(SMALL).bits(staircases(1, 3)))
    assert bits == pytest.approx(20 * math.log2(CODES), rel=0.3)
