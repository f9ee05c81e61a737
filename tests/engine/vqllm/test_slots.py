"""The slots of the KV cache: who may read what, room, memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from support.tiny_models import CONFIGS
from vqllm.decoder.slots import KvSlots, SlotStep
from vqllm.errors import OverBudget
from vqllm.model_config import parse_config

LLAMA = parse_config(CONFIGS["llama"])
LATENT = parse_config(CONFIGS["deepseek-v3"])


def seen(step: SlotStep, window: int | None = None) -> list[list[int]]:
    """Positions that each row of a mask may look at, for one query group."""
    mask = step.mask(window)
    assert mask is not None
    rows = mask[:, 0, : step.positions.shape[1]].flatten(0, 1)
    return [row.nonzero().flatten().tolist() for row in rows]


def filled(*lengths: int) -> KvSlots:
    slots = KvSlots(LLAMA, 4, 20)
    for length in lengths:
        slots.extend([slots.allocate()], length)
    return slots


def test_every_sequence_sees_its_own_past() -> None:
    step = filled(2, 0, 4).extend([0, 1, 2], 1)
    assert step.positions.tolist() == [[2], [0], [4]]
    assert seen(step) == [[0, 1, 2], [0], [0, 1, 2, 3, 4]]
    assert seen(step, 2) == [[1, 2], [0], [3, 4]]


def test_a_chunk_sees_the_past_and_its_own_beginning() -> None:
    step = filled(2).extend([0], 3)
    assert step.positions.tolist() == [[2, 3, 4]]
    assert seen(step) == [[0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4]]
    assert seen(step, 2) == [[1, 2], [2, 3], [3, 4]]


def test_a_mask_has_a_row_for_every_query_of_a_group() -> None:
    mask = filled(2).extend([0], 3).mask(None)
    assert mask is not None
    assert mask.shape == (1, 1, 2 * 3, 5)
    assert torch.equal(mask[:, :, :3], mask[:, :, 3:])


@pytest.mark.parametrize(("lengths", "num_new"), [((3, 3), 1), ((0,), 4), ((5,), 1)])
def test_no_mask_where_all_is_seen(lengths: tuple[int, ...], num_new: int) -> None:
    step = filled(*lengths).extend(range(len(lengths)), num_new)
    assert step.mask(None) is None
    assert step.mask(64) is None
    assert step.mask(2) is not None


def appended(step: SlotStep, values: Tensor) -> Tensor:
    shape = (*step.positions.shape, LLAMA.num_kv_heads, LLAMA.head_dim)
    new = values[..., None, None].expand(shape).transpose(1, 2)
    return step.cache(1).append(new, -new)[0]


@pytest.mark.parametrize(("rows", "is_copy"), [((0, 1), False), ((2, 0), True)])
def test_neighbours_are_read_in_place(rows: tuple[int, ...], is_copy: bool) -> None:
    slots = filled(1, 1, 1)
    found = appended(slots.extend(rows, 1), torch.tensor([[7.0], [8.0]]))
    assert found[:, 0, 1, 0].tolist() == [7.0, 8.0]
    assert slots.keys[1, list(rows), 0, 1, 0].tolist() == [7.0, 8.0]
    assert slots.values[1, list(rows), 0, 1, 0].tolist() == [-7.0, -8.0]
    own = slots.keys.untyped_storage().data_ptr()
    assert (found.untyped_storage().data_ptr() != own) is is_copy


def test_what_an_earlier_sequence_left_is_zero_for_the_next_ones_mates() -> None:
    slots = filled(0, 12)
    slots.keys[:, 0] = slots.values[:, 0] = torch.nan
    slots.extend([0], 5)
    slots.keys[:, 0, :, :5] = slots.values[:, 0, :, :5] = 3.0
    for step in range(4):
        slots.extend([0, 1], 1)
        slots.keys[:, 0, :, 5 + step] = slots.values[:, 0, :, 5 + step] = 3.0
        for tensor in (slots.keys, slots.values):
            own = tensor[:, 0, :, : slots.lengths[1]]
            assert (own[:, :, : 6 + step] == 3).all()
            assert (own[:, :, 6 + step :] == 0).all()


def test_slots_are_used_again_lowest_first() -> None:
    slots = filled(1, 2, 3, 4)
    with pytest.raises(RuntimeError, match="all 4 KV caches are taken"):
        slots.allocate()
    slots.free(2)
    slots.free(1)
    assert slots.allocate() == 1
    assert slots.lengths == {0: 1, 1: 0, 3: 4}
    with pytest.raises(KeyError):
        slots.free(2)


def test_a_sequence_beyond_the_reserved_positions_is_our_own_mistake() -> None:
    slots = filled(19)
    slots.extend([0], 1)
    with pytest.raises(RuntimeError, match="holds 20 tokens, not 21"):
        slots.extend([0], 1)


def test_the_memory_is_that_of_the_heads_or_of_the_latents() -> None:
    assert KvSlots(LLAMA, 3, 100, dtype=torch.float16).num_bytes == 2 * 3 * 128 * 2 * (12 + 12) * 2
    assert KvSlots(LATENT, 3, 100).num_bytes == 3 * 3 * 128 * (16 + 4) * 4


def test_too_little_memory_names_the_need_and_the_remedy() -> None:
    with pytest.raises(OverBudget, match=r"4 sequences of 2\d+ tokens takes \d+\.\d GiB") as error:
        KvSlots(LLAMA, 4, 2 * 10**12)
    assert "lower max_num_sequences or context_length" in str(error.value)
