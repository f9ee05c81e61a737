"""A KV cache of slots, one sequence each: reserved once, written in place, read without copies.

Sequences of different lengths share a step: every new token has its own position, and a mask hides
what lies behind the shorter sequences. Knows no weights and no requests.

Shapes: b sequences of a step, t new tokens of each, T positions up to the end of the longest.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vqllm.decoder.attention import mix
from vqllm.decoder.config import DecoderConfig
from vqllm.errors import OverBudget

# Slots and heads begin at whole cache lines, so that no sum depends on which slot it reads.
_ALIGNMENT = 64


class KvSlots:
    """Keys and values of every block for `num_slots` sequences of up to `num_positions` tokens.

    Memory is reserved at once: on a GPU it is taken, in main memory the system hands it out as
    sequences grow. Not thread-safe.

    Attributes:
        lengths: tokens in each slot that is taken.
    """

    def __init__(
        self,
        config: DecoderConfig,
        num_slots: int,
        num_positions: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """
        Raises:
            OverBudget: the device has not so much memory; names what is needed and what to lower.
        """
        self.num_slots, self.num_positions = num_slots, num_positions
        self.lengths: dict[int, int] = {}
        self._num_clean: dict[int, int] = {}
        num_kv_heads, *widths = _sizes(config)
        self.query_groups = config.num_heads // num_kv_heads if config.mla is None else 1
        capacity = -(-num_positions // _ALIGNMENT) * _ALIGNMENT
        shape = (config.num_layers, num_slots, num_kv_heads, capacity)
        self.num_bytes = torch.Size(shape).numel() * sum(widths) * dtype.itemsize
        try:
            self.keys, self.values = (
                torch.empty(*shape, width, device=device, dtype=dtype) for width in widths
            )
        except RuntimeError as error:  # a GPU's OutOfMemoryError is one; on a CPU it has no class
            raise OverBudget(
                f"a KV cache of {num_slots} sequences of {num_positions} tokens takes "
                f"{self.num_bytes / 2**30:.1f} GiB, more than {device} has free; lower "
                "max_num_sequences or context_length"
            ) from error

    def allocate(self) -> int:
        """Take the lowest free slot, empty.

        Raises:
            RuntimeError: all slots are taken.
        """
        free = (slot for slot in range(self.num_slots) if slot not in self.lengths)
        slot = next(free, None)
        if slot is None:
            raise RuntimeError(f"all {self.num_slots} KV caches are taken")
        self.lengths[slot] = self._num_clean[slot] = 0
        return slot

    def free(self, slot: int) -> None:
        """Give a slot back; KeyError where it is not taken."""
        del self.lengths[slot], self._num_clean[slot]

    def extend(self, slots: Sequence[int], num_tokens: int) -> SlotStep:
        """Make room for `num_tokens` more tokens in each of some slots, which are all different.

        A step reads the cache in place where its slots are consecutive and ascending, and a copy
        of their rows otherwise.

        Raises:
            RuntimeError: a sequence would grow beyond `num_positions`.
        """
        starts = [self.lengths[slot] for slot in slots]
        stop = max(starts) + num_tokens
        if stop > self.num_positions:
            raise RuntimeError(f"a KV cache holds {self.num_positions} tokens, not {stop}")
        if len(slots) > 1:
            self._clean(slots, stop)
        for slot in slots:
            self.lengths[slot] += num_tokens
        return SlotStep(self, slots, starts, num_tokens)

    def _clean(self, slots: Sequence[int], stop: int) -> None:
        """Zero what lies behind shorter sequences: a weight of 0 would not hide an infinity."""
        stop = -(-stop // _ALIGNMENT) * _ALIGNMENT
        for slot in slots:
            start = max(self._num_clean[slot], self.lengths[slot])
            if start < stop:
                self.keys[:, slot, :, start:stop] = 0
                self.values[:, slot, :, start:stop] = 0
                self._num_clean[slot] = stop


class SlotStep:
    """New tokens of some sequences, for which their slots have room.

    Attributes:
        positions: where the new tokens stand in their sequences, (b, t) int64.
        stop: T.
    """

    def __init__(
        self, storage: KvSlots, slots: Sequence[int], starts: Sequence[int], num_tokens: int
    ) -> None:
        device = storage.keys.device
        self.storage = storage
        self.slots = torch.tensor(slots, device=device)
        self.rows = _rows(slots, self.slots)
        self.stop = max(starts) + num_tokens
        first = torch.tensor(starts, device=device)[:, None]
        self.positions = first + torch.arange(num_tokens, device=device)
        # Then no mask is needed, as long as there is no window.
        self._is_plain = min(starts) == max(starts) and (num_tokens == 1 or max(starts) == 0)
        self._masks: dict[int | None, Tensor | None] = {}

    def cache(self, layer: int) -> BlockSlots:
        """The slots of one block."""
        return BlockSlots(self, self.storage.keys[layer], self.storage.values[layer])

    def mask(self, window: int | None) -> Tensor | None:
        """Where queries may look, (b, 1, query groups * t, T) bool; None as in `mix`."""
        if window is not None and window >= self.stop:
            window = None
        if window not in self._masks:
            is_plain = self._is_plain and window is None
            self._masks[window] = None if is_plain else self._mask(window)
        return self._masks[window]

    def _mask(self, window: int | None) -> Tensor:
        own = self.positions[:, None, :, None]
        others = torch.arange(self.stop, device=own.device)
        seen = others <= own
        if window is not None:
            seen &= others > own - window
        return seen.repeat(1, 1, self.storage.query_groups, 1)


class BlockSlots:
    """One block's `KvCache` in a step; keys and values (slots, heads, positions, width)."""

    def __init__(self, step: SlotStep, keys: Tensor, values: Tensor) -> None:
        self._step, self._keys, self._values = step, keys, values

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return self._append(self._keys, keys), self._append(self._values, values)

    def mix(
        self, queries: Tensor, keys: Tensor, values: Tensor, scale: float, window: int | None
    ) -> Tensor:
        mask, asked = self._step.mask(window), queries.to(keys.dtype)
        if mask is None:
            return mix(asked, keys, values, scale, None).to(queries.dtype)
        # Heads of one group become more queries of one head: the fast kernels for masks do not
        # know groups.
        grouped = asked.reshape(len(keys), keys.shape[1], -1, keys.shape[3])
        context = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scale)
        context = context.reshape(*queries.shape[:3], -1)
        return context.transpose(1, 2).flatten(2).to(queries.dtype)

    def _append(self, slots: Tensor, new: Tensor) -> Tensor:
        step = self._step
        slots[step.slots[:, None], :, step.positions] = new.transpose(1, 2).to(slots.dtype)
        return slots[step.rows, :, : step.stop]


def _sizes(config: DecoderConfig) -> tuple[int, int, int]:
    """Heads in the cache, and the widths of their keys and values."""
    if config.mla is None:
        return config.num_kv_heads, config.head_dim, config.head_dim
    return 1, config.mla.kv_rank, config.mla.rope_dim


def _rows(slots: Sequence[int], index: Tensor) -> slice | Tensor:
    """What selects slots: without a copy where they stand side by side."""
    is_run = all(slot == slots[0] + place for place, slot in enumerate(slots))
    return slice(slots[0], slots[0] + len(slots)) if is_run else index
