"""What a phone needs of a model, as files: `export_model` writes, `read_bundle` checks."""

from scq.export.bundle import Artifact, Bundle, ExportConfig, export_model, read_bundle
from scq.export.calibration import ImagesForCalibration

__all__ = [
    "Artifact",
    "Bundle",
    "ExportConfig",
    "ImagesForCalibration",
    "export_model",
    "read_bundle",
]
