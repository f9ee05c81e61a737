"""Price lists of machines: one measured, others projected from peak numbers their makers state.

A projection is peak times an efficiency; both stand here and in every report, because they are
assumptions and not measurements.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from vqllm.errors import CorruptCheckpoint, InvalidConfig
from vqllm.plan.fit import Fit
from vqllm.plan.operations import OPERATIONS, Shape

MEASURED, PROJECTED = "measured", "projected"
GIB = 2**30

_DEFAULT = "plan/profiles/zen5-2core.json"


@dataclass(frozen=True)
class Hardware:
    """What a machine can do.

    Attributes:
        name: for the report.
        basis: `measured` or `projected`, of the price list.
        memory_bytes: where weights must fit to run from it.
        bytes_per_second: sustained reading of weights while decoding.
        fits: price list by operation.
        note: processor, date and versions, or the assumptions of a projection.
        validation: relative error on the held-out size by operation, measured machines only.
        timings: rows of (tokens, out, in, seconds) by operation, the held-out size last.
    """

    name: str
    basis: str
    memory_bytes: float
    bytes_per_second: float
    fits: dict[str, Fit]
    note: str = ""
    validation: dict[str, float] = field(default_factory=dict)
    timings: dict[str, list[list[float]]] = field(default_factory=dict)

    def seconds(self, operation: str, shape: Shape) -> float:
        """Time of one operation on one shape.

        Raises:
            InvalidConfig: the profile has no such operation.
        """
        if operation not in self.fits:
            raise InvalidConfig("operation", operation, f"one of {', '.join(self.fits)}")
        return self.fits[operation].seconds(OPERATIONS[operation], shape)

    def to_dict(self) -> dict[str, Any]:
        fits = {name: fit.to_dict() for name, fit in self.fits.items()}
        return {**vars(self), "fits": fits}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Hardware:
        """Raises KeyError or TypeError: not what `to_dict` makes."""
        fits = {name: Fit.from_dict(entry) for name, entry in values["fits"].items()}
        return cls(**{**values, "fits": fits})


@dataclass(frozen=True)
class Peaks:
    """What a maker states of an accelerator, and which part of it is assumed to be reached.

    Attributes:
        matrix_flops: dense tensor throughput of bfloat16, floating-point operations per second.
        vector_flops: float32 outside the tensor units.
        double_flops: float64.
        memory_bytes, bytes_per_second: of the device memory.
    """

    matrix_flops: float
    vector_flops: float
    double_flops: float
    memory_bytes: float
    bytes_per_second: float


# Part of the peak that is assumed: large bfloat16 products; float32 work bound by memory and
# launches; float64 factorizations; streaming of weights while decoding.
MATRIX_PART, VECTOR_PART, DOUBLE_PART, STREAM_PART = 0.4, 0.1, 0.15, 0.6
DISK_BYTES_PER_SECOND = 2e9

# NVIDIA data sheets: A100 80GB SXM (2021), H100 SXM (2023), H200 SXM (2024); dense, no sparsity.
PEAKS = {
    "a100-80gb": Peaks(312e12, 19.5e12, 9.7e12, 80e9, 2.039e12),
    "h100-80gb": Peaks(989e12, 67e12, 34e12, 80e9, 3.35e12),
    "h200-141gb": Peaks(989e12, 67e12, 34e12, 141e9, 4.8e12),
}


def project(name: str, peaks: Peaks, trellis_bits: int = 12) -> Hardware:
    """A price list from stated peaks."""
    matrix = 2 / (MATRIX_PART * peaks.matrix_flops)
    vector = 1 / (VECTOR_PART * peaks.vector_flops)
    double = 1 / (DOUBLE_PART * peaks.double_flops)
    stream = STREAM_PART * peaks.bytes_per_second
    fits = {
        "gemm": Fit(0.0, (matrix,)),
        "gram": Fit(0.0, (2 * vector, 16 / stream)),
        "factorize": Fit(0.0, (4 / 3 * double, 48 / stream)),
        # Feedback in float32; rounding is a few operations per weight, a codebook of 256
        # vectors of 4 two per entry and iteration, a trellis two per state.
        "gptq": Fit(0.0, (2 * vector, 100 * vector)),
        "vptq": Fit(0.0, (2 * vector, 256 * 2 * 20 * vector)),
        "tcq": Fit(0.0, (2 * vector, 2 * 2**trellis_bits * vector)),
        "read": Fit(0.0, (1 / DISK_BYTES_PER_SECOND,)),
        "write": Fit(0.0, (1 / DISK_BYTES_PER_SECOND,)),
    }
    note = (
        f"stated peaks {peaks.matrix_flops / 1e12:.0f} TFLOPS bfloat16, "
        f"{peaks.vector_flops / 1e12:.1f} float32, {peaks.double_flops / 1e12:.1f} float64, "
        f"{peaks.bytes_per_second / 1e12:.2f} TB/s; assumed parts {MATRIX_PART:g}, "
        f"{VECTOR_PART:g}, {DOUBLE_PART:g}, {STREAM_PART:g}; disk 2 GB/s"
    )
    return Hardware(name, PROJECTED, peaks.memory_bytes, stream, fits, note)


def find_hardware(name: str) -> Hardware:
    """A machine by name: `reference` (measured, in the package), a projection, or a profile file.

    Raises:
        InvalidConfig: no such machine.
        CorruptCheckpoint: the file is no profile.
    """
    if name in PEAKS:
        return project(name, PEAKS[name])
    if name == "reference":
        text = resources.files("vqllm").joinpath(_DEFAULT).read_text("utf-8")
        return _parse(text, _DEFAULT)
    path = Path(name)
    if not path.is_file():
        known = ", ".join(("reference", *PEAKS))
        raise InvalidConfig("hardware", name, f"a profile file of `--measure`, or one of {known}")
    return _parse(path.read_bytes(), name)


def _parse(text: str | bytes, name: str) -> Hardware:
    try:
        return Hardware.from_dict(json.loads(text))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptCheckpoint(f"{name} is no hardware profile: {error}") from error
