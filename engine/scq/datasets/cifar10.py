"""CIFAR-10, binary version: records of one label byte and three 32x32 planes.

The "python version" holds pickles, which can run code when they are read: it is refused.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from scq.data import ImageSet
from scq.datasets.base import Layout, OpenOptions, check_split, read_lines
from scq.errors import ScqError

_RECORD_BYTES = 1 + 3 * 32 * 32
_REMEDY = "unpack cifar-10-binary.tar.gz again, or run: scq data fetch cifar10"
CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip


def _matches(root: Path) -> bool:
    if any(root.glob("data_batch_*.bin")) or (root / "test_batch.bin").exists():
        return True
    if (root / "data_batch_1").exists() and (root / "batches.meta").exists():
        raise ScqError(
            f"{root}: this is the python version of CIFAR-10, pickles that are never unpickled "
            "here; get the binary version (cifar-10-binary.tar.gz): scq data fetch cifar10"
        )
    return False


def _splits(root: Path) -> tuple[str, ...]:
    found = {"train": any(root.glob("data_batch_*.bin")), "test": _test_file(root).exists()}
    return tuple(name for name, there in found.items() if there)


def _open_split(root: Path, split: str, _: OpenOptions) -> ImageSet:
    check_split(root, split, _splits(root))
    files = sorted(root.glob("data_batch_*.bin")) if split == "train" else [_test_file(root)]
    classes = _classes(root)
    images, names, labels = [], [], []
    for file in files:
        records = _read_records(file, len(classes))
        planes = records[:, 1:].reshape(-1, 3, 32, 32)
        images += list(np.ascontiguousarray(planes.transpose(0, 2, 3, 1)))
        names += [f"{file.stem}/{number:05d}" for number in range(len(records))]
        labels += records[:, 0].tolist()
    return ImageSet(tuple(images), tuple(names), tuple(labels), classes)


def _read_records(file: Path, num_classes: int) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    data = np.fromfile(file, np.uint8)
    if data.size == 0 or data.size % _RECORD_BYTES:
        raise ScqError(
            f"{file}: {data.size} bytes are no whole number of {_RECORD_BYTES}-byte records "
            f"(the official files have 30730000); {_REMEDY}"
        )
    records = data.reshape(-1, _RECORD_BYTES)
    if int(records[:, 0].max()) >= num_classes:
        raise ScqError(
            f"{file}: label {int(records[:, 0].max())} of {num_classes} classes; this is another "
            f"data set or a damaged file; {_REMEDY}"
        )
    return records


def _classes(root: Path) -> tuple[str, ...]:
    meta = root / "batches.meta.txt"
    return tuple(read_lines(meta, _REMEDY)) if meta.exists() else CLASSES


def _test_file(root: Path) -> Path:
    return root / "test_batch.bin"


LAYOUT = Layout("cifar10 (binary version)", _matches, _splits, _open_split)
