"""Everything that can go wrong in a kernel call, as one hierarchy.

Must not know of any kernel, transport or model: callers translate these classes at their own edge.
"""

from __future__ import annotations


class KernelError(Exception):
    """Base class of every error raised by vqkernels."""


class ShapeError(KernelError, ValueError):
    """An array has the wrong number of dimensions or a size the kernel cannot take."""


class DtypeError(KernelError, TypeError):
    """An array has the wrong element type."""


class NonFiniteError(KernelError, ValueError):
    """An input holds NaN or infinity."""


class LayoutError(KernelError, ValueError):
    """A checkpoint stores its weights in a way the kernel does not support."""


class IsaError(KernelError, ValueError):
    """An instruction-set tier was asked for that this CPU or this build cannot run."""


class NativeUnavailableError(KernelError, RuntimeError):
    """The native library was not built, cannot be loaded, or has another ABI version."""


class NativeCallError(KernelError, RuntimeError):
    """The native library refused a call for a reason the caller's arrays do not explain."""
