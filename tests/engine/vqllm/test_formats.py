"""Folder formats: golden bytes, every width and flavour there and back, and lies found out."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from vqllm import tensor_spool
from vqllm.checkpoint import EMBEDDING, Checkpoint
from vqllm.errors import CorruptCheckpoint, DiskFull, InvalidConfig, UnsupportedModel, VqllmError
from vqllm.formats.gptq import ZeroPoints
from vqllm.packing import pack_columns, unpack_columns
from vqllm.quantization.base import GroupedLinear, GroupedSpec, QuantizedLinear, contiguous_groups
from vqllm.quantization.saving import CheckpointWriter, FolderPlan
from vqllm.quantization.tcq import TcqLinear
from vqllm.quantization.trellis import codebook_of
from vqllm.quantization.vptq_linear import VptqLinear, VptqSpec
from vqllm.quantization.vptq_packing import pack_elements, unpack_elements, words_per_row

if TYPE_CHECKING:
    from collections.abc import Callable

    MakeFolder = Callable[..., Path]
    MakeLinear = Callable[[tuple[int, int], int], QuantizedLinear]

NAME = "model.layers.1.mlp.up_proj"
SPEC = VptqSpec(num_centroids=16, num_res_centroids=4)
# Written by vptq 0.0.5.post1 (pack_index): main index 37 i mod 64 in 6 bits, residual index
# 11 i mod 8 in 3 bits, i counting through (2, 3, 5).
VPTQ_WORDS = [
    [0x7E29CA00, 0x1143],
    [0x450D3DF9, 0xCD1],
    [0x0CF0AFB2, 0x86F],
    [0xD3D4216B, 0x7FC],
    [0x9ABB9324, 0x38A],
    [0x619F04DD, 0x1F18],
]


def grouped(
    shape: tuple[int, int], seed: int, spec: GroupedSpec | None = None, symmetric: bool = True
) -> GroupedLinear:
    """A linear (out, in) of random codes around the middle of the grid."""
    spec = spec or GroupedSpec(4, 32)
    rng = np.random.default_rng(seed)
    groups = spec.num_groups(shape[1])
    middle, top = spec.symmetric_zero, spec.max_code
    zeros = np.full((groups, shape[0]), middle)
    if not symmetric:
        zeros = rng.integers(0, top + 1, zeros.shape)
    codes = zeros[contiguous_groups(shape[1], spec)] + rng.normal(0, middle / 3, shape[::-1])
    return GroupedLinear(
        codes=np.rint(codes).clip(0, top).astype(np.uint8),
        scales=rng.uniform(0.01, 0.02, (groups, shape[0])).astype(np.float16),
        zeros=zeros.astype(np.uint8),
        group_index=contiguous_groups(shape[1], spec),
        spec=spec,
    )


def vectors(shape: tuple[int, int], seed: int, spec: VptqSpec = SPEC) -> VptqLinear:
    """A VPTQ linear (out, in) of random indices."""
    rng, (out, columns) = np.random.default_rng(seed), shape
    size, rows = spec.group_size(columns), -(-out // spec.vector_length)
    outlier_rows = -(-out // spec.outlier_vector_length)

    def indices(high: int, *sizes: int) -> np.ndarray[Any, np.dtype[np.uint16]]:
        return rng.integers(0, high, sizes).astype(np.uint16)

    def halves(*sizes: int) -> np.ndarray[Any, np.dtype[np.float16]]:
        return rng.normal(0, 0.1, sizes).astype(np.float16)

    has_residual, has_outliers = spec.num_res_centroids > 0, spec.num_outliers > 0
    codebook = (spec.num_groups, spec.num_centroids, spec.vector_length)
    residual = (spec.num_groups, spec.num_res_centroids, spec.vector_length)
    places = (spec.num_groups, rows, size)
    outlier_codebook = (spec.num_outlier_centroids, spec.outlier_vector_length)
    return VptqLinear(
        num_rows=out,
        spec=spec,
        indices=indices(spec.num_centroids, *places),
        centroids=halves(*codebook),
        res_indices=indices(spec.num_res_centroids, *places) if has_residual else None,
        res_centroids=halves(*residual) if has_residual else None,
        outlier_indices=indices(spec.num_outlier_centroids, outlier_rows, spec.num_outliers)
        if has_outliers
        else None,
        outlier_centroids=halves(*outlier_codebook) if has_outliers else None,
        order=rng.permutation(columns).astype(np.uint16) if spec.has_order else None,
        column_scales=halves(columns) if spec.has_norm else None,
        column_biases=halves(columns) if spec.has_norm else None,
    )


def trellis(shape: tuple[int, int], seed: int) -> TcqLinear:
    rng, book = np.random.default_rng(seed), codebook_of(2, 12)
    codes = rng.integers(0, 256, (shape[1], book.stream_bytes(shape[0])))
    scales = rng.uniform(0.001, 0.002, (1, shape[0])).astype(np.float16)
    return TcqLinear(codes.astype(np.uint8), scales, None, 0, book)


def write(
    folder: Path, target: Path, make: MakeLinear, plan: FolderPlan | None = None
) -> dict[str, QuantizedLinear]:
    source = Checkpoint(folder)
    names = source.linear_names()
    linears = {name: make(source.linear_shape(name), seed) for seed, name in enumerate(names)}
    with CheckpointWriter(source, target, plan or FolderPlan()) as writer:
        for name, linear in linears.items():
            writer.add_linear(name, linear)
    return linears


def change_config(folder: Path, **fields: Any) -> None:
    """Change fields of the `quantization_config`; None removes it whole."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"].update(fields)
    path.write_text(json.dumps(config))


def change_tensor(folder: Path, name: str, values: np.ndarray[Any, Any] | None) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    kept = {**tensors, **({} if values is None else {name: values})}
    save_file(kept, folder / "model.safetensors")


def assert_same(checkpoint: Checkpoint, linears: dict[str, QuantizedLinear]) -> None:
    for name, written in linears.items():
        read = checkpoint.linear(name)
        assert type(read) is type(written)
        np.testing.assert_array_equal(checkpoint.dense_linear(name), written.dequantize())


# --- VPTQ's layout ----------------------------------------------------------------------------


def test_indices_are_packed_as_vptq_packs_them() -> None:
    count = np.arange(30).reshape(2, 3, 5)
    elements = (count * 37 % 64 + (count * 11 % 8) * 64).astype(np.uint32)
    words = pack_elements(elements, 9)
    assert words.view(np.uint32).reshape(6, 2).tolist() == VPTQ_WORDS
    np.testing.assert_array_equal(unpack_elements(words, 9, 5), elements)


@pytest.mark.parametrize("bits", [1, 2, 7, 12, 16, 24, 32])
def test_every_width_packs_there_and_back(bits: int) -> None:
    rng = np.random.default_rng(bits)
    elements = rng.integers(0, 1 << bits, (2, 5, 19), dtype=np.uint64).astype(np.uint32)
    words = pack_elements(elements, bits)
    assert words.shape == (2, 5, words_per_row(19, bits))
    np.testing.assert_array_equal(unpack_elements(words, bits, 19), elements)


def reference_weights(entry: dict[str, Any], parts: dict[str, Any]) -> np.ndarray[Any, Any]:
    """What a VPTQ layer means, weight by weight from the stored bits; float32 (out, in)."""
    rows, columns = entry["out_features"], entry["in_features"]
    (v0, v), k, kr = entry["vector_lens"], entry["num_centroids"][1], entry["num_res_centroids"][1]
    main_bits, bits = k.bit_length() - 1, k.bit_length() - 1 + max(kr.bit_length() - 1, 0)
    bits = main_bits if kr < 0 else bits
    outliers, size = entry["outlier_size"], entry["group_size"]
    order = parts["perm"].view(np.uint16) if entry["enable_perm"] else np.arange(columns)
    weights = np.zeros((rows, columns), np.float32)
    for place in range(columns):
        for row in range(rows):
            if place < outliers:
                code = int(parts["outlier_indices"].view(np.uint16)[0, row // v0, place])
                value = parts["outlier_centroids.weight"][0, code * v0 + row % v0]
            else:
                group, column = divmod(place - outliers, size)
                stream = parts["indices"][group, row // v].view(np.uint32)
                number = sum(int(word) << (32 * i) for i, word in enumerate(stream))
                element = number >> (column * bits) & ((1 << bits) - 1)
                code, rest = element & (k - 1), element >> main_bits
                value = np.float32(parts["centroids.weight"][group, code * v + row % v])
                if kr > 0:
                    value += np.float32(parts["res_centroids.weight"][group, rest * v + row % v])
            weights[row, order[place]] = value
    if entry["enable_norm"]:
        weights = weights * parts["weight_scale"].astype(np.float32)
        weights += parts["weight_bias"].astype(np.float32)
    return weights


@pytest.mark.parametrize(
    "spec",
    [
        SPEC,
        VptqSpec(vector_length=5, num_centroids=8, has_norm=False),
        VptqSpec(num_centroids=32, num_groups=3, has_order=True),
        VptqSpec(
            vector_length=3,
            num_centroids=16,
            num_res_centroids=16,
            num_groups=2,
            num_outliers=4,
            outlier_vector_length=4,
            num_outlier_centroids=8,
            has_order=True,
        ),
    ],
)
def test_weights_are_what_the_stored_bits_mean(spec: VptqSpec) -> None:
    linear = vectors((26, 24), 0, spec)
    expected = reference_weights(linear.entry(), linear.tensors())
    np.testing.assert_array_equal(linear.dequantize(), expected)
    assert 8 * linear.num_bytes == spec.bits(26, 24)


# --- whole folders ----------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_gptq_of_every_width_reads_back(
    tiny_folder: Path, tmp_path: Path, bits: int, symmetric: bool
) -> None:
    target, spec = tmp_path / "q", GroupedSpec(bits, 32)
    linears = write(tiny_folder, target, lambda s, n: grouped(s, n, spec, symmetric))
    checkpoint = Checkpoint(target)
    assert_same(checkpoint, linears)
    stored = json.loads((target / "config.json").read_text())["quantization_config"]
    assert stored["checkpoint_format"] == ("gptq" if symmetric else "gptq_v2")
    assert (stored["bits"], stored["sym"]) == (bits, symmetric)
    assert checkpoint.info().bits == bits


def test_a_symmetric_layer_among_asymmetric_ones_is_stored_alike(
    tiny_folder: Path, tmp_path: Path
) -> None:
    target = tmp_path / "q"
    linears = write(tiny_folder, target, lambda s, n: grouped(s, n, symmetric=n == 3))
    assert_same(Checkpoint(target), linears)
    zeros = unpack_columns(Checkpoint(target).store.raw(f"{list(linears)[3]}.qzeros"), 4)
    assert set(zeros.ravel().tolist()) == {8}


def test_vptq_folders_read_back_and_list_every_layer(tiny_folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "q"
    linears = write(tiny_folder, target, vectors)
    checkpoint = Checkpoint(target)
    assert_same(checkpoint, linears)
    stored = json.loads((target / "config.json").read_text())["quantization_config"]
    assert stored["quant_method"] == "vptq"
    assert set(stored["config_for_layers"]) == set(checkpoint.linear_names())
    assert stored["modules_to_not_convert"] == ["lm_head"]
    assert not (target / "quantize_config.json").exists()
    info = checkpoint.info()
    assert (info.method, info.format) == ("vptq", "vptq")
    num_bytes = sum(linear.num_bytes for linear in linears.values())
    assert info.linear_bytes == num_bytes
    assert info.bpw == pytest.approx(8 * num_bytes / checkpoint.config.num_linear_parameters)


def test_our_format_mixes_methods_and_keeps_transform_and_tables(
    tiny_folder: Path, tmp_path: Path
) -> None:
    target, transform = tmp_path / "q", {"residual_seed": 0, "head_seed": 4, "down_seed": 7}
    makers: list[MakeLinear] = [grouped, vectors, trellis]
    plan = FolderPlan(meta={"alpha": 0.5}, transform=transform)
    linears = write(tiny_folder, target, lambda s, n: makers[n % 3](s, n), plan)
    checkpoint = Checkpoint(target)
    assert_same(checkpoint, linears)
    assert checkpoint.transform.to_dict() == transform
    assert checkpoint.quantization is not None
    assert checkpoint.quantization.meta == {"alpha": 0.5}
    info = checkpoint.info()
    assert (info.method, info.format, info.is_rotated) == ("gptq+tcq+vptq", "vqstack", True)
    stored = json.loads((target / "config.json").read_text())["quantization_config"]
    assert list(stored["tcq"]) == ["2x12"]
    assert len(stored["tcq"]["2x12"]["table"]) == 256


def test_rotations_that_are_done_offline_need_no_format_of_ours(
    tiny_folder: Path, tmp_path: Path
) -> None:
    write(tiny_folder, tmp_path / "q", grouped, FolderPlan(transform={"head_seed": 3}))
    assert Checkpoint(tmp_path / "q").info().format == "gptq"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_an_embedding_in_8_bits_is_close_and_counted(
    make_folder: MakeFolder, tmp_path: Path, dtype: torch.dtype
) -> None:
    table = torch.randn(258, 64).to(dtype)
    source = make_folder(tensors={EMBEDDING: table})
    write(source, tmp_path / "q", grouped, FolderPlan(embedding_bits=8))
    checkpoint = Checkpoint(tmp_path / "q")
    codes = checkpoint.embedding_codes()
    assert codes is not None
    assert codes[0].dtype == np.int8
    error = np.abs(checkpoint.embedding() - table.float().numpy()).max(axis=1)
    assert (error <= codes[1] / 2 * 1.01).all()
    assert checkpoint.info().embedding_bpw == pytest.approx(8 + 32 / 64)
    assert checkpoint.info().format == "vqstack"
    np.testing.assert_array_equal(checkpoint.head(), checkpoint.embedding())


def test_given_tensors_replace_those_of_the_source(make_folder: MakeFolder, tmp_path: Path) -> None:
    half = {"model.norm.weight": torch.ones(64).half(), EMBEDDING: torch.randn(258, 64).bfloat16()}
    source = make_folder(tensors=half)
    others = {
        "model.norm.weight": np.linspace(0.5, 1.5, 64).astype(np.float32),
        EMBEDDING: Checkpoint(source).store.raw(EMBEDDING),
        "lm_head.weight": np.ones((258, 64), np.float32),
        f"{NAME}.bias": np.ones(160, np.float32),
    }
    write(source, tmp_path / "q", vectors, FolderPlan(others=others))
    store = Checkpoint(tmp_path / "q").store
    np.testing.assert_array_equal(store.float32("model.norm.weight"), others["model.norm.weight"])
    assert (store.dtype(EMBEDDING), store.dtype("model.norm.weight")) == ("BF16", "F32")
    stored = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    assert stored["config_for_layers"][NAME]["bias"] is True
    assert "model.layers.0.input_layernorm.weight" not in store


def test_an_untied_head_is_written_beside_a_changed_config(
    tiny_folder: Path, tmp_path: Path
) -> None:
    others: dict[str, np.ndarray[Any, Any]] = {
        EMBEDDING: np.zeros((258, 64), np.float16),
        "model.norm.weight": np.ones(64, np.float32),
        "lm_head.weight": np.ones((258, 64), np.float16),
    }
    plan = FolderPlan(others=others, config_changes={"tie_word_embeddings": False})
    write(tiny_folder, tmp_path / "q", vectors, plan)
    checkpoint = Checkpoint(tmp_path / "q")
    assert not checkpoint.config.tie_word_embeddings
    assert (checkpoint.head() == 1).all()


def test_bytes_do_not_depend_on_the_order_of_arrival(tiny_folder: Path, tmp_path: Path) -> None:
    linears = write(tiny_folder, tmp_path / "a", vectors)
    with CheckpointWriter(Checkpoint(tiny_folder), tmp_path / "b", FolderPlan()) as writer:
        for name, linear in reversed(linears.items()):
            writer.add_linear(name, linear)
    for file in ("model.safetensors", "config.json"):
        first, second = (json_sorted(tmp_path / folder / file) for folder in "ab")
        assert first == second


def json_sorted(path: Path) -> bytes:
    if path.suffix != ".json":
        return path.read_bytes()
    return json.dumps(json.loads(path.read_text()), sort_keys=True).encode()


def test_every_tensor_is_aligned_to_its_elements(tiny_folder: Path, tmp_path: Path) -> None:
    write(tiny_folder, tmp_path / "q", trellis, FolderPlan(embedding_bits=8))
    store = Checkpoint(tmp_path / "q").store
    assert all(store.raw(name).flags.aligned for name in store.names)
    assert set(load_file(tmp_path / "q" / "model.safetensors")) == set(store.names)


# --- files of other tools -----------------------------------------------------------------------


def test_act_order_group_indices_are_read(tiny_folder: Path, tmp_path: Path) -> None:
    linears = write(tiny_folder, tmp_path / "q", grouped)
    index = np.random.default_rng(0).permutation(contiguous_groups(64, GroupedSpec(4, 32)))
    change_tensor(tmp_path / "q", f"{NAME}.g_idx", index.astype(np.int32))
    change_config(tmp_path / "q", desc_act=True)
    linear, written = Checkpoint(tmp_path / "q").linear(NAME), linears[NAME]
    assert isinstance(linear, GroupedLinear)
    assert isinstance(written, GroupedLinear)
    assert not linear.has_contiguous_groups
    expected = replace(written, group_index=index.astype(np.int32)).dequantize()
    np.testing.assert_array_equal(linear.dequantize(), expected)


def test_files_without_group_indices_are_read(tiny_folder: Path, tmp_path: Path) -> None:
    linears = write(tiny_folder, tmp_path / "q", grouped)
    change_tensor(tmp_path / "q", f"{NAME}.g_idx", None)
    read = Checkpoint(tmp_path / "q").dense_linear(NAME)
    np.testing.assert_array_equal(read, linears[NAME].dequantize())


def test_one_group_per_output_is_read(tiny_folder: Path, tmp_path: Path) -> None:
    spec = GroupedSpec(4, 256)
    linears = write(tiny_folder, tmp_path / "q", lambda s, n: grouped(s, n, spec))
    change_config(tmp_path / "q", group_size=-1)
    assert_same(Checkpoint(tmp_path / "q"), {})
    read = Checkpoint(tmp_path / "q").dense_linear(NAME)
    np.testing.assert_array_equal(read, linears[NAME].dequantize())


@pytest.mark.parametrize("label", ["gptq", "gptq_v2"])
def test_asymmetric_zero_points_under_a_wrong_label_are_found_out(
    tiny_folder: Path, tmp_path: Path, label: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The mean of code minus zero point tells, because weights have a mean near zero."""

    def make(shape: tuple[int, int], seed: int) -> GroupedLinear:
        linear = grouped(shape, seed, symmetric=False)
        return replace(linear, zeros=linear.zeros.clip(3, 12))

    def centred(shape: tuple[int, int], seed: int) -> GroupedLinear:
        linear = make(shape, seed)
        rng = np.random.default_rng(seed)
        codes = linear.zeros[linear.group_index] + np.rint(rng.normal(0, 1.5, shape[::-1]))
        return replace(linear, codes=codes.clip(0, 15).astype(np.uint8))

    linears = write(tiny_folder, tmp_path / "q", centred)
    if label == "gptq_v2":  # the tensors turn into v1, the label stays
        for name, linear in linears.items():
            assert isinstance(linear, GroupedLinear)
            change_tensor(tmp_path / "q", f"{name}.qzeros", pack_columns(linear.zeros - 1, 4))
    change_config(tmp_path / "q", checkpoint_format=label)
    with caplog.at_level(logging.WARNING):
        assert_same(Checkpoint(tmp_path / "q"), {NAME: linears[NAME]})
    assert "checkpoint_format says" in caplog.text
    assert "values win" in caplog.text


def test_the_caller_can_decide_about_zero_points(tiny_folder: Path, tmp_path: Path) -> None:
    linears = write(tiny_folder, tmp_path / "q", lambda s, n: grouped(s, n, symmetric=False))
    linear = linears[NAME]
    assert isinstance(linear, GroupedLinear)
    shifted = Checkpoint(tmp_path / "q", ZeroPoints.V1)
    with pytest.raises(CorruptCheckpoint, match=r"qzeros.*ambiguous.*ZeroPoints\.V2"):
        shifted.linear(NAME)
    assert_same(Checkpoint(tmp_path / "q", ZeroPoints.V2), {NAME: linear})


# --- lies and damage ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 8}, r"model\.safetensors.*qweight has shape.*bits=8.*codes have 4 bits"),
        ({"group_size": 64}, r"qzeros has shape.*group_size=64.*about 32 columns"),
        ({"quant_method": "vptq"}, r"quant_method is 'vptq'.*holds model.*qweight"),
    ],
)
def test_a_gptq_label_that_lies_is_named(
    tiny_folder: Path, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    write(tiny_folder, tmp_path / "q", grouped)
    change_config(tmp_path / "q", **fields)
    with pytest.raises(CorruptCheckpoint, match=message):
        Checkpoint(tmp_path / "q").linear(NAME)


def test_a_label_without_packed_tensors_is_named(tiny_folder: Path, tmp_path: Path) -> None:
    path = tiny_folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    path.write_text(json.dumps(config))
    with pytest.raises(CorruptCheckpoint, match=r"quant_method is 'gptq'.*holds plain weights"):
        Checkpoint(tiny_folder)
    write_json = json.dumps({**config, "quantization_config": None})
    path.write_text(write_json)
    assert Checkpoint(tiny_folder).quantization is None


def test_packed_tensors_without_a_label_are_named(tiny_folder: Path, tmp_path: Path) -> None:
    write(tiny_folder, tmp_path / "q", vectors)
    path = tmp_path / "q" / "config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]
    path.write_text(json.dumps(config))
    with pytest.raises(CorruptCheckpoint, match=r"no quantization_config, but .*indices"):
        Checkpoint(tmp_path / "q")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_centroids", [-1, 32], r"indices is int32 .* implies int32"),
        ("num_centroids", [-1, 24], "num_centroids is 24.*power of two"),
        ("vector_lens", [-1, 8], "indices is int32"),
        ("group_size", 60, "group_size is 60"),
        ("group_num", 7, "num_groups is 7"),
        ("in_features", 72, r"in_features = \(160, 72\), the model has \(160, 64\)"),
        ("enable_perm", True, "perm is missing"),
        ("vector_lens", 4, "two integers"),
    ],
)
def test_a_vptq_entry_that_lies_is_named(
    tiny_folder: Path, tmp_path: Path, key: str, value: Any, message: str
) -> None:
    write(tiny_folder, tmp_path / "q", vectors)
    path = tmp_path / "q" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["config_for_layers"][NAME][key] = value
    path.write_text(json.dumps(config))
    with pytest.raises(CorruptCheckpoint, match=message) as caught:
        Checkpoint(tmp_path / "q").linear(NAME)
    assert NAME in str(caught.value)


def test_vectors_along_the_inputs_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    write(tiny_folder, tmp_path / "q", vectors)
    path = tmp_path / "q" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["config_for_layers"][NAME]["vector_quant_dim"] = "in"
    path.write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match="vectors along the outputs"):
        Checkpoint(tmp_path / "q").linear(NAME)


def test_a_broken_permutation_is_named(tiny_folder: Path, tmp_path: Path) -> None:
    spec = VptqSpec(num_centroids=16, num_groups=2, has_order=True)
    write(tiny_folder, tmp_path / "q", lambda s, n: vectors(s, n, spec))
    change_tensor(tmp_path / "q", f"{NAME}.perm", np.zeros(64, np.int16))
    with pytest.raises(CorruptCheckpoint, match=r"model\.safetensors.*perm is not a permutation"):
        Checkpoint(tmp_path / "q").linear(NAME)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"version": 9}, UnsupportedModel, "version 9"),
        ({"version": "1"}, CorruptCheckpoint, "version is '1'"),
        ({"layers": []}, CorruptCheckpoint, "layers is"),
        ({"tcq": {}}, CorruptCheckpoint, "trellis table 2x12"),
        ({"embedding": {"bits": 4}}, CorruptCheckpoint, "embedding.bits is 4"),
    ],
)
def test_broken_fields_of_our_format_are_named(
    tiny_folder: Path,
    tmp_path: Path,
    fields: dict[str, Any],
    error: type[VqllmError],
    message: str,
) -> None:
    write(tiny_folder, tmp_path / "q", trellis)
    change_config(tmp_path / "q", **fields)
    with pytest.raises(error, match=message):
        Checkpoint(tmp_path / "q").linear(NAME)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "awq"}, "method 'awq'"),
        ({"trellis_bits": 13}, "2x13"),
        ({"bits": None}, "bits"),
    ],
)
def test_broken_entries_of_our_format_are_named(
    tiny_folder: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    write(tiny_folder, tmp_path / "q", trellis)
    path = tmp_path / "q" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["layers"][NAME].update(change)
    path.write_text(json.dumps(config))
    with pytest.raises((CorruptCheckpoint, UnsupportedModel), match=message):
        Checkpoint(tmp_path / "q").linear(NAME)


# --- writing ----------------------------------------------------------------------------------


def test_a_format_that_cannot_hold_the_layers_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(VqllmError, match="format 'gptq' cannot hold"):
        write(tiny_folder, tmp_path / "q", vectors, FolderPlan(form="gptq"))
    with pytest.raises(VqllmError, match="format 'vptq' cannot hold"):
        write(tiny_folder, tmp_path / "q", vectors, FolderPlan(form="vptq", embedding_bits=8))
    assert not list(tmp_path.glob("*q*"))


def test_wrong_linears_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    source = Checkpoint(tiny_folder)
    with CheckpointWriter(source, tmp_path / "q", FolderPlan()) as writer:
        with pytest.raises(VqllmError, match=r"no linear called model\.layers\.9"):
            writer.add_linear("model.layers.9.mlp.up_proj", grouped((160, 64), 0))
        with pytest.raises(VqllmError, match=r"is \(64, 64\), the model's is \(160, 64\)"):
            writer.add_linear(NAME, grouped((64, 64), 0))
        for seed, name in enumerate(source.linear_names()):
            writer.add_linear(name, grouped(source.linear_shape(name), seed))
    with pytest.raises(VqllmError, match="exists already"):
        CheckpointWriter(source, tmp_path / "q", FolderPlan())


def test_a_full_disk_is_named_and_leaves_nothing(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensor_spool, "_copy", full)
    with pytest.raises(DiskFull, match=r"model\.safetensors: cannot be written.*No space left"):
        write(tiny_folder, tmp_path / "q", grouped)
    assert not list(tmp_path.glob("*q*"))


@pytest.mark.parametrize("fields", [{"embedding_bits": 4}, {"form": "awq"}])
def test_impossible_plans_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidConfig, match="one of"):
        FolderPlan(**fields)


def test_the_card_tells_sizes_and_readers(tiny_folder: Path, tmp_path: Path) -> None:
    write(tiny_folder, tmp_path / "vptq", vectors, FolderPlan("Random indices."))
    write(tiny_folder, tmp_path / "ours", trellis, FolderPlan(transform={"down_seed": 1}))
    card = (tmp_path / "vptq" / "README.md").read_text()
    info = Checkpoint(tmp_path / "vptq").info()
    for fact in (f"{info.bpw:.3f}", f"{info.file_bytes:,} bytes", "Random indices.", "VPTQ"):
        assert fact in card
    ours = (tmp_path / "ours" / "README.md").read_text()
    assert "integrations.transformers" in ours
    assert "seeded Hadamard" in ours
