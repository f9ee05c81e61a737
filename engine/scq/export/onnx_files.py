"""torch graphs to ONNX and ORT-format files. The only module that touches those libraries.

They are imported where they are used: exporting is rare and they take seconds to load.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scq.errors import ScqError

OPSET = 18


@dataclass(frozen=True)
class GraphSpec:
    """How a module becomes a graph: example inputs, names, and the axes left open by name."""

    inputs: tuple[Tensor, ...]
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    dynamic_shapes: tuple[dict[int, Any], ...]


def write_onnx(module: nn.Module, spec: GraphSpec, path: Path, metadata: dict[str, str]) -> None:
    """Export `module` at opset 18 with `metadata` as model properties.

    Raises ScqError when the exporter is not installed.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ScqError(
            f"exporting needs {error.name}; install the extra: pip install 'vqstack[export]'"
        ) from error
    with torch.no_grad(), _quiet_exporter():
        program = torch.onnx.export(
            module.eval(),
            spec.inputs,
            dynamo=True,
            opset_version=OPSET,
            input_names=list(spec.input_names),
            output_names=list(spec.output_names),
            dynamic_shapes=spec.dynamic_shapes,
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    onnx.helper.set_model_props(proto, metadata)
    onnx.checker.check_model(proto)
    path.write_bytes(proto.SerializeToString())


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silence what is about the exporter itself: torch internals, torchvision not being there."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def write_ort(source: Path, target: Path) -> None:
    """Optimise an ONNX file for any device and store it in ONNX Runtime's own format."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Extended optimisations fuse operators that a reduced mobile build may lack.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.add_session_config_entry("session.save_model_format", "ORT")
    options.optimized_model_filepath = str(target)
    onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])


def write_int8(source: Path, target: Path, feeds: Sequence[dict[str, Any]]) -> None:
    """Quantize the convolutions of `source` to int8 (QDQ, per channel); the coder stays float.

    The nearest code changes under int8 distances, so only Conv is touched.
    """
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared),
            str(target),
            _Feeds(feeds),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv"],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )


class _Feeds:
    """ONNX Runtime's CalibrationDataReader, by shape rather than by inheritance."""

    def __init__(self, feeds: Sequence[dict[str, Any]]) -> None:
        self._rest: Iterator[dict[str, Any]] = iter(feeds)

    def get_next(self) -> dict[str, Any] | None:
        """The next input, or None at the end."""
        return next(self._rest, None)
