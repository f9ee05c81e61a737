"""Which layout lies at a path, and its pictures. The one way into the data sets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from scq.data import ImageSet
from scq.datasets import camvid, cifar10, folders, food101, gtsrb
from scq.datasets.base import Layout, OpenOptions
from scq.errors import ScqError

# In the order in which they are tried; the last one takes any path.
LAYOUTS = (
    cifar10.LAYOUT,
    gtsrb.LAYOUT,
    food101.LAYOUT,
    camvid.LAYOUT,
    folders.SPLIT_LAYOUT,
    folders.PLAIN_LAYOUT,
)
# Archives unpack into one or two folders of their own; more sub-folders than this are classes.
_MAX_WRAPPERS = 6


@dataclass(frozen=True)
class SplitInfo:
    """Counts of one split. `largest`, `smallest`: (width, height) over a sample of its pictures."""

    name: str
    num_images: int
    num_classes: int
    smallest: tuple[int, int]
    largest: tuple[int, int]


@dataclass(frozen=True)
class DatasetInfo:
    """What lies at a path: the layout's name, its own folder, its splits."""

    layout: str
    root: Path
    splits: tuple[SplitInfo, ...]


def open_dataset(
    path: Path | str, split: str = folders.ALL, options: OpenOptions | None = None
) -> ImageSet:
    """One split ("train", "val", "test"; "all" of plain pictures) of the data set at `path`.

    `path` is the folder of an official layout (CIFAR-10 binary, GTSRB, Food-101, CamVid) or one
    or two folders above it, a folder with train/test folders or zips, or plain pictures.

    Raises:
        ScqError: no such path or split, or a broken layout, naming the file and the remedy.
    """
    layout, root = find_layout(Path(path))
    return layout.open_split(root, split, options or OpenOptions())


def find_layout(path: Path) -> tuple[Layout, Path]:
    """The layout at `path` and the folder that it starts in. Raises ScqError for a missing path."""
    if not path.exists():
        raise ScqError(f"{path}: no such file or folder; see: scq data fetch --help")
    if path.is_dir():
        for root in _roots(path):
            for layout in LAYOUTS[:-1]:
                if layout.matches(root):
                    return layout, root
    return LAYOUTS[-1], path


def describe(path: Path | str, sample: int = 20) -> DatasetInfo:
    """Layout, splits, counts and picture sizes (over `sample` spread pictures of each split)."""
    layout, root = find_layout(Path(path))
    splits = tuple(
        _describe_split(name, layout.open_split(root, name, OpenOptions()), sample)
        for name in layout.splits(root)
    )
    return DatasetInfo(layout.name, root, splits)


def _describe_split(name: str, images: ImageSet, sample: int) -> SplitInfo:
    step = max(1, len(images) // sample)
    shapes = [images.images[i].shape for i in range(0, len(images), step)]
    sizes = sorted(((shape[1], shape[0]) for shape in shapes), key=lambda size: size[0] * size[1])
    return SplitInfo(name, len(images), len(images.classes), sizes[0], sizes[-1])


def _roots(path: Path) -> Iterator[Path]:
    yield path
    for child in _wrapped(path):
        yield child
        yield from _wrapped(child)


def _wrapped(path: Path) -> list[Path]:
    children = sorted(item for item in path.iterdir() if item.is_dir())
    return children if len(children) <= _MAX_WRAPPERS else []
