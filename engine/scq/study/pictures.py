"""The pictures of the studies: fixed 32x32 training and test crops of four data sets.

Crops depend on the data set and the seed of the set only, never on the run, so that every run of
a study sees the same pictures. Knows nothing of models.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from scq.data import CropConfig, ImageSet, sample_batch
from scq.datasets import open_dataset
from scq.errors import ScqError
from scq.study.autoencoder import SIDE

_SEED = 20261122
_CHUNK = 500


@dataclass(frozen=True)
class PictureSource:
    """Where a study's pictures come from: a folder under the data root, and how to crop.

    `scale` is the crop's side in the picture over 32; None takes whole pictures, resized to 32x32.
    """

    folder: str
    scale: tuple[float, float] | None


SOURCES = {
    "cifar10": PictureSource("cifar10", None),
    "gtsrb": PictureSource("gtsrb", None),
    "nav": PictureSource("camvid", (1.0, 3.0)),
    "food": PictureSource("food101", (1.0, 3.0)),
}


@dataclass(frozen=True)
class Pictures:
    """Pictures (N, 3, 32, 32) uint8, to train on and to measure on."""

    name: str
    train: Tensor
    test: Tensor

    def __post_init__(self) -> None:
        for part in (self.train, self.test):
            if part.dtype != torch.uint8 or tuple(part.shape[1:]) != (3, SIDE, SIDE):
                raise ScqError(f"{self.name}: pictures are {part.dtype} {tuple(part.shape)}")


def load_pictures(name: str, root: Path, num_train: int, num_test: int) -> Pictures:
    """At most `num_train` and `num_test` pictures of one source under `root`, in random order.

    Raises:
        ScqError: an unknown name, a missing folder, or pictures too few or too small.
    """
    if name not in SOURCES:
        raise ScqError(f"unknown picture set {name!r}; available: {', '.join(SOURCES)}")
    source = SOURCES[name]
    folder = root / source.folder
    if not folder.exists():
        raise ScqError(
            f"{folder}: no such folder; --data must hold {source.folder}/ "
            f"(run: scq data fetch {source.folder} --to {folder})"
        )
    train = _tensor(open_dataset(folder, "train"), source, num_train)
    test = _tensor(open_dataset(folder, "test"), source, num_test)
    return Pictures(name, train, test)


def _tensor(images: ImageSet, source: PictureSource, count: int) -> Tensor:
    rng = np.random.default_rng(_SEED)
    if source.scale is None:
        # Shuffled, because the first pictures initialise quantizers and entropy tables.
        order = rng.permutation(len(images))[:count]
        return torch.cat([_whole(images, int(position)) for position in order])
    crop = CropConfig(SIDE, source.scale[0], source.scale[1])
    chunks = [min(_CHUNK, count - start) for start in range(0, count, _CHUNK)]
    return torch.cat([_bytes(sample_batch(images, crop, size, rng).images) for size in chunks])


def _whole(images: ImageSet, position: int) -> Tensor:
    """A whole picture; those of the official traffic signs have many sizes and are resized."""
    pixels = images.images[position]
    if pixels.shape != (SIDE, SIDE, 3):
        picture = Image.fromarray(np.ascontiguousarray(pixels))
        pixels = np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).unsqueeze(0)


def _bytes(images: Tensor) -> Tensor:
    return images.mul(255).round_().to(torch.uint8)
