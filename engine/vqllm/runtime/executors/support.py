"""Which models an executor that knows only the plain llama must leave to another."""

from __future__ import annotations

from vqllm.checkpoint import Checkpoint
from vqllm.errors import UnsupportedModel


def needed_features(checkpoint: Checkpoint) -> frozenset[str]:
    """What running a folder takes beyond a plain llama: of its architecture, and rotations."""
    transform = checkpoint.transform
    rotations = {
        "a rotated residual stream": transform.residual_seed is not None,
        "rotated down projections": transform.down_seed is not None,
    }
    return checkpoint.config.features | {name for name, is_there in rotations.items() if is_there}


def refuse_beyond(
    checkpoint: Checkpoint, executor: str, known: frozenset[str] = frozenset()
) -> None:
    """Raise UnsupportedModel where a folder needs a feature that is not in `known`."""
    missing = sorted(needed_features(checkpoint) - known)
    if missing:
        raise UnsupportedModel(
            f"{checkpoint.folder} needs {', '.join(missing)}, which the executor {executor!r} "
            "does not compute; use the executor torch"
        )
