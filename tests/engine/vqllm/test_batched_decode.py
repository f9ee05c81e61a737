"""Decoding a batch in one forward pass against decoding its members one by one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from support.tiny_models import CONFIGS, VOCAB_SIZE, write_tiny_model
from vqllm.checkpoint import Checkpoint
from vqllm.runtime.engine import Engine, EngineConfig
from vqllm.runtime.executors.base import Logits
from vqllm.runtime.executors.cuda import CudaExecutor
from vqllm.runtime.executors.torch import TorchExecutor
from vqllm.runtime.sampling import SamplingParams

LENGTH = 48
TOKENS = np.random.default_rng(11).integers(0, VOCAB_SIZE, LENGTH).tolist()
TOLERANCE = 2e-5


class BatchedExecutor(TorchExecutor):
    """What the CUDA executor does, in torch alone; notes how many sequences a step had."""

    name = "batched"
    batches_decode = True

    def __init__(
        self,
        checkpoint: Checkpoint,
        max_num_sequences: int,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(checkpoint, LENGTH, max_num_sequences, device=device, dtype=dtype)
        self.batches: list[int] = []

    def decode(self, caches: Sequence[int], token_ids: Sequence[int]) -> Logits:
        self.batches.append(len(caches))
        return super().decode(caches, token_ids)


class Pair:
    """The same sequences in a batching executor and in one that goes one by one."""

    def __init__(self, checkpoint: Checkpoint, max_num_sequences: int = 4) -> None:
        self.batched = BatchedExecutor(checkpoint, max_num_sequences)
        self.single = TorchExecutor(checkpoint, LENGTH, max_num_sequences)
        self.lengths: dict[int, int] = {}

    def begin(self, offset: int, *chunks: int) -> int:
        """A new sequence of `TOKENS` from an offset on, in chunks of the given sizes."""
        cache = self.batched.allocate()
        assert self.single.allocate() == cache
        self.lengths[cache] = offset
        for size in chunks:
            tokens = TOKENS[self.lengths[cache] :][:size]
            found = self.batched.prefill(cache, tokens)
            np.testing.assert_array_equal(found, self.single.prefill(cache, tokens))
            self.lengths[cache] += size
        return cache

    def end(self, cache: int) -> None:
        self.batched.free(cache)
        self.single.free(cache)

    def decode(self, *caches: int) -> None:
        """One token more for some sequences, in the given order."""
        tokens = [TOKENS[self.lengths[cache]] for cache in caches]
        found, expected = (e.decode(caches, tokens) for e in (self.batched, self.single))
        np.testing.assert_allclose(found, expected, atol=TOLERANCE)
        for cache in caches:
            self.lengths[cache] += 1


@pytest.mark.parametrize("family", CONFIGS)
def test_a_batch_gives_each_sequence_its_own_logits(tmp_path: Path, family: str) -> None:
    pair = Pair(Checkpoint(write_tiny_model(tmp_path, family)))
    long, short, middle = pair.begin(0, 12, 9), pair.begin(7, 1), pair.begin(3, 4)
    for _ in range(6):  # through the sliding windows of 7 positions
        pair.decode(long, short, middle)
    pair.decode(middle, long)  # not in the order of the slots, and one of them waits
    pair.decode(short)
    # A newcomer takes the place of the longest sequence, and sees nothing of it.
    pair.end(long)
    newcomer = pair.begin(20, 2)
    assert newcomer == long
    last = pair.begin(1, 8)
    for _ in range(3):
        pair.decode(newcomer, short, middle, last)
    pair.decode(last, newcomer)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("family", ["llama-biases", "mistral", "qwen2", "deepseek-v2"])
def test_half_precision_stays_close(tmp_path: Path, family: str, device: str) -> None:
    # Without experts, where the family has them: a rounded score may choose others.
    checkpoint = Checkpoint(write_tiny_model(tmp_path, family, first_k_dense_replace=9))
    single = TorchExecutor(checkpoint, LENGTH, 3)
    half = BatchedExecutor(checkpoint, 3, device, torch.float16)
    assert half._slots.num_bytes == single._slots.num_bytes // 2

    def run(executor: TorchExecutor) -> Logits:
        caches = [executor.allocate() for _ in range(3)]
        rows: list[Logits] = []
        for cache, size in zip(caches, (12, 3, 9), strict=True):
            executor.prefill(cache, TOKENS[:size])
            rows.append(executor.prefill(cache, TOKENS[size : size + 4]))
        for step in range(5):
            rows += list(executor.decode(caches, TOKENS[step : step + 3]))
        return np.stack(rows)

    expected = run(single)
    np.testing.assert_allclose(run(half), expected, atol=0.02 * np.abs(expected).max())


def test_infinite_activations_stay_in_their_own_sequence(tmp_path: Path) -> None:
    checkpoint = Checkpoint(write_tiny_model(tmp_path, "llama"))
    pair = Pair(checkpoint, 2)
    spoilt, healthy = pair.begin(0, 9), pair.begin(5, 7)
    for tensor in (pair.batched._slots.keys, pair.batched._slots.values):
        tensor[:, spoilt] = torch.inf
    found = pair.batched.decode([spoilt, healthy], [1, 2])
    expected = pair.single.decode([spoilt, healthy], [1, 2])
    np.testing.assert_allclose(found[1], expected[1], atol=TOLERANCE)
    pair.end(spoilt)
    pair.lengths[healthy] += 1
    newcomer = pair.begin(2, 3)
    assert newcomer == spoilt
    pair.decode(newcomer, healthy)


@pytest.mark.parametrize("family", ["llama", "mistral", "deepseek-v3"])
def test_one_by_one_a_batch_changes_no_bit_of_its_members_logits(
    tmp_path: Path, family: str
) -> None:
    executor = TorchExecutor(Checkpoint(write_tiny_model(tmp_path, family)), LENGTH, 4)

    def decode(num_before: int, num_after: int) -> Logits:
        count = num_before + 1 + num_after
        caches = [executor.allocate() for _ in range(count)]
        for place, cache in enumerate(caches):
            prompt = TOKENS[:10] if place == num_before else TOKENS[place : 15 + 3 * place]
            executor.prefill(cache, prompt)
        rows = [executor.decode(caches, [token] * count)[num_before] for token in TOKENS[10:15]]
        for cache in caches:
            executor.free(cache)
        return np.stack(rows)

    alone = decode(0, 0)
    for places in ((0, 1), (1, 0), (1, 2), (3, 0)):
        np.testing.assert_array_equal(decode(*places), alone)


def test_the_gpu_batches_and_the_reference_does_not() -> None:
    assert CudaExecutor.batches_decode
    assert not TorchExecutor.batches_decode


class Tokens:
    """Token i is one letter; nothing ends an answer but its length."""

    eos_token_ids: frozenset[int] = frozenset()
    vocab_size = VOCAB_SIZE

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([32 + token_id % 90])


def test_the_engine_decodes_its_sequences_together(tmp_path: Path) -> None:
    checkpoint = Checkpoint(write_tiny_model(tmp_path, "qwen2-window"))
    config = EngineConfig(max_num_sequences=3, max_tokens_per_step=8)
    prompts = [TOKENS[:5], TOKENS[3:17], TOKENS[9:10], TOKENS[20:41]]

    def answers(executor: TorchExecutor, places: Sequence[int]) -> list[list[int]]:
        engine = Engine(executor, Tokens(), config)
        greedy = [SamplingParams(temperature=0, max_tokens=5 + 3 * place) for place in places]
        sequences = [
            engine.add(str(place), prompts[place], params)
            for place, params in zip(places, greedy, strict=True)
        ]
        while engine.has_work:
            engine.step()
        return [sequence.output_token_ids for sequence in sequences]

    batched = BatchedExecutor(checkpoint, 3)
    together = answers(batched, range(4))
    assert max(batched.batches) == 3
    reference = TorchExecutor(checkpoint, LENGTH, 3)
    assert together == [answers(reference, [place])[0] for place in range(4)]
    assert batched._slots.lengths == reference._slots.lengths == {}
