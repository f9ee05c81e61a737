"""Laws of the lattice code: counts, exactness against brute force, canonical form, gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from scq import lattice, lattice_torch
from scq.errors import InvalidCodebook, InvalidLatents, UnsupportedOperation
from scq.lattice import (
    Candidates,
    LatticeAssignment,
    LatticeCode,
    reconstruct,
    search,
    search_candidates,
)
from vqkernels.lattice import LatticeEffort


def all_points(codebook: Tensor, code: LatticeCode) -> Tensor:
    """Every decodable latent, enumerated without the Gram matrix."""
    points = []
    for size in range(1, code.max_support + 1):
        for support in itertools.combinations(range(code.num_codes), size):
            for parts in itertools.product(range(1, code.denominator + 1), repeat=size):
                if sum(parts) == code.denominator:
                    weights = torch.tensor(parts, dtype=codebook.dtype) / code.denominator
                    points.append(weights @ codebook[list(support)])
    return torch.stack(points)


def squared_errors(latents: Tensor, assignment: LatticeAssignment, codebook: Tensor) -> Tensor:
    return (reconstruct(assignment, codebook) - latents).square().sum(dim=1)


def random_problem(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    codebook = torch.randn(11, 5, generator=generator, dtype=dtype)
    return torch.randn(40, 5, generator=generator, dtype=dtype) * 0.6, codebook


def test_states_of_the_default_code_match_the_published_bit_count() -> None:
    code = LatticeCode(256)
    assert code.num_states == 256 + 32640 * 3
    assert code.bits_per_latent == pytest.approx(16.583, abs=1e-3)


@pytest.mark.parametrize(
    ("max_support", "denominator"), [(1, 1), (1, 4), (2, 2), (2, 3), (2, 4), (2, 5), (3, 4)]
)
def test_num_states_counts_the_enumeration(max_support: int, denominator: int) -> None:
    _, codebook = random_problem()
    code = LatticeCode(11, max_support, denominator)
    assert len(all_points(codebook, code)) == code.num_states


@pytest.mark.parametrize("denominator", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_search_finds_the_global_minimum(denominator: int, dtype: torch.dtype) -> None:
    latents, codebook = random_problem(dtype)
    code = LatticeCode(11, 2, denominator)
    found = squared_errors(latents, search(latents, codebook, code), codebook)
    best = torch.cdist(latents, all_points(codebook, code)).square().amin(dim=1)
    torch.testing.assert_close(found, best, rtol=1e-4, atol=1e-6)


def test_search_is_exact_across_chunks_at_the_shipped_size() -> None:
    generator = torch.Generator().manual_seed(5)
    codebook = torch.randn(256, 16, generator=generator)
    latents = torch.randn(37, 16, generator=generator)
    code = LatticeCode(256)
    found = squared_errors(latents, search(latents, codebook, code, exact=True), codebook)
    best = torch.cdist(latents, codebook).square().amin(dim=1)
    for heavy in (0.75, 0.5):
        for first in range(256):
            points = heavy * codebook[first] + (1 - heavy) * codebook
            best = torch.minimum(best, torch.cdist(latents, points).square().amin(dim=1))
    torch.testing.assert_close(found, best, rtol=1e-4, atol=1e-4)


def test_support_of_one_is_the_nearest_code() -> None:
    latents, codebook = random_problem()
    assignment = search(latents, codebook, LatticeCode(11, 1, 4))
    nearest = torch.cdist(latents, codebook).argmin(dim=1)
    assert torch.equal(assignment.indices, nearest.unsqueeze(1))
    assert bool((assignment.numerators == 4).all())


@pytest.mark.parametrize("denominator", [2, 3, 4, 8])
def test_assignments_are_canonical(denominator: int) -> None:
    latents, codebook = random_problem()
    codebook = torch.cat((codebook[:10], latents[:1]))
    found = search(latents, codebook, LatticeCode(11, 2, denominator))
    heavy, light = found.numerators.unbind(dim=1)
    first, second = found.indices.unbind(dim=1)
    assert bool((heavy + light == denominator).all())
    assert bool((heavy >= light).all())
    assert bool((first[light == 0] == second[light == 0]).all())
    assert bool((first[light > 0] != second[light > 0]).all())
    assert bool((first[heavy == light] < second[heavy == light]).all())
    assert found.support_sizes[0] == 1
    assert set(found.support_sizes.tolist()) == {1, 2}


def test_duplicate_codes_never_form_a_pair_of_one_code() -> None:
    codebook = torch.zeros(4, 3)
    found = search(torch.ones(2, 3), codebook, LatticeCode(4))
    assert torch.equal(found.indices, torch.zeros(2, 2, dtype=torch.int64))
    assert found.support_sizes.tolist() == [1, 1]


def test_search_repeats_itself_bit_for_bit() -> None:
    latents, codebook = random_problem(torch.float32)
    first, second = (search(latents, codebook, LatticeCode(11)) for _ in range(2))
    assert torch.equal(first.indices, second.indices)
    assert torch.equal(first.numerators, second.numerators)


def test_a_far_offset_costs_no_precision() -> None:
    latents, codebook = random_problem()
    code = LatticeCode(11)
    plain = search(latents, codebook, code)
    shifted = search((latents + 1000).float(), (codebook + 1000).float(), code)
    assert float((plain.indices == shifted.indices).double().mean()) > 0.95


def test_no_latents_give_an_empty_assignment() -> None:
    found = search(torch.empty(0, 5), torch.randn(11, 5), LatticeCode(11))
    assert len(found) == 0
    assert found.indices.shape == (0, 2)


def test_codebook_gradient_is_the_sum_of_weights() -> None:
    latents, codebook = random_problem()
    codebook.requires_grad_()
    assignment = search(latents, codebook, LatticeCode(11))
    reconstruct(assignment, codebook).sum().backward()  # type: ignore[no-untyped-call]
    expected = torch.zeros(11, dtype=torch.float64)
    flat = assignment.numerators.double().flatten() / 4
    expected.index_add_(0, assignment.indices.flatten(), flat)
    assert codebook.grad is not None
    torch.testing.assert_close(codebook.grad, expected.unsqueeze(1).expand(11, 5))


@pytest.mark.parametrize(
    ("num_codes", "max_support", "denominator"), [(0, 1, 4), (4, 0, 4), (4, 2, 0), (1, 2, 4)]
)
def test_impossible_codes_are_refused(num_codes: int, max_support: int, denominator: int) -> None:
    with pytest.raises(InvalidCodebook, match=r"must be a positive integer|exceeds"):
        LatticeCode(num_codes, max_support, denominator)


def test_bad_latents_and_codebooks_are_refused() -> None:
    latents, codebook = random_problem()
    code = LatticeCode(11)
    with pytest.raises(InvalidLatents, match="NaN"):
        search(torch.full_like(latents, torch.nan), codebook, code)
    with pytest.raises(InvalidLatents, match=r"\(N, 5\)"):
        search(latents[:, :4], codebook, code)
    with pytest.raises(InvalidLatents, match="float32"):
        search(latents.float(), codebook, code)
    with pytest.raises(InvalidCodebook, match=r"\(11, F\)"):
        search(latents, codebook[:10], code)
    with pytest.raises(InvalidCodebook, match="infinity"):
        search(latents, codebook / 0, code)
    with pytest.raises(UnsupportedOperation, match="max_support 3"):
        search(latents, codebook, LatticeCode(11, 3, 4), exact=True)
    with pytest.raises(UnsupportedOperation, match="max_support 5"):
        search(latents, codebook, LatticeCode(11, 5, 8))
    with pytest.raises(UnsupportedOperation, match="count is 0"):
        search_candidates(latents, codebook, code, 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize(("max_support", "denominator"), [(3, 4), (3, 8), (4, 4)])
def test_larger_supports_come_close_to_the_global_minimum(
    dtype: torch.dtype, max_support: int, denominator: int
) -> None:
    latents, codebook = random_problem()
    code = LatticeCode(11, max_support, denominator)
    assignment = search(latents.to(dtype), codebook.to(dtype), code)
    found = squared_errors(latents, assignment, codebook)
    best = torch.cdist(latents, all_points(codebook, code)).square().amin(dim=1)
    assert bool((found >= best - 1e-6).all())
    assert float(found.sum() / best.sum()) < 1.03
    assert bool(
        (
            found
            <= squared_errors(
                latents, search(latents, codebook, LatticeCode(11, 2, denominator)), codebook
            )
            + 1e-2
        ).all()
    )


@pytest.mark.parametrize(
    ("num_codes", "max_support", "denominator", "count"),
    [(11, 1, 4, 5), (11, 2, 4, 1), (11, 2, 16, 70), (2, 2, 2, 4), (40, 3, 8, 9), (40, 4, 8, 6)],
)
def test_torch_and_native_searches_find_the_same_states(
    num_codes: int, max_support: int, denominator: int, count: int
) -> None:
    generator = torch.Generator().manual_seed(9)
    codebook = torch.randn(num_codes, 6, generator=generator)
    latents = torch.randn(30, 6, generator=generator) * 0.6
    effort = LatticeEffort(count=count, exact=True)
    code = LatticeCode(num_codes, max_support, denominator)
    found = lattice.LatticeSearch(codebook, code)._states(latents, effort)
    twin = lattice_torch.search_states(latents, codebook, max_support, denominator, effort)
    assert torch.equal(found.indices, twin.indices)
    assert torch.equal(found.numerators, twin.numerators)
    torch.testing.assert_close(found.errors, twin.errors, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_prepared_codebook_gives_the_same_states(dtype: torch.dtype) -> None:
    latents, codebook = random_problem(dtype)
    code = LatticeCode(11, 2, 4)
    prepared = lattice.LatticeSearch(codebook, code, prepared=True)
    expected = search(latents, codebook, code)
    assert torch.equal(prepared.search(latents).indices, expected.indices)
    assert torch.equal(prepared.search(latents).numerators, expected.numerators)
    several = search_candidates(latents, codebook, code, 3, expected)
    found = prepared.candidates(latents, 3, expected)
    assert torch.equal(found.errors, several.errors)
    assert torch.equal(found.indices, several.indices)


def test_without_native_kernels_the_search_runs_on_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    latents, codebook = random_problem(torch.float32)
    code = LatticeCode(11, 3, 4)
    expected = search_candidates(latents, codebook, code, 3)
    monkeypatch.setattr(lattice, "_has_native", lambda: False)
    found = search_candidates(latents, codebook, code, 3)
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.numerators, expected.numerators)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_candidates_are_the_best_distinct_states(dtype: torch.dtype) -> None:
    latents, codebook = random_problem(dtype)
    code = LatticeCode(11, 2, 4)
    found = search_candidates(latents, codebook, code, 12)
    everything = torch.cdist(latents, all_points(codebook, code)).square()
    expected = everything.topk(12, dim=1, largest=False).values
    torch.testing.assert_close(found.errors, expected, rtol=1e-4, atol=1e-5)
    assert_states_are_distinct(found)
    assert torch.equal(found.best.indices, search(latents, codebook, code).indices)


def assert_states_are_distinct(found: Candidates) -> None:
    rows = torch.cat((found.indices, found.numerators), dim=2)
    for latent in rows.tolist():
        assert len({tuple(state) for state in latent}) == len(latent)


def test_candidates_beyond_the_number_of_states_are_infinitely_bad() -> None:
    found = search_candidates(torch.zeros(2, 3), torch.eye(3)[:2], LatticeCode(2, 2, 2), 5)
    assert torch.isinf(found.errors).tolist() == [[False] * 3 + [True] * 2] * 2
    assert torch.equal(found.indices[:, 3:], found.indices[:, :1].expand(-1, 2, -1))


def test_half_precision_is_searched_in_single() -> None:
    latents, codebook = random_problem()
    code = LatticeCode(11)
    half = search(latents.half(), codebook.half(), code)
    single = search(latents.half().float(), codebook.half().float(), code)
    assert torch.equal(half.indices, single.indices)
    assert half.indices.dtype == torch.int64


@pytest.mark.gpu
@pytest.mark.parametrize(("max_support", "count"), [(2, 1), (2, 8), (4, 4)])
def test_cuda_finds_what_the_cpu_finds(max_support: int, count: int) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    generator = torch.Generator().manual_seed(9)
    codebook = torch.randn(64, 8, generator=generator)
    latents = torch.randn(200, 8, generator=generator) * 0.6
    code = LatticeCode(64, max_support, 8)
    here = search_candidates(latents, codebook, code, count)
    there = search_candidates(latents.cuda(), codebook.cuda(), code, count)
    same = (here.indices == there.indices.cpu()).all(dim=2)
    assert float(same.double().mean()) > 0.99
