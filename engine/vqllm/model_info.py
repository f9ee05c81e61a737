"""What a checkpoint is, in the few facts that logs, health pages and clients want."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelInfo:
    """Facts about one model folder.

    Attributes:
        name: folder or given name, for people.
        architecture: as in config.json, for example `LlamaForCausalLM`.
        method: `gptq`, `vptq`, `tcq`, several joined by `+`, or `none` for an unquantized folder.
        bits: nominal bits per quantized weight, 16 or 32 for an unquantized one.
        group_size: weights that share one scale, 0 for an unquantized folder.
        bpw: true bits per weight of the decoder's linear layers: codes, scales, zero points,
            codebooks, permutations and group indices, all bytes counted.
        total_bpw: the same over every parameter, embedding and norms included.
        revision: first 16 hexadecimal digits of the SHA-256 of the weights and config.json.
        context_length: positions the model was trained for.
        num_parameters: weights of the original model, a tied head counted once.
        format: `plain`, `gptq`, `vptq` or `vqstack`, as config.json names it.
        linear_bytes: bytes of the decoder's linear layers, the numerator of `bpw`.
        embedding_bpw: true bits per weight of the embedding.
        file_bytes: size of the weight files.
        is_rotated: whether a runner has to compute rotations, so that only vqstack can run it.
    """

    name: str
    architecture: str
    method: str
    bits: int
    group_size: int
    bpw: float
    total_bpw: float
    revision: str
    context_length: int
    num_parameters: int
    format: str = "plain"
    linear_bytes: int = 0
    embedding_bpw: float = 0.0
    file_bytes: int = 0
    is_rotated: bool = False
