"""Training configurations of the experiments, one JSON file each, by name.

`scq train --model NAME --data ...` runs one. Knows files only.
"""

from __future__ import annotations

from pathlib import Path

from scq.errors import ScqError
from scq.training_config import TrainConfig

_FOLDER = Path(__file__).parent


def experiment_names() -> tuple[str, ...]:
    """All experiments, sorted."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.json")))


def load_experiment(name: str) -> TrainConfig:
    """One experiment's configuration. Raises ScqError naming those there are."""
    if name not in experiment_names():
        raise ScqError(f"unknown experiment {name!r}; available: {', '.join(experiment_names())}")
    return TrainConfig.from_json((_FOLDER / f"{name}.json").read_text())
