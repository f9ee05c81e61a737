"""The reference executor: plain torch on dequantized weights. Slow and easy to trust."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vqllm.checkpoint import FINAL_NORM, Checkpoint
from vqllm.decoder.block import forward_block
from vqllm.decoder.norm import rms_norm
from vqllm.decoder.rope import RotaryTable
from vqllm.decoder.slots import KvSlots, SlotStep
from vqllm.decoder.weights import BlockWeights, load_block, product
from vqllm.outlier.transform import rotation
from vqllm.runtime.executors.base import Executor, Logits


class TorchExecutor(Executor):
    """Runs `vqllm.decoder` block by block: every family and every transform there is.

    Attributes:
        batches_decode: whether `decode` runs all sequences in one forward pass. A library may sum
            differently for another number of rows, so without it (the default) no bit of a
            sequence's logits depends on the others.
    """

    name = "torch"
    batches_decode = False

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

        `dtype` is that of the linears' weights and products and of the KV cache; all else stays
        float32.

        Raises:
            OverBudget: the KV cache does not fit the device.
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
        self._slots = KvSlots(checkpoint.config, max_num_sequences, context_length, device, dtype)

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
        return self._slots.allocate()

    def free(self, cache: int) -> None:
        self._slots.free(cache)

    def prefill(self, cache: int, token_ids: Sequence[int]) -> Logits:
        logits: Logits = self._logits(self._append([cache], [token_ids])[0, -1:])[0]
        return logits

    def decode(self, caches: Sequence[int], token_ids: Sequence[int]) -> Logits:
        if self.batches_decode:
            return self._decode_together(caches, token_ids)
        rows = [self.prefill(c, [t]) for c, t in zip(caches, token_ids, strict=True)]
        return np.stack(rows)

    def score(self, token_ids: Sequence[int]) -> Logits:
        logits: Logits = self.score_windows(np.array([token_ids], np.int64))[0]
        return logits

    def score_windows(self, windows: NDArray[np.int64]) -> Logits:
        """Logits (b, t, vocab_size) float32 after every token of texts (b, t), in one pass."""
        return self._logits(self._run(torch.from_numpy(windows)))

    def _decode_together(self, caches: Sequence[int], token_ids: Sequence[int]) -> Logits:
        ordered = sorted(zip(caches, token_ids, strict=True))  # neighbours are read in place
        hidden = self._append([cache for cache, _ in ordered], [[token] for _, token in ordered])
        logits = np.empty((len(caches), self.vocab_size), np.float32)
        logits[np.argsort(caches)] = self._logits(hidden[:, 0])
        return logits

    def _append(self, caches: Sequence[int], token_ids: Sequence[Sequence[int]]) -> Tensor:
        """Hidden states (b, t, d) of t new tokens of each cache, before the final norm."""
        tokens = torch.tensor(token_ids)
        return self._run(tokens, self._slots.extend(caches, tokens.shape[1]))

    @torch.inference_mode()
    def _run(self, token_ids: Tensor, step: SlotStep | None = None) -> Tensor:
        """Hidden states (b, t, d) of tokens (b, t), before the final norm.

        The tokens are those of a step, or whole texts.
        """
        rotary = self._rotary if step is None else self._rotary.at(step.positions)
        hidden = self._embedding[token_ids.to(self._device)]
        if self._transform.residual_seed is not None:
            hidden = rotation(hidden.shape[-1], self._transform.residual_seed).apply(hidden)
        for layer, block in enumerate(self._blocks):
            cache = None if step is None else step.cache(layer)
            hidden = forward_block(hidden, block, self._config, rotary, cache)
        return hidden

    @torch.inference_mode()
    def _logits(self, hidden: Tensor) -> Logits:
        if self._transform.residual_seed is not None:
            hidden = rotation(hidden.shape[-1], self._transform.residual_seed).invert(hidden)
        normed = rms_norm(hidden, self._final_norm, self._config.rms_norm_eps)
        return np.asarray(product(normed, self._head).cpu().numpy(), dtype=np.float32)
