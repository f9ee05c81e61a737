"""Bundles for phones: the graphs agree with torch, the coder with the search, files with hashes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor

from scq.errors import ScqError, UnsupportedOperation
from scq.export import (
    Bundle,
    ExportConfig,
    ImagesForCalibration,
    export_model,
    read_bundle,
)
from scq.export.coder import LatticeCoder
from scq.images import fit_frame
from scq.lattice import LatticeAssignment, LatticeCode, reconstruct, search
from scq.model import ModelConfig, ScqAutoencoder, load_model, save_model

CONFIG = ModelConfig(
    "tiny",
    "frame",
    stride=8,
    max_width=64,
    max_height=64,
    code_dim=4,
    num_codes=16,
    classes=("apple pie", "초밥"),
    patch=4,
    encoder_widths=(8, 8),
    encoder_blocks=(1, 1),
    decoder_widths=(8, 8),
    decoder_blocks=(1, 1),
    head_width=6,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ScqAutoencoder:
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    save_model(ScqAutoencoder(CONFIG), path)
    loaded = load_model(path)
    loaded.entropy_tensors = {"sizes": torch.tensor([[60000, 5536]], dtype=torch.int32)}
    return loaded


@pytest.fixture(scope="module")
def bundle(model: ScqAutoencoder, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (24, 40, 3), dtype=np.uint8) for _ in range(3)]
    config = ExportConfig(candidates=16, calibration=ImagesForCalibration(images))
    return export_model(model, tmp_path_factory.mktemp("bundle"), config)


def run(bundle: Bundle, name: str, **feeds: Any) -> list[np.ndarray[Any, Any]]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(bundle.folder / name), options)
    outputs: list[np.ndarray[Any, Any]] = session.run(None, feeds)
    return outputs


def picture(height: int, width: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    rng = np.random.default_rng(height * 1000 + width)
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("suffix", [".onnx", ".ort"])
@pytest.mark.parametrize("size", [(8, 8), (33, 50), (64, 64)])
def test_the_encoder_graph_chooses_the_servers_codes(
    model: ScqAutoencoder, bundle: Bundle, size: tuple[int, int], suffix: str
) -> None:
    image = picture(*size)
    canvas, _ = fit_frame(image, CONFIG)
    indices, numerators = run(bundle, f"encoder{suffix}", image=canvas.numpy())
    expected = model.quantize(model.encode(canvas))
    assert np.array_equal(indices, expected.indices.numpy())
    assert np.array_equal(numerators, expected.numerators.numpy())


@pytest.mark.parametrize("suffix", [".onnx", ".ort"])
@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (8, 2)])
def test_the_decoder_graph_paints_the_servers_picture(
    model: ScqAutoencoder, bundle: Bundle, grid: tuple[int, int], suffix: str
) -> None:
    latents = torch.randn(grid[0] * grid[1], CONFIG.code_dim)
    assignment = search(latents, model.quantizer.codebook, CONFIG.lattice)
    decoded = model.dequantize(assignment, grid)
    feeds = codes(assignment, grid)
    image = run(bundle, f"decoder{suffix}", **feeds)[0]
    np.testing.assert_allclose(image, model.decode(decoded).numpy(), atol=2e-6)
    scores = run(bundle, f"recognizer{suffix}", **feeds)[0]
    np.testing.assert_allclose(scores, model.classify(decoded).softmax(1).numpy(), atol=2e-6)


def codes(assignment: LatticeAssignment, grid: tuple[int, int]) -> dict[str, Any]:
    return {
        "indices": assignment.indices.reshape(*grid, -1).numpy(),
        "numerators": assignment.numerators.reshape(*grid, -1).numpy(),
    }


def test_the_int8_encoder_stays_near_the_float_one(model: ScqAutoencoder, bundle: Bundle) -> None:
    canvas, _ = fit_frame(picture(64, 64), CONFIG)
    latents = model.encode(canvas).flatten(0, 2)

    def error(name: str) -> float:
        indices, numerators = run(bundle, name, image=canvas.numpy())
        assignment = LatticeAssignment(torch.from_numpy(indices), torch.from_numpy(numerators))
        return squared_error(latents, model.quantizer.codebook, assignment)

    exact, int8 = error("encoder.onnx"), error("encoder.int8.onnx")
    assert exact <= int8 <= 1.2 * exact
    small, large = ((bundle.folder / f"encoder{kind}.onnx") for kind in (".int8", ""))
    assert "QuantizeLinear" in str(small.read_bytes())
    assert "QuantizeLinear" not in str(large.read_bytes())


def squared_error(latents: Tensor, codebook: Tensor, assignment: LatticeAssignment) -> float:
    return float((latents - reconstruct(assignment, codebook)).square().sum())


@pytest.mark.parametrize("max_support", [1, 2])
@pytest.mark.parametrize("denominator", [2, 4, 8])
def test_with_all_codes_as_candidates_the_coder_is_exact(
    max_support: int, denominator: int
) -> None:
    torch.manual_seed(denominator)
    codebook, latents = torch.randn(24, 6), torch.randn(200, 6)
    codebook[7] = codebook[3]
    code = LatticeCode(24, max_support, denominator)
    found = LatticeAssignment(*LatticeCoder(codebook, code, 24)(latents))
    best = squared_error(latents, codebook, search(latents, codebook, code))
    assert squared_error(latents, codebook, found) == pytest.approx(best, rel=1e-6)
    assert bool((found.numerators.sum(1) == denominator).all())
    assert bool((found.numerators[:, :-1] >= found.numerators[:, 1:]).all())
    unused = found.numerators == 0
    assert bool((found.indices == found.indices[:, :1])[unused].all())


def test_fewer_candidates_cost_little() -> None:
    torch.manual_seed(0)
    codebook, latents = torch.randn(128, 8), torch.randn(400, 8)
    code = LatticeCode(128, 2, 4)
    errors = [
        squared_error(
            latents, codebook, LatticeAssignment(*LatticeCoder(codebook, code, n)(latents))
        )
        for n in (128, 32, 1)
    ]
    assert errors[0] <= errors[1] <= 1.05 * errors[0]
    assert errors[1] < errors[2]


def test_wide_supports_are_refused() -> None:
    with pytest.raises(UnsupportedOperation, match="the model has 3"):
        LatticeCoder(torch.randn(16, 4), LatticeCode(16, 3, 4))


def test_the_manifest_describes_and_hashes_everything(
    model: ScqAutoencoder, bundle: Bundle
) -> None:
    found = read_bundle(bundle.folder)
    assert found == bundle
    assert found.model["model_id"] == model.model_hash
    assert found.model["classes"] == ["apple pie", "초밥"]
    names = {artifact.name for artifact in found.artifacts}
    graphs = {"encoder", "decoder", "recognizer", "encoder.int8"}
    expected = {f"{graph}{suffix}" for graph in graphs for suffix in (".onnx", ".ort")}
    assert names == expected | {"codebook.bin", "tables.safetensors"}
    assert {path.name for path in bundle.folder.iterdir()} == names | {"manifest.json"}
    integers, _ = model.codebook_int16()
    assert found.read("codebook.bin") == integers.tobytes()


def copy_of(bundle: Bundle, folder: Path) -> Path:
    for name in (*(artifact.name for artifact in bundle.artifacts), "manifest.json"):
        (folder / name).write_bytes((bundle.folder / name).read_bytes())
    return folder


def test_a_changed_or_missing_file_is_named(bundle: Bundle, tmp_path: Path) -> None:
    folder = copy_of(bundle, tmp_path)
    content = bytearray((folder / "codebook.bin").read_bytes())
    content[0] ^= 1
    (folder / "codebook.bin").write_bytes(content)
    with pytest.raises(ScqError, match=r"codebook\.bin differs from its manifest"):
        read_bundle(folder)
    (folder / "codebook.bin").unlink()
    with pytest.raises(ScqError, match=r"codebook\.bin is missing"):
        read_bundle(folder)
    with pytest.raises(ScqError, match=r"no file 'weights\.bin'"):
        bundle.read("weights.bin")


@pytest.mark.parametrize("manifest", [None, "{", "{}", '{"format": "other"}', "[]"])
def test_a_folder_without_a_good_manifest_is_no_bundle(
    tmp_path: Path, manifest: str | None
) -> None:
    if manifest is not None:
        (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(ScqError, match=r"bundle|format"):
        read_bundle(tmp_path)


def test_exporting_twice_gives_the_same_hashes(
    model: ScqAutoencoder, bundle: Bundle, tmp_path: Path
) -> None:
    again = export_model(model, tmp_path, ExportConfig(candidates=16, ort=False))
    hashes = {artifact.name: artifact.sha256 for artifact in bundle.artifacts}
    assert {a.name: a.sha256 for a in again.artifacts}.items() <= hashes.items()


def test_graphs_carry_the_models_identity(model: ScqAutoencoder, bundle: Bundle) -> None:
    session = onnxruntime.InferenceSession(str(bundle.folder / "encoder.onnx"))
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["model_id"]) == model.model_hash
    assert json.loads(metadata["denominator"]) == CONFIG.denominator


def test_a_crop_model_has_one_size(tmp_path: Path) -> None:
    config = replace(CONFIG, kind="crop", max_width=16, max_height=24, head_pooling="grid")
    torch.manual_seed(0)
    crop = ScqAutoencoder(config).eval().requires_grad_(False)
    crop_bundle = export_model(crop, tmp_path, ExportConfig(ort=False))
    canvas, _ = fit_frame(picture(50, 31), config)
    indices, numerators = run(crop_bundle, "encoder.onnx", image=canvas.numpy())
    feeds = {"indices": indices.reshape(3, 2, -1), "numerators": numerators.reshape(3, 2, -1)}
    assert run(crop_bundle, "recognizer.onnx", **feeds)[0].shape == (1, 2)


@pytest.mark.parametrize("settings", [{"candidates": 0}])
def test_settings_are_checked(settings: dict[str, Any]) -> None:
    with pytest.raises(ScqError, match="candidates"):
        ExportConfig(**settings)
    with pytest.raises(ScqError, match="calibration"):
        ImagesForCalibration([])
