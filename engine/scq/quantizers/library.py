"""The one place that imports vector-quantize-pytorch, and only when a quantizer needs it."""

from __future__ import annotations

from types import ModuleType

from scq.errors import UnsupportedOperation


def load_library(name: str) -> ModuleType:
    """The library's module. Raises UnsupportedOperation naming the extra that installs it."""
    try:
        import vector_quantize_pytorch
    except ImportError as error:
        raise UnsupportedOperation(
            f"quantizer {name!r} needs vector-quantize-pytorch; "
            "install it with pip install 'vqstack[baselines]'"
        ) from error
    module: ModuleType = vector_quantize_pytorch
    return module
