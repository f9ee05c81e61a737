"""Native kernels behind plain Python functions, each with a numpy reference beside it.

Must not know models, transports or the environment. Importing it loads nothing: the library is
opened at the first call, and :func:`native_status` says whether that will work.
"""

from vqkernels.errors import (
    DtypeError,
    IsaError,
    KernelError,
    LayoutError,
    NativeCallError,
    NativeUnavailableError,
    NonFiniteError,
    ShapeError,
)
from vqkernels.isa import Isa, forced_isa, get_isa, set_isa, supported_isas
from vqkernels.pool import ThreadPool
from vqkernels.status import NativeStatus, native_status

__all__ = [
    "DtypeError",
    "Isa",
    "IsaError",
    "KernelError",
    "LayoutError",
    "NativeCallError",
    "NativeStatus",
    "NativeUnavailableError",
    "NonFiniteError",
    "ShapeError",
    "ThreadPool",
    "forced_isa",
    "get_isa",
    "native_status",
    "set_isa",
    "supported_isas",
]
