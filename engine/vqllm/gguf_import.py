"""A GGUF file of the llama architecture to an ordinary Hugging Face folder.

Weights are dequantized to float16; the row order that llama.cpp gives to the query and key
projections is undone. Knows nothing of where the file came from.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, dequantize
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from vqllm.checkpoint import write_json
from vqllm.errors import CorruptCheckpoint, UnsupportedModel

_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_CONTROL_TOKEN = 3  # llama.cpp's token type of special tokens
_SPECIAL_TOKENS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


class GgufModel:
    """One GGUF file, read lazily.

    Raises:
        CorruptCheckpoint: not a GGUF file, or a metadata field is missing; names the field.
        UnsupportedModel: an architecture or tokenizer that this importer does not know.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._reader = GGUFReader(path)
        except (ValueError, OSError, IndexError) as error:
            raise CorruptCheckpoint(f"{path}: not a readable GGUF file ({error})") from error
        architecture = self.field("general.architecture")
        if architecture != "llama":
            raise UnsupportedModel(f"{path}: architecture {architecture!r}, only 'llama' is known")

    def field(self, name: str) -> Any:
        """Value of a metadata field that must be there."""
        value = self.optional_field(name)
        if value is None:
            raise CorruptCheckpoint(f"{self._path}: metadata field {name!r} is missing")
        return value

    def optional_field(self, name: str) -> Any:
        entry = self._reader.fields.get(name)
        return None if entry is None else entry.contents()

    @property
    def has_head(self) -> bool:
        return any(tensor.name == "output.weight" for tensor in self._reader.tensors)

    def tensors(self) -> Iterator[tuple[str, NDArray[np.float16]]]:
        """Every tensor under its Hugging Face name, float16, in the file's order."""
        num_heads = int(self.field("llama.attention.head_count"))
        num_kv_heads = int(self.field("llama.attention.head_count_kv"))
        for tensor in self._reader.tensors:
            name = _hugging_face_name(tensor.name)
            if name is None:
                continue
            weight = dequantize(tensor.data, tensor.tensor_type)
            if name.endswith("q_proj.weight"):
                weight = unpermute_rows(weight, num_heads)
            elif name.endswith("k_proj.weight"):
                weight = unpermute_rows(weight, num_kv_heads)
            yield name, np.ascontiguousarray(weight, dtype=np.float16)


def convert_gguf(path: Path, folder: Path) -> None:
    """Write config, float16 safetensors, tokenizer and generation config into `folder`."""
    model = GgufModel(path)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", _config(model))
    write_json(folder / "generation_config.json", _generation_config(model))
    build_tokenizer(model).save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", _tokenizer_config(model))
    weights = folder / "model.safetensors"
    save_file(dict(model.tensors()), weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # the library writes files that only their owner may read


def unpermute_rows(weight: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """Undo llama.cpp's row order of a query or key projection, (out, in).

    llama.cpp pairs neighbouring rows for its rotary embedding, Hugging Face pairs row i with row
    i + head_dim / 2 of the same head.
    """
    num_rows, num_columns = weight.shape
    pairs = weight.reshape(num_heads, num_rows // num_heads // 2, 2, num_columns)
    return pairs.swapaxes(1, 2).reshape(num_rows, num_columns)


def build_tokenizer(model: GgufModel) -> Tokenizer:
    """The byte-level BPE tokenizer described by the file's metadata.

    Raises:
        UnsupportedModel: a tokenizer family or pre-tokenizer other than SmolLM's.
    """
    family, splitting = model.field("tokenizer.ggml.model"), model.field("tokenizer.ggml.pre")
    if (family, splitting) != ("gpt2", "smollm"):
        raise UnsupportedModel(f"tokenizer {family!r} with pre-tokenizer {splitting!r} is unknown")
    tokens = model.field("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in model.field("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = model.field("tokenizer.ggml.token_type")
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == _CONTROL_TOKEN
        ]
    )
    return tokenizer


def _hugging_face_name(name: str) -> str | None:
    """Tensor name in a Hugging Face llama checkpoint; None for what it does not store."""
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    if name == "rope_freqs.weight":
        return None
    block, _, rest = name.removeprefix("blk.").partition(".")
    part = rest.removesuffix(".weight")
    if not (name.startswith("blk.") and block.isdigit() and part in _BLOCK_NAMES):
        raise UnsupportedModel(f"GGUF tensor {name!r} has no place in a llama checkpoint")
    return f"model.layers.{block}.{_BLOCK_NAMES[part]}.weight"


def _config(model: GgufModel) -> dict[str, Any]:
    hidden_size = model.field("llama.embedding_length")
    num_heads = model.field("llama.attention.head_count")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "bos_token_id": model.field("tokenizer.ggml.bos_token_id"),
        "eos_token_id": model.field("tokenizer.ggml.eos_token_id"),
        "pad_token_id": model.optional_field("tokenizer.ggml.padding_token_id"),
        "head_dim": model.optional_field("llama.rope.dimension_count") or hidden_size // num_heads,
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "intermediate_size": model.field("llama.feed_forward_length"),
        "max_position_embeddings": model.field("llama.context_length"),
        "mlp_bias": False,
        "num_attention_heads": num_heads,
        "num_hidden_layers": model.field("llama.block_count"),
        "num_key_value_heads": model.field("llama.attention.head_count_kv"),
        # float32 in the file; the rounding restores the decimal that was meant (1e-05).
        "rms_norm_eps": float(f"{model.field('llama.attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_theta": model.field("llama.rope.freq_base"),
        "tie_word_embeddings": not model.has_head,
        "torch_dtype": "float16",
        "vocab_size": len(model.field("tokenizer.ggml.tokens")),
    }


def _generation_config(model: GgufModel) -> dict[str, Any]:
    return {
        "bos_token_id": model.field("tokenizer.ggml.bos_token_id"),
        "eos_token_id": model.field("tokenizer.ggml.eos_token_id"),
        "pad_token_id": model.optional_field("tokenizer.ggml.padding_token_id"),
    }


def _tokenizer_config(model: GgufModel) -> dict[str, Any]:
    tokens = model.field("tokenizer.ggml.tokens")
    special = {
        name: tokens[token_id]
        for name, key in _SPECIAL_TOKENS.items()
        if (token_id := model.optional_field(f"tokenizer.ggml.{key}")) is not None
    }
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model.field("llama.context_length"),
        "clean_up_tokenization_spaces": False,
        "chat_template": model.optional_field("tokenizer.chat_template"),
        **special,
    }
