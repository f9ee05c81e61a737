"""The reference executor: plain torch on dequantized weights. Slow and easy to trust."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vqllm.checkpoint import FINAL_NORM, Checkpoint
from vqllm.decoder.attention import KvCache
from vqllm.decoder.block import forward_block
from vqllm.decoder.norm import rms_norm
from vqllm.decoder.rope import RotaryTable
from vqllm.decoder.weights import BlockWeights, load_block, product
from vqllm.outlier.transform import rotation
from vqllm.runtime.executors.base import Executor, Logits


class TorchExecutor(Executor):
    """Runs `vqllm.decoder` block by block: every family and every transform there is."""

    name = "torch"

    def __init__(
        self,
        checkpoint: Checkpoint,
        context_length: int,
        max_num_sequences: int = 8,
        num_threads: int = 0,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """`num_threads` sets torch's process-wide thread count; 0 leaves it.

        `dtype` is that of the linears' weights and products; all else stays float32.

        Raises:
            CorruptCheckpoint: a tensor is missing, misshapen or not finite.
        """
        if num_threads > 0:
            torch.set_num_threads(num_threads)
        self._config, self._device, self._dtype = checkpoint.config, device, dtype
        self._transform = checkpoint.transform
        self.vocab_size = checkpoint.config.vocab_size
        self.context_length = context_length
        self.max_num_sequences = max_num_sequences
        self._embedding = torch.from_numpy(checkpoint.embedding()).to(device)
        self._head = self._load_head(checkpoint)
        self._final_norm = torch.from_numpy(checkpoint.norm(FINAL_NORM)).to(device)
        layers = range(checkpoint.config.num_layers)
        self._blocks = [self._prepared(checkpoint, layer) for layer in layers]
        self._rotary = RotaryTable.build(checkpoint.config, context_length, device)
        self._caches: dict[int, list[KvCache]] = {}
        self._next_cache = 0

    def _load_head(self, checkpoint: Checkpoint) -> Tensor:
        if checkpoint.config.tie_word_embeddings:
            return self._embedding.to(self._dtype)
        return torch.from_numpy(checkpoint.head()).to(self._device, self._dtype)

    def _prepared(self, checkpoint: Checkpoint, layer: int) -> BlockWeights:
        weights = self._load_block(checkpoint, layer)
        weights.down_seed = self._transform.down_seed
        weights.to(self._device, self._dtype)
        return weights

    def _load_block(self, checkpoint: Checkpoint, layer: int) -> BlockWeights:
        return load_block(checkpoint, layer)

    @property
    def providers(self) -> tuple[str, ...]:
        return (f"torch {torch.__version__} {self._device}",)

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
        logits: Logits = self.score_windows(np.array([token_ids], np.int64))[0]
        return logits

    def score_windows(self, windows: NDArray[np.int64]) -> Logits:
        """Logits (b, t, vocab_size) float32 after every token of texts (b, t), in one pass."""
        caches = [KvCache() for _ in self._blocks]
        return self._logits(self._run(torch.from_numpy(windows), caches))

    def _append(self, cache: int, token_ids: Sequence[int]) -> Tensor:
        """Hidden states (t, d) of new tokens, before the final norm."""
        return self._run(torch.tensor([token_ids]), self._caches[cache])[0]

    @torch.inference_mode()
    def _run(self, token_ids: Tensor, caches: list[KvCache]) -> Tensor:
        """Hidden states (b, t, d) of new tokens (b, t), before the final norm."""
        hidden = self._embedding[token_ids.to(self._device)]
        if self._transform.residual_seed is not None:
            hidden = rotation(hidden.shape[-1], self._transform.residual_seed).apply(hidden)
        for block, cache in zip(self._blocks, caches, strict=True):
            hidden = forward_block(hidden, block, self._config, self._rotary, cache)
        return hidden

    @torch.inference_mode()
    def _logits(self, hidden: Tensor) -> Logits:
        if self._transform.residual_seed is not None:
            hidden = rotation(hidden.shape[-1], self._transform.residual_seed).invert(hidden)
        normed = rms_norm(hidden, self._final_norm, self._config.rms_norm_eps)
        return np.asarray(product(normed, self._head).cpu().numpy(), dtype=np.float32)
