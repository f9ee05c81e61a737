"""Food-101: images/<class>/<id>.jpg, and lists of the two splits in meta. Knows the layout only."""

from __future__ import annotations

from pathlib import Path

from scq.data import ImageSet
from scq.datasets.base import Layout, OpenOptions, check_split, missing_pictures, read_lines
from scq.datasets.lazy import FolderStore, LazyPictures, Picture, PictureCache
from scq.errors import ScqError

_SPLITS = ("train", "test")
_REMEDY = "unpack food-101.tar.gz again, or run: scq data fetch food101"


def _matches(root: Path) -> bool:
    return (root / "images").is_dir() and (root / "meta").is_dir()


def _splits(root: Path) -> tuple[str, ...]:
    return tuple(name for name in _SPLITS if (root / "meta" / f"{name}.txt").exists())


def _open_split(root: Path, split: str, options: OpenOptions) -> ImageSet:
    check_split(root, split, _SPLITS)
    table = root / "meta" / f"{split}.txt"
    listed = read_lines(table, _REMEDY)
    classes = _classes(root, table, listed)
    names = [f"images/{name}.jpg" for name in listed]
    missing = [str(root / name) for name in names if not (root / name).exists()]
    if missing:
        raise missing_pictures(missing, len(names), _REMEDY)
    numbers = {name: number for number, name in enumerate(classes)}
    labels = tuple(numbers[name.split("/")[0]] for name in listed)
    cache = PictureCache(options.cache_bytes)
    images = LazyPictures(FolderStore(root), [Picture(name) for name in names], cache)
    return ImageSet(images, tuple(names), labels, classes)


def _classes(root: Path, table: Path, listed: list[str]) -> tuple[str, ...]:
    wrong = next((name for name in listed if name.count("/") != 1 or ".." in name), None)
    if wrong is not None:
        raise ScqError(f"{table}: {wrong!r} is not <class>/<id>; {_REMEDY}")
    used = {name.split("/")[0] for name in listed}
    folders = {item.name for item in (root / "images").iterdir() if item.is_dir()}
    if used - folders:
        raise ScqError(
            f"{root / 'images'}: has no folder {min(used - folders)!r}, which {table.name} lists; "
            f"{_REMEDY}"
        )
    declared = root / "meta" / "classes.txt"
    if not declared.exists():
        return tuple(sorted(used))
    classes = tuple(read_lines(declared, _REMEDY))
    if used - set(classes):
        raise ScqError(
            f"{declared}: does not name {min(used - set(classes))!r}, which {table.name} lists; "
            f"{_REMEDY}"
        )
    return classes


LAYOUT = Layout("food101 (official)", _matches, _splits, _open_split)
