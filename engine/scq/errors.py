"""Errors of the scq boundary: everything a caller can get wrong, under one base class.

Services map these types to gRPC codes and HTTP statuses; this module knows of neither.
"""

from __future__ import annotations

from collections.abc import Sequence


class ScqError(ValueError):
    """Base of every error that scq raises on purpose. The message names value and remedy."""


class InvalidLatents(ScqError):
    """Latents with NaN or infinity, of the wrong shape or of the wrong dtype."""


class InvalidCodebook(ScqError):
    """A codebook (or lattice code) that cannot quantize: empty, wrong rank, NaN or infinity."""


class InvalidImage(ScqError):
    """Bytes or arrays that are no usable picture: undecodable, truncated, zero-size, bad format."""


class ImageTooLarge(InvalidImage):
    """More pixels than the limit; raised from the file header, before anything is decoded."""

    def __init__(self, width: int, height: int, max_pixels: int) -> None:
        super().__init__(
            f"image is {width}x{height} = {width * height} pixels, the limit is {max_pixels}; "
            "send a smaller image or raise the limit"
        )
        self.width = width
        self.height = height
        self.max_pixels = max_pixels


class CorruptCodes(ScqError):
    """Coded bytes that cannot be a frame: bad magic, version, length, checksum or rank."""


class ReferenceMismatch(CorruptCodes):
    """A delta frame whose reference frame is not the one at hand, or none is at hand."""

    def __init__(self, wanted: int, available: int | None) -> None:
        have = "none is at hand" if available is None else f"the one at hand is {available:08x}"
        super().__init__(
            f"the delta frame changes reference {wanted:08x}, but {have}; ask for a key frame"
        )
        self.wanted = wanted
        self.available = available


class UnknownModel(ScqError):
    """A model name, id or 4-byte hash that nobody here has loaded; names those that are."""

    def __init__(self, wanted: str, available: Sequence[str]) -> None:
        names = ", ".join(sorted(available)) or "none"
        super().__init__(f"unknown model {wanted!r}; available: {names}")
        self.wanted = wanted
        self.available = tuple(sorted(available))


class UnsupportedOperation(ScqError):
    """The model exists but cannot do this, e.g. recognize without a classifier head."""
