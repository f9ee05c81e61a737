"""The reference executor: plain torch on dequantized float32 weights. Slow and easy to trust."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vqllm.checkpoint import FINAL_NORM, Checkpoint
from vqllm.llama import BlockWeights, KvCache, RotaryTable, forward_block, load_block, rms_norm
from vqllm.runtime.executors.base import Executor, Logits


class TorchExecutor(Executor):
    """Runs `vqllm.llama` block by block, one sequence at a time."""

    name = "torch"

    def __init__(
        self,
        checkpoint: Checkpoint,
        context_length: int,
        max_num_sequences: int = 8,
        num_threads: int = 0,
    ) -> None:
        """`num_threads` sets torch's process-wide thread count; 0 leaves it.

        Raises:
            CorruptCheckpoint: a tensor is missing, misshapen or not finite.
        """
        if num_threads > 0:
            torch.set_num_threads(num_threads)
        self._config = checkpoint.config
        self.vocab_size = checkpoint.config.vocab_size
        self.context_length = context_length
        self.max_num_sequences = max_num_sequences
        self._embedding = torch.from_numpy(checkpoint.embedding())
        self._head = (
            self._embedding
            if checkpoint.config.tie_word_embeddings
            else torch.from_numpy(checkpoint.head())
        )
        self._final_norm = torch.from_numpy(checkpoint.norm(FINAL_NORM))
        layers = range(checkpoint.config.num_layers)
        self._blocks = [self._load_block(checkpoint, layer) for layer in layers]
        self._rotary = RotaryTable.build(checkpoint.config, context_length)
        self._caches: dict[int, list[KvCache]] = {}
        self._next_cache = 0

    def _load_block(self, checkpoint: Checkpoint, layer: int) -> BlockWeights:
        return load_block(checkpoint, layer)

    @property
    def providers(self) -> tuple[str, ...]:
        return (f"torch {torch.__version__} cpu",)

    def allocate(self) -> int:
        if len(self._caches) == self.max_num_sequences:
            raise RuntimeError(f"all {self.max_num_sequences} KV caches are taken")
        cache, self._next_cache = self._next_cache, self._next_cache + 1
        self._caches[cache] = [KvCache() for _ in self._blocks]
        return cache

    def free(self, cache: int) -> None:
        del self._caches[cache]

    def prefill(self, cache: int, token_ids: Sequence[int]) -> Logits:
        logits: Logits = self._logits(self._append(cache, token_ids)[-1:])[0]
        return logits

    def decode(self, caches: Sequence[int], token_ids: Sequence[int]) -> Logits:
        hidden = [self._append(c, [t]) for c, t in zip(caches, token_ids, strict=True)]
        return self._logits(torch.cat(hidden))

    def score(self, token_ids: Sequence[int]) -> Logits:
        cache = self.allocate()
        logits = self._logits(self._append(cache, token_ids))
        self.free(cache)
        return logits

    @torch.inference_mode()
    def _append(self, cache: int, token_ids: Sequence[int]) -> Tensor:
        """Hidden states (t, d) of new tokens, before the final norm."""
        hidden = self._embedding[torch.tensor(token_ids)][None]
        for block, kv in zip(self._blocks, self._caches[cache], strict=True):
            hidden = forward_block(hidden, block, self._config, self._rotary, kv)
        return hidden[0]

    @torch.inference_mode()
    def _logits(self, hidden: Tensor) -> Logits:
        normed = rms_norm(hidden, self._final_norm, self._config.rms_norm_eps)
        return np.asarray(F.linear(normed, self._head).numpy(), dtype=np.float32)
