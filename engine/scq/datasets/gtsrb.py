"""The German Traffic Sign Recognition Benchmark: PPM pictures and semicolon-separated csv files.

Train: <...>/Images/000NN/*.ppm with GT-000NN.csv beside them. Test: <...>/Images/*.ppm with
GT-final_test.csv beside them or above. Knows the layout only.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from scq.data import GTSRB_CLASSES, ImageSet
from scq.datasets.base import Layout, OpenOptions, check_split, missing_pictures
from scq.datasets.lazy import FolderStore, LazyPictures, Picture, PictureCache
from scq.errors import ScqError

_TRAIN_FOLDERS = ("Final_Training/Images", "Training")
_TEST_FOLDER = "Final_Test/Images"
_TEST_CSV = "GT-final_test.csv"
_BOX_COLUMNS = ("Roi.X1", "Roi.Y1", "Roi.X2", "Roi.Y2")
_REMEDY = "unpack the official archives again, or run: scq data fetch gtsrb"


@dataclass(frozen=True)
class _Row:
    """One line of a csv: picture relative to the set's folder, class, region of interest."""

    name: str
    label: int
    box: tuple[int, int, int, int]


def _train_folder(root: Path) -> Path | None:
    return next((root / name for name in _TRAIN_FOLDERS if (root / name).is_dir()), None)


def _matches(root: Path) -> bool:
    train = _train_folder(root)
    return (root / _TEST_FOLDER).is_dir() or (
        train is not None and ((train / "00000").is_dir() or any(train.glob("000[0-4][0-9]")))
    )


def _splits(root: Path) -> tuple[str, ...]:
    found = {"train": _train_folder(root) is not None, "test": (root / _TEST_FOLDER).is_dir()}
    return tuple(name for name, there in found.items() if there)


def _open_split(root: Path, split: str, options: OpenOptions) -> ImageSet:
    check_split(root, split, _splits(root))
    rows = _train_rows(root) if split == "train" else _test_rows(root)
    missing = [str(root / row.name) for row in rows if not (root / row.name).exists()]
    if missing:
        raise missing_pictures(missing, len(rows), _REMEDY)
    pictures = [Picture(row.name, row.box if options.roi else None) for row in rows]
    images = LazyPictures(FolderStore(root), pictures, PictureCache(options.cache_bytes))
    names = tuple(row.name for row in rows)
    return ImageSet(images, names, tuple(row.label for row in rows), GTSRB_CLASSES)


def _train_rows(root: Path) -> list[_Row]:
    folder = _train_folder(root)
    assert folder is not None
    rows: list[_Row] = []
    for class_folder in sorted(item for item in folder.iterdir() if item.is_dir()):
        if not class_folder.name.isdigit() or int(class_folder.name) >= len(GTSRB_CLASSES):
            raise ScqError(
                f"{class_folder}: not one of the class folders 00000 to 00042; move it away"
            )
        rows += _class_rows(root, class_folder)
    return rows


def _class_rows(root: Path, folder: Path) -> list[_Row]:
    table = folder / f"GT-{folder.name}.csv"
    rows = _read_csv(root, table, folder)
    for row in rows:
        if row.label != int(folder.name):
            raise ScqError(
                f"{table}: {row.name} has class {row.label}, its folder says {folder.name}; "
                f"{_REMEDY}"
            )
    return rows


def _test_rows(root: Path) -> list[_Row]:
    folder = root / _TEST_FOLDER
    places = (folder, root, root / "Final_Test", root.parent)
    table = next((place / _TEST_CSV for place in places if (place / _TEST_CSV).exists()), None)
    if table is None:
        raise ScqError(
            f"{folder / _TEST_CSV}: no such file; it comes in GTSRB_Final_Test_GT.zip, apart from "
            "the pictures (the csv beside them has no classes); run: scq data fetch gtsrb"
        )
    return _read_csv(root, table, folder)


def _read_csv(root: Path, table: Path, pictures: Path) -> list[_Row]:
    if not table.exists():
        raise ScqError(f"{table}: no such file; {_REMEDY}")
    with table.open(newline="") as file:
        reader = csv.DictReader(file, delimiter=";")
        absent = {"Filename", "ClassId", *_BOX_COLUMNS} - set(reader.fieldnames or ())
        if absent:
            raise ScqError(f"{table}: has no column {', '.join(sorted(absent))}; {_REMEDY}")
        prefix = pictures.relative_to(root).as_posix()
        return [_row(table, line, prefix) for line in reader]


def _row(table: Path, line: dict[str, str], prefix: str) -> _Row:
    name = line["Filename"]
    try:
        # The last row and column of the region count as part of it.
        left, top, right, bottom = (int(line[column]) for column in _BOX_COLUMNS)
        label = int(line["ClassId"])
    except (TypeError, ValueError) as error:
        raise ScqError(f"{table}: {name}: not a number: {error}; {_REMEDY}") from error
    if not 0 <= label < len(GTSRB_CLASSES) or "/" in name or "\\" in name:
        raise ScqError(f"{table}: {name!r} of class {label} cannot be; {_REMEDY}")
    return _Row(f"{prefix}/{name}", label, (left, top, right + 1, bottom + 1))


LAYOUT = Layout("gtsrb (official)", _matches, _splits, _open_split)
