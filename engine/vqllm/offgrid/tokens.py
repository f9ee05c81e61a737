"""A byte-level BPE tokenizer for the off-grid model, trained on its own text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from vqllm.checkpoint import write_json

END = "<|endoftext|>"


def train_tokenizer(text: str, vocab_size: int) -> Tokenizer:
    """BPE over bytes with one special token, `END`, as id 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.split("\n"), trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, text: str) -> NDArray[np.int64]:
    """Token ids of a whole text."""
    return np.array(tokenizer.encode(text).ids, dtype=np.int64)


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """tokenizer.json and the two fields that loaders want beside it."""
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"eos_token": END, "bos_token": END})
