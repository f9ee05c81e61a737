"""A plain folder to a GGUF file, and a quantized GGUF file back to a plain folder.

Rows of the query and key projections change order on the way out and back: llama.cpp rotates
neighbouring pairs, Hugging Face halves (see `gguf_import.unpermute_rows`). Knows llama's tensor
names, no quantization.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, GGUFWriter, dequantize
from numpy.typing import NDArray

from vqllm.checkpoint import EMBEDDING, FINAL_NORM, HEAD, Checkpoint
from vqllm.errors import EvaluationError, UnsupportedModel
from vqllm.evaluation.peers.dense import DenseFolder
from vqllm.gguf_import import unpermute_rows

_LINEARS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
_CONTROL, _NORMAL = 3, 1


@dataclass(frozen=True)
class GgufLinears:
    """What a GGUF file holds of the decoder linears.

    Attributes:
        bpw: true bits per weight.
        types: number of linears by storage type, for example {"Q4_K": 30}.
    """

    bpw: float
    types: dict[str, int]


def export_gguf(folder: Path, path: Path) -> None:
    """Write a plain llama folder as a GGUF file of exact weights (float16 stays, else float32).

    Raises:
        UnsupportedModel: the folder is quantized, or is not of the llama architecture.
    """
    checkpoint = Checkpoint(folder)
    if checkpoint.quantization is not None:
        raise UnsupportedModel(f"{folder} is quantized already; export the original")
    if checkpoint.config.architecture != "LlamaForCausalLM":
        raise UnsupportedModel(f"{folder}: {checkpoint.config.architecture} has no GGUF export")
    writer = GGUFWriter(path, "llama")
    _add_shape(writer, checkpoint)
    _add_tokenizer(writer, folder)
    _add_tensors(writer, checkpoint)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_shape(writer: GGUFWriter, checkpoint: Checkpoint) -> None:
    config = checkpoint.config
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _add_tokenizer(writer: GGUFWriter, folder: Path) -> None:
    """Byte-level BPE; digits are split one by one where the folder's tokenizer does so."""
    content: dict[str, Any] = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary: dict[str, int] = content["model"]["vocab"]
    special = {added["content"]: added["id"] for added in content.get("added_tokens", [])}
    tokens = sorted({**vocabulary, **special}.items(), key=lambda item: item[1])
    splits_digits = "Digits" in json.dumps(content.get("pre_tokenizer"))
    merges = [
        merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]
    ]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm" if splits_digits else "gpt-2")
    writer.add_token_list([token for token, _ in tokens])
    writer.add_token_types([_CONTROL if token in special else _NORMAL for token, _ in tokens])
    writer.add_token_merges(merges)
    writer.add_add_bos_token(False)


def _add_tensors(writer: GGUFWriter, checkpoint: Checkpoint) -> None:
    config = checkpoint.config
    writer.add_tensor("token_embd.weight", _exact(checkpoint, EMBEDDING))
    writer.add_tensor("output_norm.weight", checkpoint.norm(FINAL_NORM))
    if not config.tie_word_embeddings:
        writer.add_tensor("output.weight", _exact(checkpoint, HEAD))
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}"
        for norm, short in _NORMS.items():
            writer.add_tensor(
                f"blk.{layer}.{short}.weight", checkpoint.norm(f"{prefix}.{norm}.weight")
            )
        for part, short in _LINEARS.items():
            weight = _exact(checkpoint, f"{prefix}.{part}.weight")
            heads = _num_heads(checkpoint, part)
            weight = permute_rows(weight, heads) if heads else weight
            writer.add_tensor(f"blk.{layer}.{short}.weight", weight)


def _exact(checkpoint: Checkpoint, name: str) -> NDArray[Any]:
    if checkpoint.store.dtype(name) == "F16":
        return np.array(checkpoint.store.raw(name))
    return checkpoint.store.float32(name)


def _num_heads(checkpoint: Checkpoint, part: str) -> int:
    """Heads whose rows llama.cpp keeps in another order; 0 for parts without."""
    config = checkpoint.config
    return {"self_attn.q_proj": config.num_heads, "self_attn.k_proj": config.num_kv_heads}.get(
        part, 0
    )


def permute_rows(weight: NDArray[Any], num_heads: int) -> NDArray[Any]:
    """llama.cpp's row order of a query or key projection (out, in); undone by `unpermute_rows`."""
    num_rows, num_columns = weight.shape
    halves = weight.reshape(num_heads, 2, num_rows // num_heads // 2, num_columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(num_rows, num_columns))


def import_linears(path: Path, source: Path, folder: Path) -> GgufLinears:
    """Write `source` into `folder` with its linears replaced by what a GGUF file holds, float32.

    Embedding, head and norms stay those of the source, so that arms differ in the linears alone.

    Raises:
        EvaluationError: the file lacks a linear, or holds one of another shape.
    """
    checkpoint = Checkpoint(source)
    tensors = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    num_bytes, types = 0, Counter[str]()
    with DenseFolder(checkpoint, folder) as dense:
        for name in checkpoint.linear_names():
            _, _, layer, *rest = name.split(".")
            part = ".".join(rest)
            tensor = tensors.get(f"blk.{layer}.{_LINEARS[part]}.weight")
            if tensor is None:
                raise EvaluationError(f"{path} holds no weights for {name}")
            weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
            heads = _num_heads(checkpoint, part)
            dense.put(name, unpermute_rows(weight, heads) if heads else weight)
            num_bytes += int(tensor.n_bytes)
            types[tensor.tensor_type.name] += 1
    return GgufLinears(8 * num_bytes / checkpoint.config.num_linear_parameters, dict(types))
