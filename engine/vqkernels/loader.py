"""Finds and types the native CPU library; the only module that speaks ctypes signatures.

The library is package data: it is looked for beside this package and nowhere else, so no
environment variable and no search path can put other code in its place.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.resources
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from typing import Final

from vqkernels.errors import (
    IsaError,
    KernelError,
    NativeCallError,
    NativeUnavailableError,
    NonFiniteError,
    ShapeError,
)

ABI_VERSION: Final = 4
_SUFFIX: Final = ".dylib" if sys.platform == "darwin" else ".so"
LIBRARY_NAME: Final = f"libvqkernels_cpu{_SUFFIX}"
BUILD_INFO_NAME: Final = "_build_info.json"

STATUS_OK: Final = 0
STATUS_NULL: Final = 1
STATUS_SHAPE: Final = 2
STATUS_ISA: Final = 3
STATUS_NONFINITE: Final = 4

_ERROR_BY_STATUS: Final[dict[int, type[KernelError]]] = {
    STATUS_SHAPE: ShapeError,
    STATUS_ISA: IsaError,
    STATUS_NONFINITE: NonFiniteError,
}


@dataclass(frozen=True)
class BuildInfo:
    """What the build wrote down: whether native code was built, why not, and with what."""

    native: bool
    reason: str
    compiler: str
    tiers: tuple[str, ...]


_I32 = ctypes.c_int32
_PTR = ctypes.c_void_p

Signatures = Mapping[str, tuple[type[object] | None, tuple[type[object], ...]]]

_SIGNATURES: Final[Signatures] = {
    "vq_abi_version": (_I32, ()),
    "vq_status_text": (ctypes.c_char_p, (_I32,)),
    "vq_isa_name": (ctypes.c_char_p, (_I32,)),
    "vq_isa_supported": (_I32, (_I32,)),
    "vq_get_isa": (_I32, ()),
    "vq_set_isa": (_I32, (_I32,)),
    "vq_pool_create": (_I32, (_I32, _PTR)),
    "vq_pool_free": (None, (_PTR,)),
    "vq_scq_solve": (_I32, (_PTR, _PTR, _PTR)),
    "vq_scq_differentiate": (_I32, (_PTR, _PTR, _PTR)),
    "vq_scq_nearest": (_I32, (_PTR, _PTR, _PTR)),
    "vq_lattice_search": (_I32, (_PTR,)),
    "vq_lattice_open": (_I32, (_PTR, _I32, _I32, _I32, _PTR)),
    "vq_lattice_close": (None, (_PTR,)),
    "vq_lattice_search_in": (_I32, (_PTR, _PTR)),
    "vq_sweep_trellis": (_I32, (_PTR, _PTR, _PTR)),
    "vq_sweep_grid": (_I32, (_PTR, _PTR, _I32, _PTR)),
    "vq_trellis_decode": (_I32, (_PTR, _PTR, _I32, _I32, _PTR)),
    "vq_trellis_search": (_I32, (_PTR, _PTR, _PTR, _PTR, _I32, _I32, _PTR)),
    "vq_scq1_open": (_I32, (_PTR, _PTR)),
    "vq_scq1_close": (None, (_PTR,)),
    "vq_scq1_unpack": (_I32, (_PTR, _PTR, _PTR)),
    "vq_scq1_pack": (_I32, (_PTR, _PTR, _PTR)),
}


def package_files() -> Traversable:
    """The folder of this package, where the library and the build record are looked for."""
    return importlib.resources.files("vqkernels")


def read_build_info() -> BuildInfo | None:
    """The record of the build, or None in a source tree that was never installed."""
    resource = package_files().joinpath(BUILD_INFO_NAME)
    if not resource.is_file():
        return None
    fields = json.loads(resource.read_text(encoding="utf-8"))
    return BuildInfo(
        native=fields["native"],
        reason=fields["reason"],
        compiler=fields["compiler"],
        tiers=tuple(fields["tiers"]),
    )


@functools.cache
def load_library() -> ctypes.CDLL:
    """The native library with typed functions.

    Raises:
        NativeUnavailableError: it is not installed, does not load, or has another ABI version.
    """
    resource = package_files().joinpath(LIBRARY_NAME)
    if not resource.is_file():
        raise NativeUnavailableError(_missing_reason())
    with importlib.resources.as_file(resource) as path:
        try:
            library = ctypes.CDLL(str(path))
        except OSError as error:
            raise NativeUnavailableError(f"{LIBRARY_NAME} does not load: {error}") from error
    declare(library, _SIGNATURES)
    version = library.vq_abi_version()
    if version != ABI_VERSION:
        raise NativeUnavailableError(
            f"{LIBRARY_NAME} has ABI version {version}, this package needs {ABI_VERSION}; reinstall"
        )
    return library


def declare(library: ctypes.CDLL, signatures: Signatures) -> None:
    """Type functions of the library: result and arguments by name.

    Raises:
        NativeUnavailableError: the library was built before it had one of them.
    """
    for name, (restype, argtypes) in signatures.items():
        function = getattr(library, name, None)
        if function is None:
            raise NativeUnavailableError(f"{LIBRARY_NAME} has no function {name}; reinstall")
        function.restype = restype
        function.argtypes = argtypes


def check_status(status: int, context: str) -> None:
    """Raise the error that belongs to a non-zero ``vq_status``; ``context`` names the call."""
    if status == STATUS_OK:
        return
    text = load_library().vq_status_text(status).decode("ascii")
    raise _ERROR_BY_STATUS.get(status, NativeCallError)(f"{context}: {text}")


def _missing_reason() -> str:
    info = read_build_info()
    if info is None:
        return f"{LIBRARY_NAME} is not installed: run 'pip install -e .' with a C++ compiler"
    if not info.native:
        return f"{LIBRARY_NAME} was not built: {info.reason}; change that and reinstall"
    return f"{LIBRARY_NAME} was built but is missing from the package; reinstall"
