"""A model's bundle: graphs, codebook, entropy tables and a manifest that hashes them all.

`manifest.json` names every file with its size and SHA-256, and everything a device must know to
write SCQ1 frames: the model id, the lattice, the strides. Must not know about services.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from scq.errors import ScqError
from scq.export.calibration import ImagesForCalibration
from scq.export.coder import DEFAULT_CANDIDATES
from scq.export.graphs import DecoderGraph, EncoderGraph, RecognizerGraph
from scq.export.onnx_files import OPSET, GraphSpec, write_int8, write_onnx, write_ort
from scq.model import ScqAutoencoder

FORMAT = "scq-bundle-1"
MANIFEST = "manifest.json"

_MEDIA_TYPES = {
    ".onnx": "application/onnx",
    ".ort": "application/octet-stream",
    ".bin": "application/octet-stream",
    ".safetensors": "application/octet-stream",
}


@dataclass(frozen=True)
class ExportConfig:
    """candidates: nearest codes the on-device coder tries. ort: also write ORT-format files.

    calibration: pictures for an int8 encoder, None for float only.
    """

    candidates: int = DEFAULT_CANDIDATES
    ort: bool = True
    calibration: ImagesForCalibration | None = None

    def __post_init__(self) -> None:
        if self.candidates < 1:
            raise ScqError(f"candidates must be >= 1, got {self.candidates}")


@dataclass(frozen=True)
class Artifact:
    """One file of a bundle. size_bytes and sha256 (hex) are of its contents."""

    name: str
    media_type: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Bundle:
    """A bundle in `folder`: the manifest's description of the model and its files."""

    folder: Path
    model: dict[str, Any]
    artifacts: tuple[Artifact, ...]

    def read(self, name: str) -> bytes:
        """Contents of one artifact, verified. Raises ScqError for an unknown or changed file."""
        artifact = next((a for a in self.artifacts if a.name == name), None)
        if artifact is None:
            names = ", ".join(a.name for a in self.artifacts)
            raise ScqError(f"bundle has no file {name!r}; it has {names}")
        content = (self.folder / name).read_bytes()
        if hashlib.sha256(content).hexdigest() != artifact.sha256:
            raise ScqError(f"{self.folder / name} differs from its manifest; export it again")
        return content


def export_model(
    model: ScqAutoencoder, folder: Path | str, config: ExportConfig | None = None
) -> Bundle:
    """Write the bundle of a loaded model into `folder` (made if absent) and return it.

    Raises:
        ScqError: the exporter is not installed.
        UnsupportedOperation: supports above two codes.
    """
    config = config or ExportConfig()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    names = _write_graphs(model, folder, config)
    names += _write_codebook(model, folder)
    artifacts = tuple(_artifact(folder / name) for name in sorted(names))
    manifest = {
        "format": FORMAT,
        "model": _describe(model),
        "artifacts": [asdict(artifact) for artifact in artifacts],
    }
    # Last, so that a folder with a manifest is a whole bundle.
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    return Bundle(folder, manifest["model"], artifacts)  # type: ignore[arg-type]


def read_bundle(folder: Path | str) -> Bundle:
    """The bundle in `folder`; every file is hashed. Raises ScqError for anything incomplete."""
    folder = Path(folder)
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest["format"] != FORMAT:
            raise ScqError(f"{folder}: format {manifest['format']!r} is not {FORMAT}")
        artifacts = tuple(Artifact(**entry) for entry in manifest["artifacts"])
        bundle = Bundle(folder, manifest["model"], artifacts)
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ScqError(f"{folder} holds no bundle; make one with `scq export`: {error}") from error
    for artifact in bundle.artifacts:
        try:
            bundle.read(artifact.name)
        except OSError as error:
            raise ScqError(f"{folder / artifact.name} is missing; export it again") from error
    return bundle


def _write_graphs(model: ScqAutoencoder, folder: Path, config: ExportConfig) -> list[str]:
    metadata = {key: json.dumps(value) for key, value in _describe(model).items()}
    graphs = {
        "encoder": (EncoderGraph(model, config.candidates), _encoder_spec(model)),
        "decoder": (DecoderGraph(model), _decoder_spec(model, "image")),
    }
    if model.head is not None:
        graphs["recognizer"] = (RecognizerGraph(model), _decoder_spec(model, "probabilities"))
    names = []
    for name, (module, spec) in graphs.items():
        write_onnx(module, spec, folder / f"{name}.onnx", metadata)
        names.append(f"{name}.onnx")
    if config.calibration is not None:
        feeds = config.calibration.feeds(model.config)
        write_int8(folder / "encoder.onnx", folder / "encoder.int8.onnx", feeds)
        names.append("encoder.int8.onnx")
    return names + (_write_ort_twins(folder, names) if config.ort else [])


def _write_ort_twins(folder: Path, names: list[str]) -> list[str]:
    twins = [str(Path(name).with_suffix(".ort")) for name in names]
    for name, twin in zip(names, twins, strict=True):
        write_ort(folder / name, folder / twin)
    return twins


def _write_codebook(model: ScqAutoencoder, folder: Path) -> list[str]:
    integers, _ = model.codebook_int16()
    (folder / "codebook.bin").write_bytes(integers.astype("<i2").tobytes())
    if not model.entropy_tensors:
        return ["codebook.bin"]
    tables = {name: tensor.contiguous() for name, tensor in model.entropy_tensors.items()}
    save_file(tables, str(folder / "tables.safetensors"))
    return ["codebook.bin", "tables.safetensors"]


def _describe(model: ScqAutoencoder) -> dict[str, Any]:
    config = model.config
    return {
        "name": config.name,
        "model_id": model.model_hash,
        "kind": config.kind,
        "stride": config.stride,
        "max_width": config.max_width,
        "max_height": config.max_height,
        "code_dim": config.code_dim,
        "num_codes": config.num_codes,
        "max_support": config.max_support,
        "denominator": config.denominator,
        "codebook_exponent": model.codebook_int16()[1],
        "classes": list(config.classes),
        "opset": OPSET,
    }


def _encoder_spec(model: ScqAutoencoder) -> GraphSpec:
    config = model.config
    if config.kind == "crop":
        image, shapes = torch.zeros(1, 3, config.max_height, config.max_width), {}
    else:
        # Open axes count in strides, so that the exporter knows every picture fits the grid.
        rows, columns = torch.export.Dim("rows", min=1), torch.export.Dim("columns", min=1)
        image = torch.zeros(1, 3, 3 * config.stride, 5 * config.stride)
        shapes = {2: config.stride * rows, 3: config.stride * columns}
    return GraphSpec((image,), ("image",), ("indices", "numerators"), (shapes,))


def _decoder_spec(model: ScqAutoencoder, output: str) -> GraphSpec:
    config = model.config
    grid, shapes = (3, 5), {0: torch.export.Dim("rows"), 1: torch.export.Dim("columns")}
    if config.kind == "crop":
        grid, shapes = (config.max_height // config.stride, config.max_width // config.stride), {}
    # Two tensors: the exporter would take one object given twice for one input.
    indices = torch.zeros(*grid, config.max_support, dtype=torch.int64)
    numerators = torch.zeros_like(indices)
    return GraphSpec((indices, numerators), ("indices", "numerators"), (output,), (shapes, shapes))


def _artifact(path: Path) -> Artifact:
    content = path.read_bytes()
    media_type = _MEDIA_TYPES[path.suffix]
    return Artifact(path.name, media_type, len(content), hashlib.sha256(content).hexdigest())
