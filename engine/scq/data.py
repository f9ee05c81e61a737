"""Training images: zips, folders, class folders, single pictures and video clips.

Every source becomes an `ImageSet`; batches are random crops, a pure function of the generator
given. Pictures are never written to disk. Official data sets and sets that do not fit in memory
are opened by `scq.datasets`. This module knows nothing of models.
"""

from __future__ import annotations

import zipfile
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from scq.errors import InvalidImage, ScqError
from scq.images import Pixels, read_image

_IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
_VIDEO_SUFFIXES = {".mp4", ".mov", ".mkv", ".webm"}

# Names of the German Traffic Sign Recognition Benchmark's classes 00 to 42.
GTSRB_CLASSES = (
    *(f"speed limit {speed}" for speed in (20, 30, 50, 60, 70, 80)),
    "end of speed limit 80", "speed limit 100", "speed limit 120", "no passing",
    "no passing for trucks", "priority at next crossing", "priority road", "yield", "stop",
    "no vehicles", "no trucks", "no entry", "danger", "curve left", "curve right",
    "double curve", "bumpy road", "slippery road", "road narrows", "road works",
    "traffic lights", "pedestrians", "children", "bicycles", "ice or snow", "wild animals",
    "end of all limits", "turn right", "turn left", "straight on", "straight or right",
    "straight or left", "keep right", "keep left", "roundabout", "end of no passing",
    "end of no passing for trucks",
)  # fmt: skip


class PictureSequence(Sequence[Pixels]):
    """Pictures that are read when they are asked for; see `datasets.lazy`."""

    @abstractmethod
    def select(self, positions: Sequence[int]) -> PictureSequence:
        """The pictures at `positions`, in that order, unread."""


@dataclass(frozen=True)
class ImageSet:
    """Pictures, (H, W, 3) uint8 each, of any sizes: decoded, or a `PictureSequence`.

    `labels` are indices into `classes`; both are empty for pictures without class folders.
    """

    images: Sequence[Pixels]
    names: tuple[str, ...]
    labels: tuple[int, ...] = ()
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.images) == 0:
            raise ScqError("no images found; give zips, folders, pictures or video clips")
        if self.labels and len(self.labels) != len(self.images):
            raise ScqError(f"{len(self.labels)} labels for {len(self.images)} images")

    def __len__(self) -> int:
        return len(self.images)

    def subset(self, positions: Sequence[int]) -> ImageSet:
        """The images at `positions`, in that order."""
        return ImageSet(
            _select(self.images, positions),
            tuple(self.names[i] for i in positions),
            tuple(self.labels[i] for i in positions) if self.labels else (),
            self.classes,
        )


@dataclass(frozen=True)
class CropConfig:
    """Random square crops of `size` pixels.

    The crop's side in the picture is size * scale, scale drawn log-uniformly from
    [min_scale, max_scale] and limited by the picture after padding by `pad` edge pixels.
    `jitter` is the largest relative change of contrast and, halved, of brightness. `colour` is
    the largest change of saturation, as a natural logarithm; each channel's gain changes by up to
    a quarter of it.
    """

    size: int
    min_scale: float = 0.8
    max_scale: float = 2.0
    flip: bool = True
    pad: int = 0
    jitter: float = 0.0
    colour: float = 0.0

    def __post_init__(self) -> None:
        if self.size < 1 or self.pad < 0 or not 0 <= self.jitter < 1 or not 0 <= self.colour < 2:
            raise ScqError(f"crop size, pad, jitter or colour out of range: {self}")
        if not 0 < self.min_scale <= self.max_scale:
            raise ScqError(f"need 0 < min_scale <= max_scale, got {self}")


@dataclass(frozen=True)
class Batch:
    """Images (B, 3, S, S) float32 in [0, 1]; labels (B,) int64, or None where unlabelled."""

    images: Tensor
    labels: Tensor | None


def load_images(paths: Sequence[Path | str]) -> ImageSet:
    """Every picture of the sources, in the order given and sorted inside each source.

    A source is a zip, a folder, one picture or one video clip. When every picture lies in a
    sub-folder of its zip or folder, the folders are classes, sorted by name over all sources.

    Raises:
        ScqError: a source that does not exist or holds no pictures.
        InvalidImage: a picture that cannot be decoded, naming it.
    """
    entries = [entry for path in paths for entry in _read_source(Path(path))]
    names, images = tuple(name for name, _ in entries), tuple(image for _, image in entries)
    folders = [PurePosixPath(name).parent.name for name in names]
    if not all(folders):
        return ImageSet(images, names)
    classes = tuple(sorted(set(folders)))
    labels = tuple(classes.index(folder) for folder in folders)
    return ImageSet(images, names, labels, classes)


def hold_out_tail(images: ImageSet, fraction: float) -> tuple[ImageSet, ImageSet]:
    """Split off the last `fraction` in the set's order: a block of neighbouring video frames.

    The block comes from the source named last in `load_images`.
    """
    order = range(len(images))
    kept = _kept_count(len(images), fraction)
    return images.subset(order[:kept]), images.subset(order[kept:])


def hold_out_random(images: ImageSet, fraction: float, seed: int) -> tuple[ImageSet, ImageSet]:
    """Split off a random `fraction`, the same for the same seed."""
    order = np.random.default_rng(seed).permutation(len(images)).tolist()
    kept = _kept_count(len(images), fraction)
    return images.subset(sorted(order[:kept])), images.subset(sorted(order[kept:]))


def sample_batch(
    images: ImageSet, crop: CropConfig, batch_size: int, rng: np.random.Generator
) -> Batch:
    """`batch_size` random crops with replacement."""
    positions = rng.integers(len(images), size=batch_size)
    pixels = np.stack([_random_crop(images.images[i], crop, rng) for i in positions])
    tensor = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    labels = torch.tensor([images.labels[i] for i in positions]) if images.labels else None
    return Batch(tensor, labels)


def to_tensor(image: Pixels) -> Tensor:
    """(H, W, 3) uint8 -> (1, 3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(image.astype(np.float32) / 255).permute(2, 0, 1).unsqueeze(0)


def _select(images: Sequence[Pixels], positions: Sequence[int]) -> Sequence[Pixels]:
    if isinstance(images, PictureSequence):
        return images.select(positions)
    return tuple(images[i] for i in positions)


def _kept_count(total: int, fraction: float) -> int:
    kept = total - round(total * fraction)
    if not 0 < kept < total:
        raise ScqError(f"holding out {fraction:g} of {total} images leaves one side empty")
    return kept


def _random_crop(image: Pixels, crop: CropConfig, rng: np.random.Generator) -> NDArray[np.float32]:
    if crop.pad:
        image = np.pad(image, ((crop.pad, crop.pad), (crop.pad, crop.pad), (0, 0)), mode="edge")
    height, width = image.shape[:2]
    scale = np.exp(rng.uniform(np.log(crop.min_scale), np.log(crop.max_scale)))
    side = min(round(crop.size * scale), height, width)
    top, left = rng.integers(height - side + 1), rng.integers(width - side + 1)
    patch = np.ascontiguousarray(image[top : top + side, left : left + side])
    if side != crop.size:
        size = (crop.size, crop.size)
        patch = np.asarray(Image.fromarray(patch).resize(size, Image.Resampling.BICUBIC))
    if crop.flip and rng.random() < 0.5:
        patch = patch[:, ::-1]
    values = patch.astype(np.float32) / np.float32(255)
    return _recolour(_jitter(values, crop.jitter, rng), crop.colour, rng)


def _recolour(
    patch: NDArray[np.float32], amount: float, rng: np.random.Generator
) -> NDArray[np.float32]:
    if not amount:
        return patch
    saturation = np.float32(np.exp(rng.uniform(-amount, amount)))
    gains = rng.uniform(1 - amount / 4, 1 + amount / 4, 3).astype(np.float32)
    grey = patch.mean(axis=2, keepdims=True)
    changed: NDArray[np.float32] = (grey + (patch - grey) * saturation) * gains
    np.clip(changed, 0, 1, out=changed)
    return changed


def _jitter(
    patch: NDArray[np.float32], amount: float, rng: np.random.Generator
) -> NDArray[np.float32]:
    if not amount:
        return patch
    contrast, brightness = rng.uniform(1 - amount, 1 + amount), rng.uniform(-amount, amount) / 2
    mean = patch.mean(dtype=np.float32)
    changed: NDArray[np.float32] = (
        (patch - mean) * np.float32(contrast) + mean + np.float32(brightness)
    )
    np.clip(changed, 0, 1, out=changed)
    return changed


def _read_source(path: Path) -> Iterator[tuple[str, Pixels]]:
    if not path.exists():
        raise ScqError(f"{path}: no such file or folder")
    if path.is_dir():
        return _read_folder(path)
    suffix = path.suffix.lower()
    if suffix == ".zip":
        return _read_zip(path)
    if suffix in _VIDEO_SUFFIXES:
        return _read_video(path)
    if suffix in _IMAGE_SUFFIXES:
        return iter([(path.name, _decode(path.read_bytes(), path.name))])
    raise ScqError(f"{path}: not a zip, folder, picture or video clip")


def _read_folder(path: Path) -> Iterator[tuple[str, Pixels]]:
    for file in sorted(path.rglob("*")):
        if file.suffix.lower() in _IMAGE_SUFFIXES:
            yield file.relative_to(path).as_posix(), _decode(file.read_bytes(), str(file))


def _read_zip(path: Path) -> Iterator[tuple[str, Pixels]]:
    try:
        with zipfile.ZipFile(path) as archive:
            for name in sorted(archive.namelist()):
                if PurePosixPath(name).suffix.lower() in _IMAGE_SUFFIXES:
                    yield name, _decode(archive.read(name), f"{path}:{name}")
    except zipfile.BadZipFile as error:
        raise ScqError(f"{path}: not a readable zip: {error}") from error


def _read_video(path: Path) -> Iterator[tuple[str, Pixels]]:
    try:
        import av
    except ImportError as error:
        raise ScqError(f"{path}: reading video needs PyAV; run pip install av") from error
    with av.open(str(path)) as container:
        for number, frame in enumerate(container.decode(video=0)):
            pixels = frame.to_ndarray(format="rgb24").astype(np.uint8, copy=False)
            yield f"{path.stem}_{number:05d}", pixels


def _decode(data: bytes, name: str) -> Pixels:
    try:
        return read_image(data)
    except InvalidImage as error:
        raise InvalidImage(f"{name}: cannot decode: {error}") from error
