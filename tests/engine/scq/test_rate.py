"""Laws of the rate-aware choice: what it weighs, and that frames really get shorter."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from scq.bitstream import CodedGrid, EntropyTables, KeyHeader, fit_tables, pack_delta, pack_key
from scq.errors import InvalidLatents, ScqError
from scq.lattice import (
    Candidates,
    LatticeAssignment,
    LatticeCode,
    reconstruct,
    search,
    search_candidates,
)
from scq.rate import Problem, choose, settle

GRID = (6, 7)
HEADER = KeyHeader(96, 112, b"1234")


@dataclasses.dataclass(frozen=True)
class World:
    """Smooth latents on a grid, a codebook, and tables fitted on such grids."""

    code: LatticeCode
    codebook: torch.Tensor
    latents: torch.Tensor
    tables: EntropyTables


def make_world(max_support: int, denominator: int) -> World:
    generator = torch.Generator().manual_seed(4)
    code = LatticeCode(24, max_support, denominator)
    codebook = torch.randn(24, 5, generator=generator)
    walks = torch.randn(6, *GRID, 5, generator=generator).cumsum(1).cumsum(2) * 0.15
    frames = [walk.reshape(-1, 5).contiguous() for walk in walks]
    grids = [CodedGrid(search(frame, codebook, code), GRID) for frame in frames]
    return World(code, codebook, frames[-1], fit_tables(grids[:5], code, videos=[grids[:5]]))


WORLDS = {(s, n): make_world(s, n) for s, n in [(1, 1), (2, 4), (3, 8)]}


@pytest.fixture(params=WORLDS.values(), ids=[str(name) for name in WORLDS])
def world(request: pytest.FixtureRequest) -> World:
    found = request.param
    assert isinstance(found, World)
    return found


def error(world: World, assignment: LatticeAssignment) -> float:
    return float((reconstruct(assignment, world.codebook) - world.latents).square().sum())


def key_bytes(world: World, assignment: LatticeAssignment) -> int:
    frame = pack_key(HEADER, assignment, world.code, GRID, tables=world.tables, entropy="rans")
    return len(frame)


def test_without_weight_on_rate_the_nearest_state_wins(world: World) -> None:
    candidates = search_candidates(world.latents, world.codebook, world.code, 8)
    chosen = choose(candidates, GRID, world.tables, 0.0)
    assert error(world, chosen) == pytest.approx(error(world, candidates.best), rel=1e-5)


def test_weight_on_rate_trades_error_for_bytes(world: World) -> None:
    candidates = search_candidates(world.latents, world.codebook, world.code, 24)
    chosen = [choose(candidates, GRID, world.tables, weight) for weight in (0.0, 0.02, 0.5)]
    sizes = [key_bytes(world, assignment) for assignment in chosen]
    errors = [error(world, assignment) for assignment in chosen]
    assert sizes[0] > sizes[1] > sizes[2]
    assert errors[0] < errors[1] < errors[2]


@pytest.mark.parametrize("tile", [None, 3])
def test_the_choice_lowers_the_true_cost_of_a_key_frame(world: World, tile: int | None) -> None:
    candidates = search_candidates(world.latents, world.codebook, world.code, 24)
    weight = 0.05

    def cost(assignment: LatticeAssignment) -> float:
        frame = pack_key(
            HEADER,
            assignment,
            world.code,
            GRID,
            tables=world.tables,
            entropy="rans",
            tile=tile,
        )
        return error(world, assignment) + weight * 8 * len(frame)

    chosen = choose(candidates, GRID, world.tables, weight, tile=tile)
    assert cost(chosen) < cost(candidates.best)


def test_delta_frames_shrink_with_the_reference_in_mind(world: World) -> None:
    reference = search(world.latents + 0.05, world.codebook, world.code)
    candidates = search_candidates(world.latents, world.codebook, world.code, 12, reference)
    weight = 0.02
    plain = candidates.best
    chosen = choose(candidates, GRID, world.tables, weight, reference)

    def cost(assignment: LatticeAssignment) -> float:
        frame = pack_delta(
            b"1234",
            assignment,
            world.code,
            GRID,
            reference=reference,
            tables=world.tables,
        )
        return error(world, assignment) + weight * 8 * len(frame)

    assert cost(chosen) < cost(plain)
    same = (chosen.indices == reference.indices).all(dim=1)
    same &= (chosen.numerators == reference.numerators).all(dim=1)
    assert bool(same.any())


def test_an_enormous_weight_on_rate_skips_everything(world: World) -> None:
    reference = search(world.latents.flip(0), world.codebook, world.code)
    still = CodedGrid(reference, GRID)
    tables = fit_tables([still], world.code, videos=[[still] * 4])
    candidates = search_candidates(world.latents, world.codebook, world.code, 4, reference)
    chosen = choose(candidates, GRID, tables, 1e6, reference)
    assert torch.equal(chosen.indices, reference.indices)
    assert torch.equal(chosen.numerators, reference.numerators)


def test_reference_states_are_states_with_their_true_errors(world: World) -> None:
    reference = search(world.latents.flip(0), world.codebook, world.code)
    found = search_candidates(world.latents, world.codebook, world.code, 2, reference)
    assert torch.equal(found.indices[:, 2], reference.indices)
    assert torch.equal(found.numerators[:, 2], reference.numerators)
    for slot in range(found.errors.shape[1]):
        state = LatticeAssignment(found.indices[:, slot], found.numerators[:, slot])
        points = reconstruct(state, world.codebook)
        errors = (points - world.latents).square().sum(dim=1)
        finite = torch.isfinite(found.errors[:, slot])
        torch.testing.assert_close(found.errors[finite, slot], errors[finite], rtol=1e-4, atol=1e-5)
        assert bool((state.numerators.sum(dim=1) == world.code.denominator).all())


def test_a_second_pass_sees_the_neighbours_to_come() -> None:
    """Two latents; the first one's dearer form makes the second one's only form cheap."""
    problem = Problem(
        fixed=np.array([[0.0, 1.0], [0.0, np.inf]]),
        symbols=np.array([[0, 1], [0, 0]]),
        clusters=np.array([0, 1]),
        outside=2,
        prices=np.array([[9.0, 9.0]] * 3 + [[0.0, 0.0]] * 6),
    )
    assert settle(problem, (1, 2), 1).tolist() == [0, 0]
    assert settle(problem, (1, 2), 2).tolist() == [1, 0]


def test_bad_arguments_are_refused() -> None:
    world = WORLDS[2, 4]
    candidates = search_candidates(world.latents, world.codebook, world.code, 2)
    with pytest.raises(InvalidLatents, match="42 latents do not fill"):
        choose(candidates, (5, 5), world.tables, 0.1)
    with pytest.raises(ScqError, match="rate_weight is -1"):
        choose(candidates, GRID, world.tables, -1)
    with pytest.raises(ScqError, match="passes is 0"):
        choose(candidates, GRID, world.tables, 1, passes=0)
    short = search(world.latents[:3], world.codebook, world.code)
    with pytest.raises(InvalidLatents, match="the reference has 3"):
        choose(candidates, GRID, world.tables, 1, short)
    with pytest.raises(InvalidLatents, match="the reference is"):
        search_candidates(world.latents, world.codebook, world.code, 2, short)


def test_candidates_of_fewer_states_than_asked_for_are_never_chosen() -> None:
    world = WORLDS[1, 1]
    candidates = search_candidates(world.latents, world.codebook, world.code, 60)
    assert isinstance(candidates, Candidates)
    chosen = choose(candidates, GRID, world.tables, 1e3)
    assert bool((chosen.numerators == 1).all())
