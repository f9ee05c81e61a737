"""The shipped models: one safetensors file and one model card (.md) each.

Adding a model means putting both files here. Knows nothing of how models are trained or served.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from scq.errors import UnknownModel
from scq.model import ModelConfig, ScqAutoencoder, load_model, read_model_file

_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class ModelInfo:
    """A shipped model: `model_hash` is the hex content id whose first 4 bytes mark its codes."""

    name: str
    model_hash: str
    config: ModelConfig
    path: Path


def list_models() -> list[ModelInfo]:
    """All shipped models, sorted by name."""
    return [_info(path) for path in sorted(_FOLDER.glob("*.safetensors"))]


def info(name: str) -> ModelInfo:
    """One shipped model's description. Raises UnknownModel naming those there are."""
    path = _FOLDER / f"{name}.safetensors"
    names = sorted(path.stem for path in _FOLDER.glob("*.safetensors"))
    if name not in names:
        raise UnknownModel(name, names)
    return _info(path)


def load(name: str) -> ScqAutoencoder:
    """A shipped model, float32 in eval mode. Raises UnknownModel naming those there are."""
    return load_model(info(name).path)


@cache
def _info(path: Path) -> ModelInfo:
    stored = read_model_file(path)
    return ModelInfo(stored.config.name, stored.model_hash, stored.config, path)
