"""Pictures read when they are asked for, the latest ones kept in a cache of bounded size.

Knows stores (folders, zips) and how to decode a file; knows no layouts and no labels.
"""

from __future__ import annotations

import zipfile
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol, overload

from scq.data import PictureSequence
from scq.datasets.ppm import read_ppm
from scq.errors import InvalidImage, ScqError
from scq.images import Pixels, read_image

PICTURE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".ppm"})
CACHE_BYTES = 512 << 20


class PictureStore(Protocol):
    """Files by name. `where` says where a name lies, for messages."""

    def read(self, name: str) -> bytes: ...

    def where(self, name: str) -> str: ...


@dataclass(frozen=True)
class FolderStore:
    """Files below `root`, named by their path relative to it."""

    root: Path

    def read(self, name: str) -> bytes:
        return (self.root / name).read_bytes()

    def where(self, name: str) -> str:
        return str(self.root / name)


class ZipStore:
    """Entries of a zip. Raises ScqError when `path` is no readable zip."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._archive = zipfile.ZipFile(path)
        except (OSError, zipfile.BadZipFile) as error:
            raise ScqError(f"{path}: not a readable zip: {error}") from error

    def names(self) -> list[str]:
        """Every entry, sorted."""
        return sorted(self._archive.namelist())

    def read(self, name: str) -> bytes:
        try:
            return self._archive.read(name)
        except zipfile.BadZipFile as error:
            raise InvalidImage(f"{self.where(name)}: cannot be read: {error}") from error

    def where(self, name: str) -> str:
        return f"{self.path}:{name}"


@dataclass(frozen=True)
class Picture:
    """One picture of a store. `box` (left, top, right, bottom) is the part of it to keep."""

    name: str
    box: tuple[int, int, int, int] | None = None


class PictureCache:
    """The pictures read last, up to `max_bytes`."""

    def __init__(self, max_bytes: int) -> None:
        if max_bytes < 0:
            raise ScqError(f"cache_bytes must be >= 0, got {max_bytes}")
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._pictures: OrderedDict[Picture, Pixels] = OrderedDict()

    def get(self, key: Picture) -> Pixels | None:
        """The picture, now the one used last; None if it is not held."""
        if key not in self._pictures:
            return None
        self._pictures.move_to_end(key)
        return self._pictures[key]

    def put(self, key: Picture, pixels: Pixels) -> None:
        """Hold the picture; forget those unused longest. One larger than the bound is not held."""
        if pixels.nbytes > self.max_bytes or key in self._pictures:
            return
        self._pictures[key] = pixels
        self.num_bytes += pixels.nbytes
        while self.num_bytes > self.max_bytes:
            self.num_bytes -= self._pictures.popitem(last=False)[1].nbytes


class LazyPictures(PictureSequence):
    """Pictures of a store in a fixed order, decoded on access. Selections share the cache.

    A file that is missing, damaged or smaller than its box raises on access, naming the file.
    """

    def __init__(
        self, store: PictureStore, pictures: Sequence[Picture], cache: PictureCache | None = None
    ) -> None:
        self.store = store
        self.pictures = tuple(pictures)
        self.cache = PictureCache(CACHE_BYTES) if cache is None else cache

    def __len__(self) -> int:
        return len(self.pictures)

    @overload
    def __getitem__(self, position: int) -> Pixels: ...

    @overload
    def __getitem__(self, position: slice) -> LazyPictures: ...

    def __getitem__(self, position: int | slice) -> Pixels | LazyPictures:
        if isinstance(position, slice):
            return LazyPictures(self.store, self.pictures[position], self.cache)
        picture = self.pictures[position]
        pixels = self.cache.get(picture)
        if pixels is None:
            pixels = self._read(picture)
            self.cache.put(picture, pixels)
        return pixels

    def select(self, positions: Sequence[int]) -> LazyPictures:
        """The pictures at `positions`, unread."""
        return LazyPictures(self.store, [self.pictures[i] for i in positions], self.cache)

    def _read(self, picture: Picture) -> Pixels:
        where = self.store.where(picture.name)
        pixels = decode_picture(self.store.read(picture.name), where)
        if picture.box is None:
            return pixels
        left, top, right, bottom = picture.box
        if not (0 <= left < right <= pixels.shape[1] and 0 <= top < bottom <= pixels.shape[0]):
            raise InvalidImage(
                f"{where}: is {pixels.shape[1]}x{pixels.shape[0]}, its region of interest "
                f"{picture.box} lies outside; check the csv or open the set without roi"
            )
        return pixels[top:bottom, left:right].copy()


def decode_picture(data: bytes, where: str) -> Pixels:
    """JPEG, PNG, WebP or binary PPM -> (H, W, 3) uint8. Raises InvalidImage naming `where`."""
    try:
        return read_ppm(data) if data[:2] == b"P6" else read_image(data)
    except InvalidImage as error:
        raise InvalidImage(f"{where}: cannot decode: {error}") from error


def is_picture(name: str) -> bool:
    """Whether the suffix is one of a picture that can be decoded."""
    return PurePosixPath(name).suffix.lower() in PICTURE_SUFFIXES
