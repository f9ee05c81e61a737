"""The few calls of the CUDA driver that launching a kernel takes, through ctypes.

Uses the context that torch has made current. Knows no kernel.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

from vqkernels.errors import KernelError

_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_STATIC_LIMIT = 48 * 1024  # dynamic shared memory that needs no permission

Argument = ctypes.c_void_p | ctypes.c_int | ctypes.c_uint


class CudaUnavailableError(KernelError, RuntimeError):
    """There is no CUDA driver or device, or the driver refused a call; says which."""


@functools.cache
def _driver() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise CudaUnavailableError(f"no CUDA driver: {error}") from error
    _check(library, library.cuInit(0), "cuInit")
    return library


def _check(library: ctypes.CDLL, status: int, call: str) -> None:
    if status:
        text = ctypes.c_char_p()
        library.cuGetErrorString(status, ctypes.byref(text))
        reason = (text.value or b"unknown error").decode()
        raise CudaUnavailableError(f"{call} failed with status {status}: {reason}")


class CudaModule:
    """Compiled kernels, loaded into the current context."""

    def __init__(self, image: bytes) -> None:
        """Raises CudaUnavailableError when the driver cannot load the image."""
        self._library = _driver()
        self._image = image  # the driver may read it later
        self._module = ctypes.c_void_p()
        self._call("cuModuleLoadData", ctypes.byref(self._module), image)
        self._functions: dict[str, ctypes.c_void_p] = {}
        self._shared: dict[str, int] = {}

    def launch(
        self,
        name: str,
        grid: tuple[int, int],
        shared_bytes: int,
        stream: int,
        arguments: Sequence[Argument],
    ) -> None:
        """Start kernel `name` with 256 threads a block on a stream; returns at once.

        Raises:
            CudaUnavailableError: there is no such kernel, or the driver refused the launch.
        """
        function = self._function(name)
        self._allow(name, function, shared_bytes)
        pointers = [ctypes.cast(ctypes.byref(a), ctypes.c_void_p) for a in arguments]
        packed = (ctypes.c_void_p * len(pointers))(*pointers)
        sizes = (*grid, 1, 256, 1, 1, shared_bytes)
        handle = ctypes.c_void_p(stream)
        self._call("cuLaunchKernel", function, *sizes, handle, packed, None)

    def _function(self, name: str) -> ctypes.c_void_p:
        if name not in self._functions:
            function = ctypes.c_void_p()
            self._call("cuModuleGetFunction", ctypes.byref(function), self._module, name.encode())
            self._functions[name] = function
        return self._functions[name]

    def _allow(self, name: str, function: ctypes.c_void_p, shared_bytes: int) -> None:
        """Ask for more shared memory than every kernel may have, once per larger size."""
        if shared_bytes > max(_STATIC_LIMIT, self._shared.get(name, 0)):
            self._call("cuFuncSetAttribute", function, _MAX_DYNAMIC_SHARED, shared_bytes)
            self._shared[name] = shared_bytes

    def _call(self, name: str, *arguments: object) -> None:
        _check(self._library, getattr(self._library, name)(*arguments), name)
