"""Every quantizer: symbols and bytes round trip exactly, losses and gradients are as defined."""

from __future__ import annotations

import builtins
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from scq.errors import CorruptCodes, InvalidCodebook, InvalidLatents, UnsupportedOperation
from scq.quantizers import (
    QUANTIZERS,
    Quantizer,
    QuantizerConfig,
    SymbolTables,
    build_quantizer,
)
from scq.quantizers.fsq import FiniteScalarQuantizer
from scq.quantizers.gumbel import GumbelQuantizer
from scq.quantizers.rvq import ResidualQuantizer, beam_search
from scq.quantizers.scq_sparse import SparseConvexQuantizer
from scq.quantizers.vq import VectorQuantizer

CONFIG = QuantizerConfig(
    code_dim=4, num_codes=8, levels=(5, 4, 3), max_support=2, denominator=4, dead_code_interval=3
)
CODED = sorted(set(QUANTIZERS) - {"none"})


def latents(seed: int = 0, shape: tuple[int, ...] = (2, 4, 4, 4)) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.tensor([2.0, 1.0, 0.7, 0.4])
    return torch.randn(shape, generator=generator) * scales + 0.3


def fitted(name: str, **changes: Any) -> Quantizer:
    torch.manual_seed(0)
    quantizer = build_quantizer(name, replace(CONFIG, **changes))
    quantizer.initialize(latents().reshape(-1, 4))
    return quantizer.eval()


@pytest.mark.parametrize("name", CODED)
def test_symbols_and_bytes_round_trip(name: str) -> None:
    quantizer = fitted(name)
    flat = latents(1).reshape(-1, 4)
    symbols = quantizer.encode(flat)
    assert symbols.shape == (32, len(quantizer.alphabets))
    assert symbols.dtype == torch.int64
    assert torch.equal(symbols, quantizer.encode(flat))
    for tables in (None, quantizer.fit_tables(symbols)):
        data = quantizer.pack(symbols, tables)
        assert torch.equal(quantizer.unpack(data, 32, tables), symbols)
        with pytest.raises(CorruptCodes):
            quantizer.unpack(data + b"\0", 32, tables)
    assert quantizer.decode(symbols).shape == flat.shape


@pytest.mark.parametrize("name", CODED)
def test_evaluation_returns_what_the_receiver_decodes(name: str) -> None:
    quantizer = fitted(name)
    with torch.no_grad():
        output = quantizer(latents(1))
        decoded = quantizer.decode(output.symbols.flatten(0, 2)).reshape(2, 4, 4, 4)
    rounding = 0.05 if name in ("scq_exact", "scq_relaxed") else 1e-6
    if name != "scq_relaxed":
        torch.testing.assert_close(decoded, output.quantized, atol=rounding, rtol=0)
    assert torch.equal(output.symbols.flatten(0, 2), quantizer.encode(latents(1).flatten(0, 2)))


@pytest.mark.parametrize("name", sorted(QUANTIZERS))
def test_training_sends_finite_gradients_to_latents_and_parameters(name: str) -> None:
    quantizer = build_quantizer(name, CONFIG).train()
    values = latents().requires_grad_()
    output = quantizer(values)
    assert output.quantized.shape == values.shape
    target = torch.zeros_like(values)
    (functional.mse_loss(output.quantized, target) + output.loss).backward()
    learned = [p.grad for p in quantizer.parameters() if p.requires_grad]
    for gradient in (values.grad, *learned):
        assert gradient is not None
        assert bool(torch.isfinite(gradient).all())
        assert float(gradient.abs().sum()) > 0


@pytest.mark.parametrize("name", ["vq", "vq_ema", "rvq", "scq_sparse"])
def test_straight_through_is_the_identity_to_the_latents(name: str) -> None:
    quantizer = fitted(name, commitment=0.0).train()
    values = latents().requires_grad_()
    output = quantizer(values)
    weight = torch.randn_like(values)
    (gradient,) = torch.autograd.grad((output.quantized * weight).sum() + output.loss, values)
    torch.testing.assert_close(gradient, weight)


def test_vq_losses_are_those_of_the_paper() -> None:
    quantizer = fitted("vq", commitment=0.3, codebook_pull=2.0).train()
    assert isinstance(quantizer, VectorQuantizer)
    values = latents(1).requires_grad_()
    output = quantizer(values)
    distances = torch.cdist(values.detach().reshape(-1, 4), quantizer.codebook.detach())
    codes = quantizer.codebook[distances.argmin(1)].reshape(values.shape)
    torch.testing.assert_close(output.loss, 2.3 * (values - codes).square().mean())
    latent_gradient, code_gradient = torch.autograd.grad(output.loss, (values, quantizer.codebook))
    torch.testing.assert_close(
        latent_gradient, 0.3 * 2 * (values - codes).detach() / values.numel()
    )
    assert float(code_gradient.abs().sum()) > 0


def test_moving_averages_follow_the_latents() -> None:
    quantizer = fitted("vq_ema", decay=0.5).train()
    shifted = latents() + 1.0
    before = float((quantizer(shifted).quantized - shifted).square().mean())
    for _ in range(5):
        quantizer(shifted)
    assert float((quantizer(shifted).quantized - shifted).square().mean()) < 0.7 * before


def test_each_residual_stage_reduces_the_error() -> None:
    quantizer = fitted("rvq", num_stages=3, beam_size=1)
    flat = latents().reshape(-1, 4)
    symbols = quantizer.encode(flat)
    assert isinstance(quantizer, ResidualQuantizer)
    total, errors = torch.zeros_like(flat), []
    for stage in range(3):
        total = total + quantizer.codebooks[stage][symbols[:, stage]]
        errors.append(float((flat - total).square().mean()))
    assert errors[0] > errors[1] > errors[2]


def test_a_wider_beam_is_never_worse_than_greedy_and_finds_the_best_pair() -> None:
    generator = torch.Generator().manual_seed(3)
    codebooks = torch.randn(2, 6, 4, generator=generator)
    flat = latents(5).reshape(-1, 4)

    def errors(symbols: Tensor) -> Tensor:
        sums = codebooks[0][symbols[:, 0]] + codebooks[1][symbols[:, 1]]
        return (flat - sums).square().sum(1)

    every = (codebooks[0][:, None] + codebooks[1][None]).reshape(-1, 4)
    best = torch.cdist(flat, every).square().amin(1)
    greedy, wide = (errors(beam_search(flat, codebooks, beam)) for beam in (1, 6))
    torch.testing.assert_close(wide, best, rtol=1e-4, atol=1e-5)
    assert float(greedy.mean()) > float(wide.mean())


def test_fsq_uses_every_level_of_each_channel_and_nothing_else() -> None:
    quantizer = fitted("fsq", levels=(5, 4, 3))
    assert isinstance(quantizer, FiniteScalarQuantizer)
    assert quantizer.alphabets == (60,)
    symbols = torch.arange(60).unsqueeze(1)
    channels = torch.stack((symbols[:, 0] % 5, symbols[:, 0] // 5 % 4, symbols[:, 0] // 20), 1)
    half = torch.tensor([2, 2, 1])
    expected = quantizer.core.project_out((channels - half) / half)
    torch.testing.assert_close(quantizer.decode(symbols), expected)


def test_fsq_splits_long_codes_into_tables_of_a_usable_size() -> None:
    wide = build_quantizer("fsq", QuantizerConfig(levels=(8, 8, 8, 5, 5, 5)))
    assert wide.alphabets == (512, 125)
    assert wide.raw_bits_per_latent == pytest.approx(math.log2(64000))


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("vq", 3.0),
        ("rvq", 6.0),
        ("fsq", math.log2(60)),
        # 8 single codes, 28 pairs with 3 ways to split 4.
        ("scq_sparse", math.log2(8 + 28 * 3)),
        ("none", math.inf),
    ],
)
def test_raw_bytes_are_the_claimed_bits(name: str, bits: float) -> None:
    quantizer = fitted(name)
    assert quantizer.raw_bits_per_latent == pytest.approx(bits)
    if name != "none":
        symbols = quantizer.encode(latents(1, (640, 4)))
        length = len(quantizer.pack(symbols))
        assert 0 <= length - 640 * bits / 8 <= 10 * len(quantizer.alphabets)


def test_static_tables_code_uneven_symbols_in_fewer_bytes() -> None:
    quantizer = fitted("vq")
    symbols = torch.tensor([0] * 900 + list(range(8)) * 10).unsqueeze(1)
    tables = quantizer.fit_tables(symbols)
    share = torch.bincount(symbols[:, 0]) / len(symbols)
    entropy = float(-(share * share.log2()).sum()) * len(symbols) / 8
    assert entropy <= len(quantizer.pack(symbols, tables)) <= entropy * 1.02 + 4
    assert len(quantizer.pack(symbols)) == math.ceil(3 * len(symbols) / 8)
    stored = SymbolTables.from_tensors(tables.to_tensors())
    assert quantizer.pack(symbols, stored) == quantizer.pack(symbols, tables)


def test_tables_refuse_incomplete_tensors_and_wide_alphabets() -> None:
    with pytest.raises(InvalidCodebook, match="fit them again"):
        SymbolTables.from_tensors({})
    wide = build_quantizer("vq", QuantizerConfig(code_dim=1, num_codes=65536))
    with pytest.raises(InvalidCodebook, match="pack RAW"):
        wide.fit_tables(torch.zeros(1, 1, dtype=torch.int64))


def test_sparse_points_are_at_least_as_near_as_the_nearest_code() -> None:
    sparse = fitted("scq_sparse")
    assert isinstance(sparse, SparseConvexQuantizer)
    flat = latents(1).reshape(-1, 4)
    errors = (flat - sparse.decode(sparse.encode(flat))).square().sum(1)
    nearest = torch.cdist(flat, sparse.codebook).square().amin(1)
    assert bool((errors <= nearest + 1e-4).all())


def test_single_code_share_limits_whole_pictures_while_training_only() -> None:
    quantizer = fitted("scq_sparse", single_code_share=0.999, dead_code_interval=0).train()
    assert isinstance(quantizer, SparseConvexQuantizer)
    torch.manual_seed(0)
    symbols = quantizer(latents()).symbols.reshape(-1, 3)
    assert set(quantizer.assignment(symbols).support_sizes.tolist()) == {1}
    symbols = quantizer.eval()(latents()).symbols.reshape(-1, 3)
    assert 2 in quantizer.assignment(symbols).support_sizes.tolist()


@pytest.mark.parametrize("name", ["vq", "gumbel", "scq_exact", "scq_sparse"])
def test_dead_codes_move_onto_latents_until_settled(name: str) -> None:
    quantizer: Any = fitted(name).train()
    with torch.no_grad():
        quantizer.codebook[2:4] = 1e3
    for _ in range(4):
        quantizer(latents())
    assert float(quantizer.codebook.detach().abs().max()) < 100
    assert {2, 3} <= set(quantizer.take_moved_codes().tolist())
    assert quantizer.take_moved_codes().numel() == 0
    quantizer.settle()
    with torch.no_grad():
        quantizer.codebook[2] = 1e3
    for _ in range(4):
        quantizer(latents())
    assert float(quantizer.codebook.detach()[2].max()) == 1e3


@pytest.mark.parametrize("name", ["vq_ema", "rvq"])
def test_unused_moving_averages_are_replaced_even_in_small_batches(name: str) -> None:
    quantizer: Any = fitted(name, decay=0.5).train()
    first = quantizer.core.layers[0]._codebook
    first.embed.data[0, 3] = 1e3
    first.embed_avg.data[0, 3] = 1e3
    for _ in range(8):
        quantizer(latents())
    assert float(quantizer.codebooks.abs().max()) < 100


@pytest.mark.parametrize("name", CODED)
def test_usage_counts_codes_three_ways(name: str) -> None:
    quantizer = fitted(name)
    usage = quantizer.usage(quantizer.encode(latents().reshape(-1, 4)))
    assert 0 < usage.top1_usage <= 1
    assert usage.perplexity > 1
    assert usage.mass_perplexity > 1
    if name == "scq_sparse":
        assert usage.mass_perplexity <= 8


def test_initialization_repeats_and_tops_up_too_few_latents() -> None:
    few = latents(2, (5, 4))
    for name in sorted(QUANTIZERS):
        first, second = (build_quantizer(name, CONFIG) for _ in range(2))
        first.initialize(few)
        second.initialize(few)
        assert bool(first.initialized)
        for a, b in zip(first.buffers(), second.buffers(), strict=True):
            assert torch.equal(a, b), name


def test_gumbel_anneals_its_temperature_and_ends_as_nearest_code() -> None:
    quantizer = fitted("gumbel", temperature=2.0, final_temperature=0.5, temperature_steps=2)
    assert isinstance(quantizer, GumbelQuantizer)
    quantizer.train()
    seen = [quantizer.temperature]
    for _ in range(3):
        quantizer(latents())
        seen.append(quantizer.temperature)
    assert seen == pytest.approx([2.0, 1.0, 0.5, 0.5])
    flat = latents().reshape(-1, 4)
    nearest = torch.cdist(flat, quantizer.codebook).argmin(1)
    assert torch.equal(quantizer.encode(flat)[:, 0], nearest)


def test_state_survives_saving_and_loading() -> None:
    for name in sorted(QUANTIZERS):
        trained = build_quantizer(name, CONFIG).train()
        trained(latents())
        fresh = build_quantizer(name, CONFIG)
        fresh.load_state_dict(trained.state_dict())
        fresh.eval(), trained.eval()
        assert torch.equal(fresh(latents(1)).quantized, trained(latents(1)).quantized), name


def test_the_bound_has_no_code() -> None:
    quantizer = build_quantizer("none", CONFIG)
    output = quantizer(latents())
    assert torch.equal(output.quantized, latents())
    assert output.symbols.shape == (2, 4, 4, 0)
    for call in (quantizer.encode, quantizer.decode, quantizer.pack, quantizer.usage):
        with pytest.raises(UnsupportedOperation, match="no code"):
            call(output.symbols)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"code_dim": 0}, "code_dim"),
        ({"num_codes": 1}, "num_codes"),
        ({"levels": ()}, "levels"),
        ({"max_support": 5}, "denominator"),
        ({"lam": -1.0}, "lam"),
        ({"decay": 1.0}, "decay"),
        ({"final_temperature": 2.0}, "temperature"),
    ],
)
def test_settings_out_of_range_are_named(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidCodebook, match=field):
        replace(CONFIG, **changes)


def test_unknown_names_and_impossible_levels_are_refused() -> None:
    with pytest.raises(InvalidCodebook, match="available: vq"):
        build_quantizer("vector", CONFIG)
    with pytest.raises(InvalidCodebook, match="levels"):
        build_quantizer("fsq", replace(CONFIG, levels=(3, 3, 3, 3, 3)))


def test_wrong_latents_and_symbols_are_refused() -> None:
    quantizer = fitted("vq")
    with pytest.raises(InvalidLatents, match=r"\(B, h, w, F\)"):
        quantizer(latents().reshape(-1, 4))
    with pytest.raises(InvalidLatents, match="must be"):
        quantizer.encode(torch.zeros(3, 5))
    with pytest.raises(InvalidLatents, match="NaN"):
        quantizer.encode(torch.full((3, 4), math.nan))
    with pytest.raises(InvalidLatents, match="alphabet"):
        quantizer.decode(torch.tensor([[8]]))
    with pytest.raises(CorruptCodes, match="holds symbols"):
        quantizer.pack(torch.tensor([[8]]))


def test_a_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def without_library(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "vector_quantize_pytorch":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_library)
    with pytest.raises(UnsupportedOperation, match=r"vqstack\[baselines\]"):
        build_quantizer("rvq", CONFIG)
    build_quantizer("scq_sparse", CONFIG)
