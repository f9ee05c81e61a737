"""A full-precision model's predictions on fixed windows, computed once for many comparisons.

Logits of a text are too large to keep; the hidden states behind the last block are not, and the
head turns them back into logits. One block of weights is in memory at a time while they are
computed. Knows no executor.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from vqllm.decoder.block import forward_block
from vqllm.decoder.rope import RotaryTable
from vqllm.evaluation.windows import Windows
from vqllm.sources import WeightSource

BATCH_WINDOWS = 4


class StoredReference:
    """Scores the windows it was made for, and no others."""

    def __init__(self, source: WeightSource, windows: Windows, cache: Path | None = None) -> None:
        """Run `windows` (n, t) through the source; keeps n * t * hidden_size float32 numbers.

        `cache` is a .npy file of an earlier run of the same source and windows, or where to put
        one; the caller names it after both.
        """
        self._source = source
        self._index = {window.tobytes(): i for i, window in enumerate(windows)}
        self._hidden = _cached(source, windows, cache) if cache else _run(source, windows)

    @torch.inference_mode()
    def score(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits (t, vocab_size) of one of the windows.

        Raises:
            KeyError: another text.
        """
        index = self._index[np.array(token_ids, dtype=np.int64).tobytes()]
        return np.asarray(self._source.logits(self._hidden[index]).numpy(), dtype=np.float32)


def _cached(source: WeightSource, windows: Windows, cache: Path) -> torch.Tensor:
    if cache.is_file():
        return torch.from_numpy(np.load(cache, allow_pickle=False))
    hidden = _run(source, windows)
    scratch = cache.with_suffix(".partial")
    with scratch.open("wb") as file:
        np.save(file, hidden.numpy(), allow_pickle=False)
    scratch.rename(cache)
    return hidden


@torch.inference_mode()
def _run(source: WeightSource, windows: Windows) -> torch.Tensor:
    hidden = source.embed(torch.from_numpy(np.ascontiguousarray(windows))).clone()
    rotary = RotaryTable.build(source.config, windows.shape[1])
    for layer in range(source.config.num_layers):
        block = source.block(layer)
        for start in range(0, len(windows), BATCH_WINDOWS):
            batch = hidden[start : start + BATCH_WINDOWS]
            hidden[start : start + BATCH_WINDOWS] = forward_block(
                batch, block, source.config, rotary
            )
    return hidden
