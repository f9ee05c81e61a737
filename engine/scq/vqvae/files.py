"""A VQ-VAE on disk: a folder of safetensors with their configurations as JSON. No pickle.

config.json         the model's configuration, also in the file's metadata
model.safetensors   weights; static entropy tables as tables.<level>.symbols.<position>
prior.safetensors   weights of the priors as prior.<level>.*, where priors were trained
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from scq.errors import ScqError
from scq.quantizers import SymbolTables
from scq.vqvae.config import VqVaeConfig
from scq.vqvae.model import VqVae
from scq.vqvae.prior import CodePrior, PriorConfig

_MODEL_FORMAT, _PRIOR_FORMAT = "scq-vqvae-1", "scq-prior-1"
_TABLES = "tables."


@dataclass(frozen=True)
class VqVaeBundle:
    """A model with what belongs to it. tables, priors: one per level, or empty.

    grid: (rows, columns) of the coarsest grid that the priors were trained on. classes: names of
    the priors' labels.
    """

    model: VqVae
    tables: tuple[SymbolTables, ...] = ()
    priors: tuple[CodePrior, ...] = ()
    grid: tuple[int, int] = (0, 0)
    classes: tuple[str, ...] = ()


def save_bundle(bundle: VqVaeBundle, folder: Path) -> None:
    """Write the folder's files, replacing older ones."""
    folder.mkdir(parents=True, exist_ok=True)
    config = bundle.model.config.to_json()
    (folder / "config.json").write_text(config + "\n")
    tensors = _contiguous(bundle.model)
    for level, tables in enumerate(bundle.tables):
        tensors |= {f"{_TABLES}{level}.{k}": v for k, v in tables.to_tensors().items()}
    metadata = {"format": _MODEL_FORMAT, "config": config}
    save_file(tensors, str(folder / "model.safetensors"), metadata=metadata)
    if bundle.priors:
        _save_priors(bundle, folder / "prior.safetensors")
    else:
        (folder / "prior.safetensors").unlink(missing_ok=True)


def load_bundle(folder: Path) -> VqVaeBundle:
    """Read what `save_bundle` wrote, in eval mode. Raises ScqError."""
    metadata, tensors = _read(folder / "model.safetensors", _MODEL_FORMAT)
    model = VqVae(VqVaeConfig.from_json(metadata["config"]))
    weights = {k: v for k, v in tensors.items() if not k.startswith(_TABLES)}
    _load(model, weights, folder)
    levels = range(model.config.levels)
    tables = tuple(
        SymbolTables.from_tensors(_with_prefix(tensors, f"{_TABLES}{level}."))
        for level in levels
        if _with_prefix(tensors, f"{_TABLES}{level}.")
    )
    bundle = VqVaeBundle(model.eval().requires_grad_(False), tables)
    path = folder / "prior.safetensors"
    return _with_priors(bundle, path) if path.exists() else bundle


def _save_priors(bundle: VqVaeBundle, path: Path) -> None:
    tensors = {
        f"prior.{level}.{name}": tensor
        for level, prior in enumerate(bundle.priors)
        for name, tensor in _contiguous(prior).items()
    }
    described = {
        "priors": [asdict(prior.config) for prior in bundle.priors],
        "grid": bundle.grid,
        "classes": bundle.classes,
    }
    metadata = {"format": _PRIOR_FORMAT, "config": json.dumps(described)}
    save_file(tensors, str(path), metadata=metadata)


def _with_priors(bundle: VqVaeBundle, path: Path) -> VqVaeBundle:
    metadata, tensors = _read(path, _PRIOR_FORMAT)
    try:
        described = json.loads(metadata["config"])
        configs = [PriorConfig(**_tuples(values)) for values in described["priors"]]
        rows, columns = described["grid"]
        classes = tuple(str(name) for name in described["classes"])
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise ScqError(f"{path}: prior config is not valid: {error}") from error
    priors = [CodePrior(config).eval().requires_grad_(False) for config in configs]
    for level, prior in enumerate(priors):
        _load(prior, _with_prefix(tensors, f"prior.{level}."), path)
    return VqVaeBundle(bundle.model, bundle.tables, tuple(priors), (rows, columns), classes)


def _read(path: Path, expected: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ScqError(f"{path}: cannot read: {error}") from error
    if metadata.get("format") != expected or "config" not in metadata:
        raise ScqError(f"{path}: not a {expected} file; make one with scq vqvae train")
    return metadata, tensors


def _load(module: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        raise ScqError(f"{path}: tensors do not fit the config: {error}") from error


def _contiguous(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in module.state_dict().items()}


def _with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
