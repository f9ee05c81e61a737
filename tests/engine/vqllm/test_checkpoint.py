"""The GPTQ file format, and what is said of broken folders."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from vqllm import tensor_spool
from vqllm.checkpoint import Checkpoint
from vqllm.errors import CorruptCheckpoint, UnknownModel, UnsupportedModel
from vqllm.formats.gptq import GptqFormat, packed_tensors, stored_to_zeros
from vqllm.quantization.base import GroupedLinear, GroupedSpec, contiguous_groups
from vqllm.quantization.saving import CheckpointWriter, FolderPlan

if TYPE_CHECKING:
    from collections.abc import Callable

    MakeFolder = Callable[..., Path]

SPEC = GroupedSpec(bits=4, group_size=32)
V1, V2 = GptqFormat(SPEC), GptqFormat(SPEC, is_v2=True)


def golden_linear() -> GroupedLinear:
    """64 inputs, 32 outputs: code of input k and output n is (k + n) mod 16."""
    codes = np.add.outer(np.arange(64), np.arange(32)) % 16
    return GroupedLinear(
        codes=codes.astype(np.uint8),
        scales=np.full((2, 32), 0.5, dtype=np.float16),
        zeros=np.full((2, 32), 8, dtype=np.uint8),
        group_index=contiguous_groups(64, SPEC),
        spec=SPEC,
    )


def random_linear(shape: tuple[int, int], seed: int, symmetric: bool = True) -> GroupedLinear:
    """A linear (out, in) of random codes."""
    rng = np.random.default_rng(seed)
    out_features, in_features = shape
    groups = SPEC.num_groups(in_features)
    zeros = np.full((groups, out_features), 8) if symmetric else rng.integers(0, 16, (groups, 1))
    return GroupedLinear(
        codes=rng.integers(0, 16, (in_features, out_features)).astype(np.uint8),
        scales=rng.uniform(0.01, 0.02, (groups, out_features)).astype(np.float16),
        zeros=np.broadcast_to(zeros, (groups, out_features)).astype(np.uint8),
        group_index=contiguous_groups(in_features, SPEC),
        spec=SPEC,
    )


def random_linears(source: Checkpoint, symmetric: bool = True) -> dict[str, GroupedLinear]:
    return {
        name: random_linear(source.linear_shape(name), seed, symmetric)
        for seed, name in enumerate(source.linear_names())
    }


def write_quantized(folder: Path, target: Path) -> dict[str, GroupedLinear]:
    source = Checkpoint(folder)
    linears = random_linears(source)
    with CheckpointWriter(source, target, FolderPlan("A test.")) as writer:
        for name, linear in linears.items():
            writer.add_linear(name, linear)
    return linears


def test_v1_stores_golden_words() -> None:
    tensors = packed_tensors("layer", golden_linear(), V1)
    words = tensors["layer.qweight"].view(np.uint32)
    assert words.shape == (8, 32)
    assert [hex(word) for word in words[:2, 0]] == ["0x76543210", "0xfedcba98"]
    assert hex(words[0, 1]) == "0x87654321"
    assert tensors["layer.qzeros"].shape == (2, 4)
    assert set(tensors["layer.qzeros"].view(np.uint32).ravel().tolist()) == {0x77777777}
    assert tensors["layer.scales"].dtype == np.float16
    assert tensors["layer.g_idx"].tolist() == [0] * 32 + [1] * 32


def test_v2_stores_zero_points_as_they_are() -> None:
    tensors = packed_tensors("layer", golden_linear(), V2)
    assert set(tensors["layer.qzeros"].view(np.uint32).ravel().tolist()) == {0x88888888}


def test_dequantizing_is_code_minus_zero_times_scale() -> None:
    weights = golden_linear().dequantize()
    assert weights.shape == (32, 64)
    assert weights[0, :3].tolist() == [-4.0, -3.5, -3.0]


@pytest.mark.parametrize("label", [V1, V2])
@pytest.mark.parametrize("stored", [7, 8])
def test_symmetric_zero_points_are_read_by_value(
    label: GptqFormat, stored: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        zeros = stored_to_zeros(np.full((2, 32), stored, dtype=np.uint8), label, "layer")
    assert (zeros == 8).all()
    assert bool(caplog.records) == (label.is_v2 != (stored == 8))


def test_an_asymmetric_v1_file_with_a_wrapped_zero_point_is_refused() -> None:
    label = GptqFormat(SPEC, is_symmetric=False)
    stored = np.array([[3, 15]], dtype=np.uint8)
    with pytest.raises(CorruptCheckpoint, match=r"layer\.qzeros.*ambiguous"):
        stored_to_zeros(stored, label, "layer")
    assert stored_to_zeros(stored - 1, label, "layer").tolist() == [[3, 15]]


def test_a_reloaded_folder_holds_exactly_what_was_quantized(
    tiny_folder: Path, tmp_path: Path
) -> None:
    target = tmp_path / "quantized"
    linears = write_quantized(tiny_folder, target)
    checkpoint = Checkpoint(target)
    for name, written in linears.items():
        linear = checkpoint.linear(name)
        assert isinstance(linear, GroupedLinear)
        np.testing.assert_array_equal(linear.codes, written.codes)
        np.testing.assert_array_equal(linear.dequantize(), written.dequantize())


def test_the_folder_carries_what_other_readers_look_for(tiny_folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "quantized"
    write_quantized(tiny_folder, target)
    config = json.loads((target / "config.json").read_text())
    quantization = config["quantization_config"]
    assert quantization == json.loads((target / "quantize_config.json").read_text())
    assert (quantization["quant_method"], quantization["bits"]) == ("gptq", 4)
    assert (quantization["desc_act"], quantization["sym"]) == (False, True)
    assert quantization["checkpoint_format"] == "gptq"
    assert (target / "tokenizer.json").is_file()
    tensors = load_file(target / "model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    assert tensors[f"{name}.qweight"].dtype == torch.int32
    assert tuple(tensors[f"{name}.qweight"].shape) == (160 * 4 // 32, 64)
    assert f"{name}.weight" not in tensors
    assert torch.equal(
        tensors["model.norm.weight"],
        load_file(tiny_folder / "model.safetensors")["model.norm.weight"],
    )


def test_bits_per_weight_count_every_byte(tiny_folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "quantized"
    write_quantized(tiny_folder, target)
    info = Checkpoint(target).info()
    tensors = load_file(target / "model.safetensors")
    parts = ("qweight", "qzeros", "scales", "g_idx")
    num_bytes = sum(t.nbytes for name, t in tensors.items() if name.endswith(parts))
    num_weights = Checkpoint(tiny_folder).config.num_linear_parameters
    assert info.bpw == pytest.approx(8 * num_bytes / num_weights)
    assert 4.6 < info.bpw < 5.5
    assert f"{info.bpw:.3f}" in (target / "README.md").read_text()
    assert (info.method, info.bits, info.group_size) == ("gptq", 4, 32)
    assert Checkpoint(tiny_folder).info().bpw == 32.0


def test_the_revision_follows_the_weights(make_folder: MakeFolder) -> None:
    first, second = make_folder("a", seed=0), make_folder("b", seed=1)
    assert Checkpoint(first).info().revision != Checkpoint(second).info().revision
    assert Checkpoint(first).info().revision == Checkpoint(first).info().revision


def test_parameters_are_counted_as_torch_counts_them(tiny_folder: Path) -> None:
    tensors = load_file(tiny_folder / "model.safetensors")
    expected = sum(tensor.numel() for tensor in tensors.values())
    assert Checkpoint(tiny_folder).info().num_parameters == expected


def test_bfloat16_weights_are_widened(make_folder: MakeFolder) -> None:
    norm = torch.linspace(0.5, 1.5, 64).bfloat16()
    checkpoint = Checkpoint(make_folder(tensors={"model.norm.weight": norm}))
    np.testing.assert_array_equal(checkpoint.norm("model.norm.weight"), norm.float().numpy())


def test_shards_are_read_through_their_index(tiny_folder: Path) -> None:
    tensors = load_file(tiny_folder / "model.safetensors")
    expected = Checkpoint(tiny_folder).embedding()
    (tiny_folder / "model.safetensors").unlink()
    weight_map = {}
    for index, (name, tensor) in enumerate(tensors.items()):
        file_name = f"part-{index % 2}.safetensors"
        weight_map[name] = file_name
        del tensor
    for file_name in set(weight_map.values()):
        chosen = {name: tensors[name] for name in tensors if weight_map[name] == file_name}
        save_file(chosen, tiny_folder / file_name)
    index_path = tiny_folder / "model.safetensors.index.json"
    index_path.write_text(json.dumps({"weight_map": weight_map}))
    np.testing.assert_array_equal(Checkpoint(tiny_folder).embedding(), expected)
    (tiny_folder / "part-1.safetensors").unlink()
    with pytest.raises(CorruptCheckpoint, match=r"part-1\.safetensors, which is missing"):
        Checkpoint(tiny_folder)


def test_a_large_model_is_written_in_shards(
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, target = tmp_path / "whole", tmp_path / "shards"
    write_quantized(tiny_folder, whole)
    monkeypatch.setattr(tensor_spool, "MAX_SHARD_BYTES", 40_000)
    write_quantized(tiny_folder, target)
    assert len(list(target.glob("model-*.safetensors"))) > 2
    sharded, single = Checkpoint(target), Checkpoint(whole)
    assert set(sharded.store.names) == set(single.store.names)
    for name in single.store.names:
        np.testing.assert_array_equal(sharded.store.raw(name), single.store.raw(name))


def test_a_part_that_never_came_is_named(tiny_folder: Path, tmp_path: Path) -> None:
    source = Checkpoint(tiny_folder)
    first = source.linear_names()[0]
    with (
        pytest.raises(ValueError, match=r"never written: model\.layers\.0\.self_attn\.k_proj"),
        CheckpointWriter(source, tmp_path / "q", FolderPlan()) as writer,
    ):
        writer.add_linear(first, random_linear(source.linear_shape(first), 0))
    assert not (tmp_path / "q").exists()


def test_a_folder_without_a_model_is_unknown(tmp_path: Path) -> None:
    with pytest.raises(UnknownModel, match=r"no config\.json"):
        Checkpoint(tmp_path)


def test_an_unknown_architecture_is_named(make_folder: MakeFolder) -> None:
    folder = make_folder(architectures=["MambaForCausalLM"])
    with pytest.raises(UnsupportedModel, match="MambaForCausalLM"):
        Checkpoint(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_scaling": {"rope_type": "mrope"}}, "rope type is 'mrope'"),
        ({"sliding_window": 64}, "sliding_window"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"quantization_config": {"quant_method": "awq"}}, "'awq'"),
    ],
)
def test_features_that_are_not_computed_are_refused(
    make_folder: MakeFolder, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        Checkpoint(make_folder(**change))


def test_a_missing_tensor_is_named(make_folder: MakeFolder) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    checkpoint = Checkpoint(make_folder(tensors={name: None}))
    with pytest.raises(CorruptCheckpoint, match=f"tensor {name} is missing"):
        checkpoint.linear("model.layers.1.mlp.up_proj")


def test_a_tensor_with_nan_is_named(make_folder: MakeFolder) -> None:
    name = "model.layers.0.self_attn.k_proj.weight"
    weight = torch.ones(32, 64)
    weight[3, 4] = torch.nan
    checkpoint = Checkpoint(make_folder(tensors={name: weight}))
    with pytest.raises(CorruptCheckpoint, match=f"{name} holds NaN"):
        checkpoint.linear(name.removesuffix(".weight"))


def test_a_misshapen_tensor_is_named(make_folder: MakeFolder) -> None:
    checkpoint = Checkpoint(make_folder(tensors={"model.norm.weight": torch.ones(63)}))
    with pytest.raises(CorruptCheckpoint, match=r"model\.norm\.weight has shape \(63,\)"):
        checkpoint.norm("model.norm.weight")


def test_a_truncated_file_is_named(tiny_folder: Path) -> None:
    path = tiny_folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CorruptCheckpoint, match=r"model\.safetensors: truncated"):
        Checkpoint(tiny_folder)
    path.write_bytes(b"not a safetensors file")
    with pytest.raises(CorruptCheckpoint, match="not a safetensors file"):
        Checkpoint(tiny_folder)


def test_a_broken_config_is_named(tiny_folder: Path) -> None:
    (tiny_folder / "config.json").write_text("{")
    with pytest.raises(CorruptCheckpoint, match=r"config\.json"):
        Checkpoint(tiny_folder)
