"""Plain pictures: split folders or zips (train, val, test), or one folder, zip, picture or video.

Sub-folders are classes when every picture lies in one. Folders and zips are read lazily; single
pictures and videos go through `scq.data.load_images`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from scq.data import ImageSet, load_images
from scq.datasets.base import Layout, OpenOptions, check_split
from scq.datasets.lazy import (
    FolderStore,
    LazyPictures,
    Picture,
    PictureCache,
    PictureStore,
    ZipStore,
    is_picture,
)
from scq.errors import ScqError

_SPLITS = ("train", "val", "test")
ALL = "all"


def open_pictures(path: Path, options: OpenOptions) -> ImageSet:
    """Every picture of a folder or zip, unread; of anything else, decoded.

    Raises ScqError for a path that does not exist or holds no pictures.
    """
    source = _source(path)
    if source is None:
        return load_images([path])
    return _image_set(source, _class_names(source), options)


@dataclass(frozen=True)
class _Source:
    """A folder or zip and the names of its pictures, sorted."""

    store: PictureStore
    pictures: tuple[str, ...]


def _source(path: Path) -> _Source | None:
    if path.is_dir():
        names = [item.relative_to(path).as_posix() for item in sorted(path.rglob("*"))]
        return _checked(path, FolderStore(path), names)
    if path.suffix.lower() == ".zip":
        store = ZipStore(path)
        return _checked(path, store, store.names())
    return None


def _checked(path: Path, store: PictureStore, names: Sequence[str]) -> _Source:
    pictures = tuple(name for name in names if is_picture(name))
    if not pictures:
        raise ScqError(f"{path}: holds no pictures; give a folder or zip of JPEG, PNG, WebP or PPM")
    return _Source(store, pictures)


def _class_names(source: _Source) -> frozenset[str]:
    """Names of the class folders; none unless every picture lies in one."""
    folders = frozenset(PurePosixPath(name).parent.name for name in source.pictures)
    return folders if all(folders) else frozenset()


def _image_set(source: _Source, names: frozenset[str], options: OpenOptions) -> ImageSet:
    pictures = [Picture(name) for name in source.pictures]
    images = LazyPictures(source.store, pictures, PictureCache(options.cache_bytes))
    classes = tuple(sorted(names))
    numbers = {name: number for number, name in enumerate(classes)}
    folders = (PurePosixPath(name).parent.name for name in source.pictures)
    labels = tuple(numbers[folder] for folder in folders) if classes else ()
    return ImageSet(images, source.pictures, labels, classes)


def _split_source(root: Path, split: str) -> Path | None:
    return next((p for p in (root / split, root / f"{split}.zip") if p.exists()), None)


def _split_names(root: Path) -> tuple[str, ...]:
    return tuple(name for name in _SPLITS if _split_source(root, name) is not None)


def _open_split(root: Path, split: str, options: OpenOptions) -> ImageSet:
    """Classes are those of all splits together, so that a label means the same in each."""
    check_split(root, split, _split_names(root))
    paths = {name: _split_source(root, name) for name in _split_names(root)}
    sources = {name: _source(path) for name, path in paths.items() if path is not None}
    source = sources[split]
    assert source is not None
    found = [_class_names(other) for other in sources.values() if other is not None]
    classes = frozenset().union(*found) if all(found) else frozenset()
    return _image_set(source, classes, options)


def _open_all(root: Path, split: str, options: OpenOptions) -> ImageSet:
    check_split(root, split, (ALL,))
    return open_pictures(root, options)


SPLIT_LAYOUT = Layout(
    "split folders or zips", lambda root: bool(_split_names(root)), _split_names, _open_split
)
PLAIN_LAYOUT = Layout("plain pictures", lambda root: True, lambda root: (ALL,), _open_all)
