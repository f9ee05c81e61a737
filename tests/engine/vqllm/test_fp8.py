"""Originals in 8-bit floats, as DeepSeek-V3 is published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from support.tiny_models import VOCAB_SIZE, write_tiny_model
from vqllm.checkpoint import Checkpoint
from vqllm.errors import CorruptCheckpoint, UnsupportedModel
from vqllm.formats.fp8 import Fp8Format, Fp8Linear, e4m3_values
from vqllm.outlier.quarot import QuarotOptions, RotatedSource
from vqllm.sources import PlainSource, source_logits

BLOCK = 16
LINEAR = "model.layers.0.self_attn.o_proj"


def write_fp8_model(folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A tiny DeepSeek-V3 with fp8 linears, and the weights that its tensors stand for."""
    write_tiny_model(folder, "deepseek-v3")
    names = {f"{name}.weight" for name in Checkpoint(folder).linear_names()}
    tensors, meant = load_file(folder / "model.safetensors"), {}
    for name in names:
        weight = tensors[name]
        rows, columns = (-(-size // BLOCK) for size in weight.shape)
        factors = torch.rand(rows, columns) + 0.5
        wide = factors.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        wide = wide[: weight.shape[0], : weight.shape[1]]
        tensors[name] = (weight / wide).to(torch.float8_e4m3fn)
        meant[name] = tensors[name].float() * wide
        tensors[f"{name}_scale_inv"] = factors
    save_file(tensors, folder / "model.safetensors")
    change_config(folder, {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 16]})
    return folder, meant


def change_config(folder: Path, quantization: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))


def test_every_bit_pattern_is_torch_s() -> None:
    expected = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(e4m3_values(), expected)


def test_weights_are_values_times_the_factor_of_their_block(tmp_path: Path) -> None:
    folder, meant = write_fp8_model(tmp_path)
    checkpoint = Checkpoint(folder)
    for name in checkpoint.linear_names():
        np.testing.assert_array_equal(checkpoint.dense_linear(name), meant[f"{name}.weight"])


def test_an_fp8_folder_is_an_original_to_rotate(tmp_path: Path) -> None:
    source = PlainSource(Checkpoint(write_fp8_model(tmp_path)[0]))
    assert not any("scale_inv" in name for name in source.other_tensors())
    tokens = torch.randint(VOCAB_SIZE, (1, 20), generator=torch.Generator().manual_seed(0))
    expected = source_logits(source, tokens)
    found = source_logits(RotatedSource(source, QuarotOptions()), tokens)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"fmt": "e5m2"}, "fmt 'e5m2'"), ({"weight_block_size": None}, "weight_block_size None")],
)
def test_other_fp8_folders_are_refused(change: dict[str, Any], message: str) -> None:
    config = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    with pytest.raises(UnsupportedModel, match=message):
        Fp8Format.from_dict({**config, **change})


def test_factors_of_another_shape_are_named(tmp_path: Path) -> None:
    folder, _ = write_fp8_model(tmp_path)
    change_config(folder, {"quant_method": "fp8", "weight_block_size": [8, 8]})
    with pytest.raises(CorruptCheckpoint, match=rf"{LINEAR}\.weight_scale_inv has shape"):
        Checkpoint(folder).linear(LINEAR)


def test_nan_weights_are_named(tmp_path: Path) -> None:
    folder, _ = write_fp8_model(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{LINEAR}.weight"].view(torch.uint8)[1, 2] = 0x7F
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CorruptCheckpoint, match=rf"{LINEAR}\.weight holds NaN"):
        Checkpoint(folder).linear(LINEAR)


def test_factors_can_be_replaced() -> None:
    linear = Fp8Linear(np.full((2, 2), 0x38, np.uint8), np.ones((1, 1), np.float32), (2, 2))
    doubled = linear.with_parameters({"weight_scale_inv": np.full((1, 1), 2, np.float32)})
    np.testing.assert_array_equal(doubled.dequantize(), np.full((2, 2), 2, np.float32))
    assert linear.entry() == {"method": "fp8", "weight_block_size": [2, 2]}
    assert (linear.out_features, linear.in_features, linear.num_bytes) == (2, 2, 8)
