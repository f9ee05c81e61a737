"""The few calls of the CUDA driver that launching a kernel takes, through ctypes.

Uses the primary context of a device, which is the one that torch uses. Knows no kernel.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

from vqkernels.errors import KernelError

# CUfunction_attribute and CUdevice_attribute.
_MAX_DYNAMIC_SHARED = 8
_MULTIPROCESSOR_COUNT = 16
_MAX_SHARED_PER_BLOCK_OPTIN = 97

_STATIC_LIMIT = 48 * 1024  # dynamic shared memory that needs no permission
_NAME_BYTES = 256

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
    """Compiled kernels on one device.

    Attributes:
        name: what the driver calls the device.
        processors: its multiprocessors.
        shared_bytes: shared memory that a block may have if it asks.
    """

    def __init__(self, image: bytes, device: int = 0) -> None:
        """`device` counts the devices that this process sees.

        Raises:
            CudaUnavailableError: no such device, or the driver cannot load the image.
        """
        self._library = _driver()
        self._device = ctypes.c_int()
        self._call("cuDeviceGet", ctypes.byref(self._device), device)
        # torch makes this context on its first use of the device, which may still be to come, and
        # makes it current in a thread on that thread's first use. So it is held here.
        self._context = ctypes.c_void_p()
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), self._device)
        self._enter()
        self._image = image  # the driver may read it later
        self._module = ctypes.c_void_p()
        self._call("cuModuleLoadData", ctypes.byref(self._module), image)
        self._functions: dict[str, ctypes.c_void_p] = {}
        self._shared: dict[str, int] = {}
        self.name = self._read_name()
        self.processors = self._attribute(_MULTIPROCESSOR_COUNT)
        self.shared_bytes = self._attribute(_MAX_SHARED_PER_BLOCK_OPTIN)

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
        self._enter()
        function = self._function(name)
        self._allow(name, function, shared_bytes)
        pointers = [ctypes.cast(ctypes.byref(a), ctypes.c_void_p) for a in arguments]
        packed = (ctypes.c_void_p * len(pointers))(*pointers)
        sizes = (*grid, 1, 256, 1, 1, shared_bytes)
        handle = ctypes.c_void_p(stream)
        self._call("cuLaunchKernel", function, *sizes, handle, packed, None)

    def _enter(self) -> None:
        """Give this thread the context if it has none yet."""
        current = ctypes.c_void_p()
        self._call("cuCtxGetCurrent", ctypes.byref(current))
        if not current:
            self._call("cuCtxSetCurrent", self._context)

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

    def _attribute(self, attribute: int) -> int:
        value = ctypes.c_int()
        self._call("cuDeviceGetAttribute", ctypes.byref(value), attribute, self._device)
        return value.value

    def _read_name(self) -> str:
        buffer = ctypes.create_string_buffer(_NAME_BYTES)
        self._call("cuDeviceGetName", buffer, _NAME_BYTES, self._device)
        return buffer.value.decode()

    def _call(self, name: str, *arguments: object) -> None:
        _check(self._library, getattr(self._library, name)(*arguments), name)
