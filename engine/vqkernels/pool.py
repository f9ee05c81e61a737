"""A thread pool owned by the native library; pass one to a kernel to split its outputs."""

from __future__ import annotations

import ctypes

from vqkernels.closing import Closing
from vqkernels.errors import NativeCallError, ShapeError
from vqkernels.loader import check_status, load_library

MAX_THREADS = 256


class ThreadPool(Closing):
    """``num_threads`` workers, the calling thread included. Results do not depend on the number.

    Use as a context manager or call :meth:`close`. Not usable after ``fork``: create a new one in
    the child. Calls from several Python threads take turns.

    Raises:
        ShapeError: ``num_threads`` is not in 1..256.
        NativeUnavailableError: there is no native library.
    """

    def __init__(self, num_threads: int) -> None:
        if not 1 <= num_threads <= MAX_THREADS:
            raise ShapeError(f"num_threads is {num_threads}, must be 1..{MAX_THREADS}")
        self._library = load_library()
        handle = ctypes.c_void_p()
        status = self._library.vq_pool_create(num_threads, ctypes.byref(handle))
        check_status(status, f"ThreadPool({num_threads})")
        self._handle: int | None = handle.value
        self.num_threads = num_threads

    @property
    def handle(self) -> int:
        """The native pointer. Raises NativeCallError once the pool is closed."""
        if self._handle is None:
            raise NativeCallError("the thread pool is closed; create a new one")
        return self._handle

    def close(self) -> None:
        """Join the workers. Safe to call twice; no kernel call may be running on the pool."""
        handle, self._handle = self._handle, None
        if handle is not None:
            self._library.vq_pool_free(handle)
