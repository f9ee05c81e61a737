"""Bytes and true bits per weight of a folder, counted in the file and not taken from its labels.

Every tensor that lies under a linear's name counts: codes, scales, zero points, codebooks,
permutations. A bias does not, since the original model has it too.
"""

from __future__ import annotations

from dataclasses import dataclass

from vqllm.checkpoint import Checkpoint


@dataclass(frozen=True)
class Sizes:
    """What a folder weighs.

    Attributes:
        bpw: bits per weight of the decoder linears, all overhead counted.
        total_bpw: the same over every parameter of the model.
        embedding_bits: bits per weight of the embedding, which the head may share.
        file_bytes: of all weight files, headers included.
    """

    bpw: float
    total_bpw: float
    embedding_bits: float
    file_bytes: int


def measure_sizes(checkpoint: Checkpoint) -> Sizes:
    """Sizes of a folder on disk; reads headers only."""
    store, config = checkpoint.store, checkpoint.config
    linears = set(checkpoint.linear_names())
    linear_bytes = sum(store.num_bytes(name) for name in store.names if _is_part_of(name, linears))
    all_bytes = sum(map(store.num_bytes, store.names))
    return Sizes(
        bpw=8 * linear_bytes / config.num_linear_parameters,
        total_bpw=8 * all_bytes / config.num_parameters,
        embedding_bits=checkpoint.embedding_bpw(),
        file_bytes=sum(path.stat().st_size for path in store.files),
    )


def _is_part_of(name: str, linears: set[str]) -> bool:
    if name.endswith(".bias"):
        return False
    prefix = name
    while "." in prefix:
        prefix = prefix.rpartition(".")[0]
        if prefix in linears:
            return True
    return False
