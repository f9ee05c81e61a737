"""GGUF files to Hugging Face folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vqllm.checkpoint import Checkpoint
from vqllm.errors import CorruptCheckpoint, UnsupportedModel
from vqllm.runtime.executors.torch import TorchExecutor
from vqllm.runtime.tokenizer import ChatTokenizer

pytest.importorskip("gguf", reason="reading GGUF files needs vqstack[fetch]")

from gguf import GGUFWriter, TokenType

from vqllm.gguf_import import convert_gguf, unpermute_rows

HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM = 32, 64, 2, 1, 16
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "1", "2", "a", "b", "ab", "Ġ", "Ġa"]


def permute_rows(weight: np.ndarray[Any, Any], num_heads: int) -> np.ndarray[Any, Any]:
    """What llama.cpp does on export: rows i and i + head_dim / 2 become neighbours."""
    rows = []
    for head in np.split(weight, num_heads):
        half = len(head) // 2
        for first, second in zip(head[:half], head[half:], strict=True):
            rows += [first, second]
    return np.stack(rows)


def write_gguf(path: Path, architecture: str = "llama", splitting: str = "smollm") -> None:
    generator = np.random.default_rng(0)
    writer = GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitting)
    writer.add_token_list(TOKENS)
    writer.add_token_types([TokenType.CONTROL] * 3 + [TokenType.NORMAL] * 7)
    writer.add_token_merges(["a b", "Ġ a"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    kv = KV_HEADS * HEAD_DIM
    shapes = {
        "token_embd": (len(TOKENS), HIDDEN),
        "output_norm": (HIDDEN,),
        "blk.0.attn_norm": (HIDDEN,),
        "blk.0.ffn_norm": (HIDDEN,),
        "blk.0.attn_q": (HEADS * HEAD_DIM, HIDDEN),
        "blk.0.attn_k": (kv, HIDDEN),
        "blk.0.attn_v": (kv, HIDDEN),
        "blk.0.attn_output": (HIDDEN, HEADS * HEAD_DIM),
        "blk.0.ffn_gate": (INNER, HIDDEN),
        "blk.0.ffn_up": (INNER, HIDDEN),
        "blk.0.ffn_down": (HIDDEN, INNER),
    }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", generator.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_gguf(tmp_path / "model.gguf")
    convert_gguf(tmp_path / "model.gguf", tmp_path / "folder")
    return tmp_path / "folder"


def test_the_row_order_of_llama_cpp_is_undone() -> None:
    weight = np.arange(64 * 3, dtype=np.float32).reshape(64, 3)
    np.testing.assert_array_equal(unpermute_rows(permute_rows(weight, 4), 4), weight)


def test_the_folder_runs(folder: Path) -> None:
    logits = TorchExecutor(Checkpoint(folder), 64, 1).score([1, 5, 6])
    assert logits.shape == (3, len(TOKENS))
    assert np.isfinite(logits).all()


def test_the_config_restores_what_the_file_says(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert config["rms_norm_eps"] == 1e-5
    assert config["tie_word_embeddings"] is True
    assert (config["num_key_value_heads"], config["head_dim"]) == (KV_HEADS, HEAD_DIM)


def test_the_tokenizer_splits_digits_and_applies_merges(folder: Path) -> None:
    tokenizer = ChatTokenizer.from_folder(folder)
    assert tokenizer.encode("ab a12<|im_end|>") == [7, 9, 3, 4, 2]
    assert tokenizer.decode([7, 9, 3, 4, 2]) == "ab a12"
    assert tokenizer.eos_token_ids == {2}
    assert tokenizer.apply_chat_template([{"role": "user", "content": "ab"}]) == [7]


def test_other_architectures_and_tokenizers_are_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "mamba.gguf", architecture="mamba")
    with pytest.raises(UnsupportedModel, match="architecture 'mamba'"):
        convert_gguf(tmp_path / "mamba.gguf", tmp_path / "out")
    write_gguf(tmp_path / "qwen.gguf", splitting="qwen2")
    with pytest.raises(UnsupportedModel, match="pre-tokenizer 'qwen2'"):
        convert_gguf(tmp_path / "qwen.gguf", tmp_path / "out")


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUX" + bytes(100))
    with pytest.raises(CorruptCheckpoint, match=r"broken\.gguf"):
        convert_gguf(tmp_path / "broken.gguf", tmp_path / "out")
